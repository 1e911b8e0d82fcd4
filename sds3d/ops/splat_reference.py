"""3D Gaussian splatting in plain torch: the definition that the other backends are checked against.

Notation, per view and Gaussian i (Zwicker et al. 2001; Kerbl et al. 2023, arXiv:2308.04079, section 4):

    p = W m + w                  mean in camera axes; depth z = p_z
    Sigma = R S S^T R^T          covariance from rotation R and scales S
    C = J W Sigma W^T J^T + 0.3 I    image covariance; J is the Jacobian of the projection at p
    s(x) = 1/2 (x - u)^T C^-1 (x - u)
    a(x) = min(0.999, o exp(-s))     dropped where below 1/255
    T_i = prod_{j in front} (1 - a_j),  w_i = a_i T_i
    rgb = sum w_i c_i + T_end background,   alpha = 1 - T_end,   depth = sum w_i z_i

The conventions are those of gsplat's "classic" mode: a pixel stops *before* the Gaussian that would bring its
transmittance to 1e-4 or below, and the Jacobian is evaluated no further than 30 % outside the frustum.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.interfaces import Cameras

BLUR_PX2 = 0.3  # added to the image covariance: a splat is never thinner than a pixel
ALPHA_MIN = 1.0 / 255.0
ALPHA_MAX = 0.999
TRANSMITTANCE_MIN = 1e-4
NEAR_M = 0.01
FRUSTUM_MARGIN = 0.3  # of the half-angle's tangent
DETERMINANT_MIN = 1e-10
NORM_MIN = 1e-12

TILE_PX = 16
CHUNK = 512  # Gaussians composited at once; a tile stops after the chunk in which it became opaque


@dataclass(frozen=True, kw_only=True)
class Splats:
    """Gaussians as one view sees them; differentiable except `half_px`, which is 0 for the invisible ones."""

    center_px: Float[Tensor, "g 2"]
    conic: Float[Tensor, "g 3"]  # inverse image covariance: xx, xy, yy
    depth: Float[Tensor, " g"]
    half_px: Float[Tensor, "g 2"]  # half sides of the box that holds every pixel with alpha >= 1/255


def view_matrices(cameras: Cameras, like: Tensor) -> Float[Tensor, "b 4 4"]:
    """World-to-camera matrices in the dtype and on the device of `like`; camera poses get no gradient."""
    c2w = cameras.c2w.detach().to(like)
    turn = c2w[:, :3, :3].transpose(1, 2)
    w2c = torch.zeros_like(c2w)
    w2c[:, :3, :3] = turn
    w2c[:, :3, 3] = -(turn @ c2w[:, :3, 3:]).squeeze(-1)
    w2c[:, 3, 3] = 1.0
    return w2c


def rotation_matrices(quats_wxyz: Float[Tensor, "g 4"]) -> Float[Tensor, "g 3 3"]:
    """Rotation matrices of quaternions, which need not have unit length."""
    unit = quats_wxyz / quats_wxyz.norm(dim=-1, keepdim=True).clamp_min(NORM_MIN)
    w, x, y, z = unit.unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z),
        2 * (x * y - w * z),
        2 * (x * z + w * y),
        2 * (x * y + w * z),
        1 - 2 * (x * x + z * z),
        2 * (y * z - w * x),
        2 * (x * z - w * y),
        2 * (y * z + w * x),
        1 - 2 * (x * x + y * y),
    ]
    return torch.stack(rows, -1).reshape(-1, 3, 3)


def project(
    means: Float[Tensor, "g 3"],
    axes: Float[Tensor, "g 3 3"],
    opacity: Float[Tensor, " g"],
    w2c: Float[Tensor, "4 4"],
    intrinsics: Float[Tensor, "3 3"],
    width_px: int,
    height_px: int,
) -> Splats:
    """Project Gaussians whose covariance is `axes axes^T` into one view."""
    x, y, z = (means @ w2c[:3, :3].T + w2c[:3, 3]).unbind(-1)
    visible = (z > NEAR_M) & (opacity >= ALPHA_MIN)
    # Invisible Gaussians get a harmless depth, so that no gradient of theirs is 0 times infinity.
    z_safe = torch.where(z > NEAR_M, z, torch.ones_like(z))
    fx, fy, cx, cy = intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2]
    slope_x = _clamp_slope(x / z_safe, width_px, fx, cx)
    slope_y = _clamp_slope(y / z_safe, height_px, fy, cy)

    turned = w2c[:3, :3] @ axes
    u = (turned[:, 0] - slope_x[:, None] * turned[:, 2]) * (fx / z_safe)[:, None]
    v = (turned[:, 1] - slope_y[:, None] * turned[:, 2]) * (fy / z_safe)[:, None]
    c_xx, c_xy, c_yy = (u * u).sum(-1) + BLUR_PX2, (u * v).sum(-1), (v * v).sum(-1) + BLUR_PX2
    determinant = (c_xx * c_yy - c_xy * c_xy).clamp_min(DETERMINANT_MIN)
    with torch.no_grad():
        reach = 2.0 * torch.log((opacity / ALPHA_MIN).clamp_min(1.0))
        half = torch.stack([c_xx, c_yy], -1).mul(reach[:, None]).sqrt() * visible[:, None]
    return Splats(
        center_px=torch.stack([fx * x / z_safe + cx, fy * y / z_safe + cy], -1),
        conic=torch.stack([c_yy, -c_xy, c_xx], -1) / determinant[:, None],
        depth=z,
        half_px=half,
    )


def _clamp_slope(slope: Tensor, size_px: int, focal: Tensor, center: Tensor) -> Tensor:
    margin = FRUSTUM_MARGIN * 0.5 * size_px / focal
    return torch.minimum(torch.maximum(slope, -center / focal - margin), (size_px - center) / focal + margin)


def rasterize(
    means: Float[Tensor, "g 3"],
    quats_wxyz: Float[Tensor, "g 4"],
    scales: Float[Tensor, "g 3"],
    opacity: Float[Tensor, " g"],
    color: Float[Tensor, "g 3"],
    cameras: Cameras,
    background: Float[Tensor, "b 3"],
) -> tuple[Float[Tensor, "b 3 H W"], Float[Tensor, "b 1 H W"], Float[Tensor, "b 1 H W"]]:
    """Colour, alpha and alpha-weighted depth of all views, tile by tile."""
    axes = rotation_matrices(quats_wxyz) * scales[:, None, :]
    w2c, intrinsics = view_matrices(cameras, means), cameras.intrinsics.detach().to(means)
    size = (cameras.width_px, cameras.height_px)
    images = []
    for view in range(len(cameras)):
        splats = project(means, axes, opacity, w2c[view], intrinsics[view], *size)
        images.append(_composite_view(splats, opacity, color, background[view], *size))
    stacked = torch.stack(images)
    return stacked[:, :3], stacked[:, 4:], stacked[:, 3:4]


def _composite_view(
    splats: Splats, opacity: Tensor, color: Tensor, background: Tensor, width_px: int, height_px: int
) -> Float[Tensor, "5 H W"]:
    with torch.no_grad():
        first = torch.ceil(splats.center_px - splats.half_px - 0.5)
        last = torch.floor(splats.center_px + splats.half_px - 0.5)
        size = first.new_tensor([width_px, height_px])
        seen = (
            (splats.half_px > 0).all(-1)
            & (last >= 0).all(-1)
            & (first < size).all(-1)
            & (last >= first).all(-1)
        )
        kept = seen.nonzero().squeeze(-1)
        kept = kept[torch.argsort(splats.depth[kept], stable=True)]
        first_tile, last_tile = first[kept].div(TILE_PX).floor(), last[kept].div(TILE_PX).floor()
    shape = torch.cat([splats.center_px[kept], splats.conic[kept], opacity[kept, None]], -1)
    features = torch.cat([color[kept], splats.depth[kept, None]], -1)
    rows = []
    for tile_y in range(-(-height_px // TILE_PX)):
        row = []
        in_row = (first_tile[:, 1] <= tile_y) & (last_tile[:, 1] >= tile_y)
        for tile_x in range(-(-width_px // TILE_PX)):
            here = (in_row & (first_tile[:, 0] <= tile_x) & (last_tile[:, 0] >= tile_x)).nonzero().squeeze(-1)
            row.append(_composite_tile(shape[here], features[here], background, tile_x, tile_y))
        rows.append(torch.cat(row, -1))
    return torch.cat(rows, -2)[:, :height_px, :width_px]


def _composite_tile(
    shape: Float[Tensor, "n 6"], features: Float[Tensor, "n 4"], background: Tensor, tile_x: int, tile_y: int
) -> Float[Tensor, "5 s s"]:
    offsets = torch.arange(TILE_PX, dtype=shape.dtype, device=shape.device) + 0.5
    log_t = shape.new_zeros(
        TILE_PX * TILE_PX
    )  # with the Gaussian that closed the pixel: a closed pixel stays closed
    log_end = log_t  # without it
    image = shape.new_zeros(4, TILE_PX * TILE_PX)
    for start in range(0, shape.shape[0], CHUNK):
        mean_x, mean_y, c_xx, c_xy, c_yy, opacity = shape[start : start + CHUNK, :, None].unbind(1)
        dx, dy = offsets + tile_x * TILE_PX - mean_x, offsets + tile_y * TILE_PX - mean_y
        s = (0.5 * c_xx * dx * dx)[:, None, :] + (0.5 * c_yy * dy * dy)[:, :, None]
        s = (s + (c_xy * dx)[:, None, :] * dy[:, :, None]).flatten(1)
        alpha = (opacity * torch.exp(-s)).clamp_max(ALPHA_MAX)
        alpha = torch.where(alpha >= ALPHA_MIN, alpha, torch.zeros_like(alpha))
        log_pass = torch.log1p(-alpha)
        log_after = log_t + log_pass.cumsum(0)
        alive = (torch.exp(log_after) > TRANSMITTANCE_MIN).to(shape.dtype)
        weight = alpha * torch.exp(log_after - log_pass) * alive
        image = image + features[start : start + CHUNK].T @ weight
        log_end = log_end + (log_pass * alive).sum(0)
        log_t = log_after[-1]
        if not bool(alive[-1].any()):
            break
    t_end = torch.exp(log_end)
    rgb = image[:3] + background[:, None] * t_end
    return torch.cat([rgb, image[3:], (1 - t_end)[None]]).reshape(5, TILE_PX, TILE_PX)
