"""Normals of a surface that is known by its depth in every pixel."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sds3d.interfaces import Cameras


def depth_normals(
    depth: Float[Tensor, "b 1 H W"], alpha: Float[Tensor, "b 1 H W"], cameras: Cameras
) -> Float[Tensor, "b 3 H W"]:
    """Unit world normals, towards the camera, of the surface at the mean depth `depth / alpha`.

    Tangents are differences to the neighbours on either side, weighted by the neighbours' alpha, so that the
    silhouette does not bend them.
    """
    device, dtype = depth.device, depth.dtype
    intrinsics = cameras.intrinsics.to(device, dtype)
    x = torch.arange(cameras.width_px, device=device, dtype=dtype) + 0.5
    y = torch.arange(cameras.height_px, device=device, dtype=dtype) + 0.5
    slope_x = (x - intrinsics[:, 0, 2, None]) / intrinsics[:, 0, 0, None]
    slope_y = (y - intrinsics[:, 1, 2, None]) / intrinsics[:, 1, 1, None]
    mean = depth[:, 0] / alpha[:, 0].clamp_min(1e-3)
    points = torch.stack([mean * slope_x[:, None, :], mean * slope_y[:, :, None], mean], 1)
    across, down = _tangent(points, alpha, 3), _tangent(points, alpha, 2)
    # x right, y down: down x across looks back at the camera.
    normal = torch.linalg.cross(down, across, dim=1)
    rotation = cameras.c2w[:, :3, :3].to(device, dtype)
    return nn.functional.normalize(torch.einsum("bij,bjhw->bihw", rotation, normal), dim=1, eps=1e-12)


def _tangent(points: Tensor, alpha: Tensor, dim: int) -> Tensor:
    step = points.diff(dim=dim)
    weight = alpha.detach()
    size = points.shape[dim]
    pad = torch.zeros_like(points.narrow(dim, 0, 1))
    ahead, behind = torch.cat([step, pad], dim), torch.cat([pad, step], dim)
    edge = torch.zeros_like(weight.narrow(dim, 0, 1))
    weight_ahead = torch.cat([weight.narrow(dim, 1, size - 1), edge], dim)
    weight_behind = torch.cat([edge, weight.narrow(dim, 0, size - 1)], dim)
    return ahead * weight_ahead + behind * weight_behind
