"""Contact sheet of the toybox kinds, to judge the models by eye."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from sds3d.toybox.colors import sample_rgb
from sds3d.toybox.held_out import sample_colors
from sds3d.toybox.kinds import KINDS
from sds3d.toybox.views import make_views
from sds3d.toybox.world import compose, render_layers, sample_toy

SIZE_PX = 64
UPSCALE = 1.5
_AZIMUTHS = (0, 45, 90, 135, 180, 225, 270, 315, 20, 20)
_ELEVATIONS = (15, 15, 15, 15, 15, 15, 15, 15, 45, 75)


def contact_sheet(
    kinds: Sequence[str], rng: np.random.Generator, instances: int = 2, size_px: int = SIZE_PX
) -> Image.Image:
    """One row per kind: ``instances`` random toys, each seen from ten views, on light gray."""
    views = make_views(_AZIMUTHS, _ELEVATIONS)
    count = len(views)
    rows = []
    for kind in kinds:
        blocks = []
        for _ in range(instances):
            first, second = sample_colors(rng, kind)
            other = second or KINDS[kind].default_second or first
            main_rgb = np.tile(sample_rgb(rng, first), (count, 1))
            second_rgb = np.tile(sample_rgb(rng, other), (count, 1)) if other != first else main_rgb
            layers = render_layers([sample_toy(rng, kind)] * count, views, size_px, rng)
            blocks.append(compose(layers, main_rgb, second_rgb, np.full((count, 3), 0.96)))
        rows.append(np.concatenate([image for block in blocks for image in block], axis=1))
    pixels = np.rint(np.concatenate(rows) * 255.0).astype(np.uint8)
    sheet = Image.fromarray(pixels)
    size = (round(sheet.width * UPSCALE), round(sheet.height * UPSCALE))
    return sheet.resize(size, Image.Resampling.BICUBIC)
