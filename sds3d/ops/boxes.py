"""All lattice points of many boxes as flat lists: how torch code walks the pixels of triangles without a kernel."""

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

CHUNK = 1 << 20  # lattice points per list: bounds the memory


def walk_boxes(
    low: Int[Tensor, "m d"], high: Int[Tensor, "m d"], *, chunk: int = CHUNK
) -> Iterator[tuple[Int[Tensor, " c"], Int[Tensor, "c d"]]]:
    """Lists (box, point) that together hold every integer point with low <= point <= high, box by box.

    Boxes with high < low on any axis are empty. A list holds about `chunk` points; a box is never split.
    """
    sides = (high - low + 1).clamp_min(0)
    box = sides.prod(1).nonzero()[:, 0]
    low, sides = low[box], sides[box]
    count = sides.prod(1)
    end = count.cumsum(0)
    begin = end - count
    total = int(end[-1]) if len(box) else 0
    cuts = torch.searchsorted(end, torch.arange(chunk, total + chunk, chunk, device=end.device))
    start = 0
    for stop in (cuts + 1).clamp_max(len(box)).tolist():
        if stop <= start:
            continue
        part = slice(start, stop)
        item = torch.repeat_interleave(count[part])
        rest = torch.arange(len(item), device=end.device) - (begin[part] - begin[start])[item]
        point = torch.empty(len(item), low.shape[1], dtype=low.dtype, device=low.device)
        for axis in range(low.shape[1] - 1, -1, -1):
            side = sides[part, axis][item]
            point[:, axis] = low[part, axis][item] + rest % side
            rest = rest // side
        yield box[part][item], point
        start = stop
