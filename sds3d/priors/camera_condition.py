"""What toybox models are told besides the text: camera, background, and where each pixel lies.

Shared by training (`sds3d.toybox.train`) and inference (`sds3d.priors.families.stable_diffusion`), so that both sides
mean the same numbers. A missing camera or background is all zeros with its flag at 0, as trained with dropout.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.interfaces import Told

CONDITION_SIZE = 10
RADIUS_CENTER_M = 3.3
RADIUS_SPREAD_M = 0.2


COORDINATE_CHANNELS = 2


def with_coordinates(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c+2 h w"]:
    """X with two more channels: column and row, from -1.7 to 1.7 (unit variance).

    Drawing a shape at its place from a global code is hard for convolutions, which see positions only through their
    padding (Liu et al. 2018, CoordConv, arXiv:1807.03247).
    """
    rows, columns = (torch.linspace(-1.7, 1.7, n, dtype=x.dtype, device=x.device) for n in x.shape[-2:])
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))
    return torch.cat([x, grid.expand(len(x), -1, -1, -1)], dim=1)


def condition_vector(
    azimuth_deg: Float[Tensor, " b"],
    elevation_deg: Float[Tensor, " b"],
    radius: Float[Tensor, " b"],
    background: Float[Tensor, "b 3"],
    camera_known: Float[Tensor, " b"],
    background_known: Float[Tensor, " b"],
) -> Float[Tensor, "b 10"]:
    """[sin az, cos az, sin el, cos el, (radius - 3.3) / 0.2, 1] * camera_known, [2 bg - 1, 1] * background_known.

    `background` is sRGB in [0, 1]; the two flags are 0 or 1 per view.
    """
    azimuth, elevation = torch.deg2rad(azimuth_deg), torch.deg2rad(elevation_deg)
    camera = torch.stack(
        [
            azimuth.sin(),
            azimuth.cos(),
            elevation.sin(),
            elevation.cos(),
            (radius - RADIUS_CENTER_M) / RADIUS_SPREAD_M,
            torch.ones_like(radius),
        ],
        dim=1,
    )
    ground = torch.cat([2.0 * background - 1.0, torch.ones_like(background[:, :1])], dim=1)
    return torch.cat([camera * camera_known[:, None], ground * background_known[:, None]], dim=1)


def camera_background_labels(told: Sequence[Told], views: int) -> Float[Tensor, "r 10"]:
    """Camera and background of every row; zeros with their flag off where not told."""
    device = told[0].text.device
    none = torch.zeros(views, device=device)
    rows = []
    for bundle in told:
        cameras, background = bundle.cameras, bundle.background
        if cameras is None and background is None:
            rows.append(none[:, None].expand(views, CONDITION_SIZE))
            continue
        azimuth = elevation = radius = none
        if cameras is not None:
            azimuth, elevation, radius = cameras.azimuth_deg, cameras.elevation_deg, cameras.radius
        ground = none[:, None].expand(views, 3) if background is None else background
        rows.append(
            condition_vector(
                azimuth.to(device),
                elevation.to(device),
                radius.to(device),
                ground.to(device),
                none + float(cameras is not None),
                none + float(background is not None),
            )
        )
    return torch.cat(rows)
