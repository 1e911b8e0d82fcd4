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

# (size_px, count, azimuth_deg of the first) -> views from all sides, "b 3 H W", sRGB in [0, 1]
View = Callable[[int, int, float], Tensor]
SHARE = 1 / 3  # of the time of a run that pictures may take


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


def columns_of(views: int) -> int:
    """Columns of the picture that holds this many views, e.g. 2 for 4 and 4 for 12."""
    return next(columns for columns in range(1, views + 1) if views % columns == 0 and columns**2 >= views)


class Preview:
    """Sides of the scene in one picture, rendered at most every `every_s` seconds, and less often where that is slow.

    The first view turns by `turn_deg` from picture to picture.
    """

    def __init__(
        self,
        path: Path,
        view: View,
        emit: Emit,
        *,
        every_s: float,
        size_px: int,
        views: int = 4,
        turn_deg: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path, self.view, self.emit = path, view, emit
        self.every_s, self.clock = every_s, clock
        self.views, self.turn_deg = views, turn_deg
        self.columns = columns_of(views)
        self.view_px = max(1, size_px // self.columns)
        self._azimuth_deg = 0.0
        self._due = -float("inf")

    def refresh(self, step: int, *, last: bool = False) -> None:
        """Render and write the picture if it is due, or in any case after the `last` step."""
        began = self.clock()
        if began < self._due and not last:
            return
        image = tiled(self.view(self.view_px, self.views, self._azimuth_deg), self.columns)
        self._azimuth_deg = (self._azimuth_deg + self.turn_deg) % 360.0
        write_png(self.path, to_image(image))
        self.emit(PreviewReady(step=step, image=image, path=self.path))
        now = self.clock()
        self._due = now + max(self.every_s, (now - began) * (1.0 / SHARE - 1.0))
