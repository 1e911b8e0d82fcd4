"""Cameras on a sphere around the origin.

position = radius (sin az cos el, sin el, cos az cos el): azimuth 0 looks at the front (+z), 90 stands on +x.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.interfaces import Cameras


def orbit_cameras(
    azimuth_deg: Float[Tensor, " b"],
    elevation_deg: Float[Tensor, " b"],
    radius: Float[Tensor, " b"],
    fov_deg: Float[Tensor, " b"],
    size_px: int,
) -> Cameras:
    """Square-image cameras that look at the origin with +y up; elevation in [-90, 90], fov vertical.

    The right vector depends on the azimuth alone, so the poles are no special case.
    """
    azimuth, elevation = torch.deg2rad(azimuth_deg), torch.deg2rad(elevation_deg)
    outward = torch.stack(
        [azimuth.sin() * elevation.cos(), elevation.sin(), azimuth.cos() * elevation.cos()], dim=1
    )
    right = torch.stack([azimuth.cos(), torch.zeros_like(azimuth), -azimuth.sin()], dim=1)
    forward = -outward
    down = torch.linalg.cross(forward, right)
    c2w = torch.zeros(len(azimuth), 4, 4, dtype=azimuth.dtype, device=azimuth.device)
    c2w[:, :3, 0], c2w[:, :3, 1], c2w[:, :3, 2] = right, down, forward
    c2w[:, :3, 3] = outward * radius[:, None]
    c2w[:, 3, 3] = 1.0
    focal = 0.5 * size_px / torch.tan(torch.deg2rad(fov_deg) / 2.0)
    intrinsics = torch.zeros(len(azimuth), 3, 3, dtype=azimuth.dtype, device=azimuth.device)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = focal
    intrinsics[:, 0, 2] = intrinsics[:, 1, 2] = 0.5 * size_px
    intrinsics[:, 2, 2] = 1.0
    return Cameras(
        c2w=c2w,
        intrinsics=intrinsics,
        width_px=size_px,
        height_px=size_px,
        azimuth_deg=azimuth_deg,
        elevation_deg=elevation_deg,
        radius=radius,
        fov_deg=fov_deg,
    )


def turntable_cameras(
    count: int,
    size_px: int,
    elevation_deg: float = 15.0,
    radius: float = 3.3,
    fov_deg: float = 40.0,
    *,
    azimuth_deg: float = 0.0,
) -> Cameras:
    """`count` cameras evenly around the object, the first at `azimuth_deg` (0 = the front)."""

    def same(value: float) -> Tensor:
        return torch.full((count,), value)

    azimuth = torch.arange(count, dtype=torch.float32) * (360.0 / count) + azimuth_deg
    return orbit_cameras(azimuth, same(elevation_deg), same(radius), same(fov_deg), size_px)
