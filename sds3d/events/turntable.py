"""Moving and still pictures of a result: `turntable.mp4` and `contact_sheet.png`."""

from collections.abc import Iterable
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.events.preview import tiled, to_image, write_png
from sds3d.paths import replacing

FRAMES_PER_S = 16


def write_turntable(path: Path, frames: Iterable[Float[Tensor, "3 H W"]], *, size_px: int) -> None:
    """An H.264 video of square frames; `size_px` must be even, as yuv420p asks.

    `macro_block_size=2` because the default of 16 would silently rescale other sizes.
    """
    if size_px % 2:
        raise ValueError(f"size_px is {size_px}; H.264 needs an even size")
    with replacing(path) as temporary:
        writer = imageio_ffmpeg.write_frames(
            str(temporary),
            (size_px, size_px),
            fps=FRAMES_PER_S,
            codec="libx264",
            quality=8,
            macro_block_size=2,
            ffmpeg_log_level="error",
        )
        writer.send(None)
        try:
            for frame in frames:
                writer.send(np.ascontiguousarray(np.asarray(to_image(frame))))
        finally:
            writer.close()


def write_contact_sheet(path: Path, images: Float[Tensor, "b 3 H W"], *, columns: int = 3) -> None:
    """All images in one PNG, row by row."""
    blank = -len(images) % columns
    full = torch.cat([images.cpu(), torch.ones(blank, *images.shape[1:])])
    write_png(path, to_image(tiled(full, columns)))
