"""Depth maps of known cameras fused into one truncated signed distance on a lattice.

Per lattice point x and view v, with z its depth and D that seen at its pixel, f = clamp((D - z) / trunc, -1, 1):

    in front by more than trunc, or before the background    free: f = 1
    within trunc of the surface                              near: f, with weight 1 in front, falling to 0 behind it
    behind by more than trunc                                hidden: says nothing

F(x) is the weighted mean of what is said (Curless & Levoy 1996); weights that fall behind the surface keep thin walls
(Bylow et al. 2013). What no view says anything about is inside, so the result is closed where nobody looked. And where
less than `free_share` of the views see x free, and none sees a surface near it, they are not believed: gaps between
splats, through which a few views look, dig no tunnels.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.interfaces import Cameras
from sds3d.ops.splat_reference import view_matrices

COVERED = 0.5  # alpha from which a pixel shows the object
_CHUNK = 1 << 19  # lattice points at once


@torch.no_grad()
def fuse_depths(
    depth: Float[Tensor, "b 1 H W"],
    alpha: Float[Tensor, "b 1 H W"],
    cameras: Cameras,
    *,
    half_extent: float,
    cells: int,
    trunc_m: float,
    free_share: float = 0.1,
) -> Float[Tensor, "n n n"]:
    """F in [-1, 1], negative inside, at n = cells + 1 points per side of the cube [-half_extent, half_extent]^3.

    `depth` holds metres along each camera's z axis where `alpha` exceeds one half; elsewhere it is ignored. A point
    outside of all images counts as free. Axes are x, y, z.
    """
    axis = torch.linspace(-half_extent, half_extent, cells + 1, device=depth.device)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(-1, 3)
    w2c, intrinsics = view_matrices(cameras, depth), cameras.intrinsics.to(depth)
    fused = [
        _fuse(part, depth[:, 0], alpha[:, 0] > COVERED, w2c, intrinsics, trunc_m, free_share)
        for part in points.split(_CHUNK)
    ]
    return torch.cat(fused).view(cells + 1, cells + 1, cells + 1)


def _fuse(
    points: Float[Tensor, "n 3"],
    depth: Float[Tensor, "b H W"],
    covered: Tensor,
    w2c: Float[Tensor, "b 4 4"],
    intrinsics: Float[Tensor, "b 3 3"],
    trunc_m: float,
    free_share: float,
) -> Float[Tensor, " n"]:
    height, width = depth.shape[1:]
    total, weight, free, views = (points.new_zeros(len(points)) for _ in range(4))
    for view in range(len(depth)):
        x, y, z = (points @ w2c[view, :3, :3].T + w2c[view, :3, 3]).unbind(-1)
        k = intrinsics[view]
        ahead = z.clamp_min(1e-6)
        column = (k[0, 0] * x / ahead + k[0, 2]).floor().long()
        row = (k[1, 1] * y / ahead + k[1, 2]).floor().long()
        seen = (z > 1e-6) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        pixel = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
        hit = covered[view].reshape(-1)[pixel]
        step = (depth[view].reshape(-1)[pixel] - z) / trunc_m
        near = seen & hit & (step.abs() < 1)
        share = near * (1 + step.clamp(max=0))
        total += share * step.clamp(-1, 1)
        weight += share
        free += seen & (~hit | (step >= 1))
        views += seen
    free = torch.where((free >= free_share * views) | (views == 0), free.clamp_min(1.0), 0.0)
    said = weight + free
    # Hardly anything said, and that from behind the surface: inside, without dividing by nothing.
    return torch.where(said > 1e-3, (total + free) / said.clamp_min(1e-3), -1.0)
