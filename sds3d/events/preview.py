"""`preview.png`, refreshed while the run goes on."""

import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sds3d.events.bus import Emit, PreviewReady
from sds3d.paths import write_atomic

View = Callable[[int, int], Tensor]  # (size_px, count) -> views from all sides, "b 3 H W", sRGB in [0, 1]


def to_image(rgb: Float[Tensor, "3 H W"]) -> Image.Image:
    """An 8-bit picture; values outside [0, 1] are clipped."""
    pixels = (rgb.detach().float().cpu().clamp(0.0, 1.0) * 255.0 + 0.5).byte().permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(pixels.numpy()))


def write_png(path: Path, image: Image.Image) -> None:
    """Write a PNG whole or not at all."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue(), durable=False)


def tiled(images: Float[Tensor, "b 3 H W"], columns: int) -> Float[Tensor, "3 rH cW"]:
    """All images in one, row by row; b must be a multiple of `columns`."""
    rows = [torch.cat(list(row), dim=2) for row in images.split(columns)]
    return torch.cat(rows, dim=1)


class Preview:
    """Four sides of the scene in one picture, rendered at most every `every_s` seconds."""

    def __init__(
        self,
        path: Path,
        view: View,
        emit: Emit,
        *,
        every_s: float,
        size_px: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path, self.view, self.emit = path, view, emit
        self.every_s, self.size_px, self.clock = every_s, size_px, clock
        self._due = -float("inf")

    def refresh(self, step: int, *, last: bool = False) -> None:
        """Render and write the picture if it is due, or in any case after the `last` step."""
        if self.clock() < self._due and not last:
            return
        image = tiled(self.view(self.size_px // 2, 4), columns=2)
        write_png(self.path, to_image(image))
        self.emit(PreviewReady(step=step, image=image, path=self.path))
        self._due = self.clock() + self.every_s
