"""A voxel grid from a pyramid of raw levels, and its total variation: reference (torch) | numba.

The grid adds up its levels, each interpolated trilinearly to the finest (corner voxels aligned). Coarse levels
turn the gradient of many rays into one broad move, fine ones add detail.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sds3d.ops import voxel_grid_kernels as kernels
from sds3d.ops.backend import backend_for
from sds3d.ops.threads import run_tasks

_TASKS = 8  # slabs per grid; fixed, so that sums do not depend on the number of threads


def assemble_levels(
    levels: Sequence[Float[Tensor, "1 4 _ _ _"]],
    base: Float[Tensor, "N N N"],
    *,
    density_gain: float,
    color_gain: float,
) -> Float[Tensor, "N N N 4"]:
    """With h = sum of upsampled levels: (base + density_gain h_0, sigmoid(color_gain h_1..3)), channels last.

    Levels are (1, 4, z, y, x), coarsest first; the last has the resolution N of `base`. Differentiable in the
    levels.
    """
    if backend_for(base) != "numba" or base.dtype != torch.float32:
        return assemble_levels_reference(levels, base, density_gain, color_gain)
    gains = (np.float32(density_gain), np.float32(color_gain))
    grid: Tensor = _Assemble.apply(base, gains, *levels)
    return grid


def assemble_levels_reference(
    levels: Sequence[Float[Tensor, "1 4 _ _ _"]],
    base: Float[Tensor, "N N N"],
    density_gain: float,
    color_gain: float,
) -> Float[Tensor, "N N N 4"]:
    """The twin in plain torch."""
    total = levels[-1]
    for level in levels[:-1]:
        total = total + F.interpolate(level, size=base.shape, mode="trilinear", align_corners=True)
    logit = base + density_gain * total[0, 0]
    color = torch.sigmoid(color_gain * total[0, 1:])
    return torch.cat([logit[None], color]).permute(1, 2, 3, 0).contiguous()


def grid_variation(
    grid: Float[Tensor, "D H W 4"], limit: float
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean squared forward difference, summed over the three axes: of logits clamped to +- limit, of colours."""
    if backend_for(grid) != "numba" or grid.dtype != torch.float32:
        return grid_variation_reference(grid, limit)
    logit, color = _Variation.apply(grid, np.float32(limit))
    return logit, color


def grid_variation_reference(
    grid: Float[Tensor, "D H W 4"], limit: float
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The twin in plain torch."""
    count = grid.shape[0] * grid.shape[1] * grid.shape[2]
    clamped = torch.cat([grid[..., :1].clamp(-limit, limit), grid[..., 1:]], -1)
    sums = torch.stack([clamped.diff(dim=axis).square().sum((0, 1, 2)) for axis in range(3)]).sum(0)
    return sums[0] / count, sums[1:].sum() / (3 * count)


@lru_cache(maxsize=16)
def _places(coarse: int, fine: int) -> tuple[np.ndarray, np.ndarray]:
    """Cell, and place in it, of each of `fine` voxels along an axis of `coarse` voxels with the same ends."""
    at = np.arange(fine) * ((coarse - 1) / (fine - 1))
    cell = np.minimum(at.astype(np.int64), coarse - 2)
    return cell, (at - cell).astype(np.float32)


def _slabs(size: int) -> list[tuple[int, int]]:
    edges = [size * i // _TASKS for i in range(_TASKS + 1)]
    return [(a, b) for a, b in pairwise(edges) if b > a]


class _Assemble(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, gains: Any, *levels: Tensor) -> Tensor:
        size = base.shape[0]
        arrays = [level.detach().contiguous().numpy()[0] for level in levels]
        sizes = [array.shape[1] for array in arrays[:-1]]
        starts = np.cumsum([0, *sizes])
        # Kernels write every element of these.
        planes = np.empty((4, starts[-1], size, size), np.float32)  # noqa: TID251
        grid = np.empty((size, size, size, 4), np.float32)  # noqa: TID251
        tasks = []
        for array, n, start in zip(arrays[:-1], sizes, starts[:-1], strict=True):
            for c in range(4):
                rows = np.zeros((n, size), np.float32)
                tasks.append((array[c], *_places(n, size), rows, planes[c, start : start + n]))
        run_tasks(kernels.expand, tasks)
        first = np.zeros((len(sizes), size), np.int64)
        part = np.zeros((len(sizes), size), np.float32)
        for level, n in enumerate(sizes):
            cell, part[level] = _places(n, size)
            first[level] = starts[level] + cell
        blob = base.detach().contiguous().numpy()
        run_tasks(
            kernels.assemble,
            [
                (*slab, arrays[-1], planes, first, part, blob, *gains, np.zeros((4, size), np.float32), grid)
                for slab in _slabs(size)
            ],
        )
        ctx.kept = (grid, gains, sizes)
        return torch.from_numpy(grid)

    @staticmethod
    def backward(ctx: Any, d_grid: Tensor) -> Any:
        grid, gains, sizes = ctx.kept
        size = grid.shape[0]
        gradient = d_grid.contiguous().numpy()
        d_fine = np.empty((4, size, size, size), np.float32)  # noqa: TID251 - the kernel writes every element
        run_tasks(
            kernels.assemble_adjoint, [(*slab, grid, gradient, *gains, d_fine) for slab in _slabs(size)]
        )
        d_levels = [np.zeros((4, n, n, n), np.float32) for n in sizes]
        tasks = []
        for d_level, n in zip(d_levels, sizes, strict=True):
            for c in range(4):
                planes, rows = np.zeros((n, size, size), np.float32), np.zeros((n, size), np.float32)
                tasks.append((d_fine[c], *_places(n, size), planes, rows, d_level[c]))
        run_tasks(kernels.expand_adjoint, tasks)
        return None, None, *(torch.from_numpy(d_level)[None] for d_level in (*d_levels, d_fine))


class _Variation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grid: Tensor, limit: Any) -> Any:
        values = grid.detach().contiguous().numpy()
        slabs = _slabs(values.shape[0])
        sums = np.zeros((len(slabs), 2))
        run_tasks(
            kernels.variation,
            [(*slab, values, limit, own) for slab, own in zip(slabs, sums, strict=True)],
        )
        voxels = values.shape[0] * values.shape[1] * values.shape[2]
        ctx.kept = (values, limit, voxels)
        total = sums.sum(0)
        return torch.tensor(total[0] / voxels, dtype=grid.dtype), torch.tensor(
            total[1] / (3 * voxels), dtype=grid.dtype
        )

    @staticmethod
    def backward(ctx: Any, d_logit: Tensor, d_color: Tensor) -> Any:
        values, limit, voxels = ctx.kept
        weights = np.float32(2 * float(d_logit) / voxels), np.float32(2 * float(d_color) / (3 * voxels))
        d_grid = np.empty(values.shape, np.float32)  # noqa: TID251 - the kernel writes every element
        run_tasks(
            kernels.variation_adjoint,
            [(*slab, values, limit, *weights, d_grid) for slab in _slabs(values.shape[0])],
        )
        return torch.from_numpy(d_grid), None
