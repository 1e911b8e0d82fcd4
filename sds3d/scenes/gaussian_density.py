"""From Gaussians to a solid: what is hidden from every side, and the colour at points.

Trained Gaussians form a cloudy shell around nothing: an iso-surface of their density is torn and has two sides. What
they do show reliably is how opaque they are from outside. Hence, as in Gaussian Opacity Fields (Yu et al. 2024,
arXiv:2404.10772), a point is solid to the degree that matter hides it from wherever one looks:

    O(x) = min_v (1 - T_v(x)),   T_v(x) = exp(-optical depth between x and the viewer v)

O is near 0 wherever some view sees the point and near 1 inside, however thin the shell and empty the inside. At the
rim of a silhouette, where a ray is half opaque in all, its middle is hidden by O = 1 - sqrt(1/2) from either end:
that is the level of the surface. Instead of the smallest value the third smallest is taken, so that one leak does not
dig a tunnel. Views from far below are left out: training hardly looks there, and
what it never saw shall stay closed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numba import njit
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

from sds3d.interfaces import Cameras
from sds3d.ops.splat import rasterize_gaussians
from sds3d.ops.splat_reference import (
    ALPHA_MAX,
    ALPHA_MIN,
    BLUR_PX2,
    project,
    rotation_matrices,
    view_matrices,
)
from sds3d.ops.threads import run_tasks, thread_count

Floats = NDArray[np.float32]
_RANK = 3  # of the views, ordered by what they see, the one that decides
_ELEVATIONS_DEG = (-10.0, 12.0, 35.0, 60.0)
_AZIMUTHS = 9  # per elevation
_SLAB = 8  # planes of a lattice per task
_REACH = 3.0  # standard deviations along the view axis
_NEIGHBOURS = 32  # 8 leave single Gaussians showing as speckles: 3 dB worse
_HIDDEN_SHARE = 0.05  # Gaussians that show less than this are no part of the surface


@njit(nogil=True, cache=True, error_model="numpy")
def _column_constants(covariance, blur, cell):  # type: ignore[no-untyped-def]
    """Of one Gaussian seen along z: inverse image covariance, slopes dz/dx and dz/dy, depth spread, box sides."""
    xx, xy, yy = covariance[0, 0] + blur, covariance[0, 1], covariance[1, 1] + blur
    xz, yz, zz = covariance[0, 2], covariance[1, 2], covariance[2, 2]
    det = xx * yy - xy * xy
    a, b, c = yy / det, -xy / det, xx / det
    slope_x, slope_y = a * xz + b * yz, b * xz + c * yz
    spread = math.sqrt(max(zz - slope_x * xz - slope_y * yz, 0.0) + 0.25 * cell * cell)
    return a, b, c, slope_x, slope_y, spread, math.sqrt(xx), math.sqrt(yy)


@njit(nogil=True, cache=True, error_model="numpy")
def _hide_slab(first, last, means, covariances, opacity, blur, half, cell, hidden):  # type: ignore[no-untyped-def]
    """hidden[i, j, k] = 1 - T at lattice points, seen along +k; planes i of first..last."""
    side = hidden.shape[1]
    for g in range(means.shape[0]):
        reach = 2.0 * math.log(max(opacity[g] / ALPHA_MIN, 1.0))
        a, b, c, slope_x, slope_y, spread, size_x, size_y = _column_constants(covariances[g], blur, cell)
        reach_x, reach_y = math.sqrt(reach) * size_x, math.sqrt(reach) * size_y
        i0 = max(math.ceil((means[g, 0] - reach_x + half) / cell), first)
        i1 = min(math.floor((means[g, 0] + reach_x + half) / cell), last - 1)
        j0 = max(math.ceil((means[g, 1] - reach_y + half) / cell), 0)
        j1 = min(math.floor((means[g, 1] + reach_y + half) / cell), side - 1)
        for i in range(i0, i1 + 1):
            dx = i * cell - half - means[g, 0]
            for j in range(j0, j1 + 1):
                dy = j * cell - half - means[g, 1]
                distance = a * dx * dx + 2.0 * b * dx * dy + c * dy * dy
                if distance > reach:
                    continue
                alpha = min(opacity[g] * math.exp(-0.5 * distance), ALPHA_MAX)
                depth = -math.log(1.0 - alpha) * cell / (math.sqrt(2.0 * math.pi) * spread)
                z = means[g, 2] + slope_x * dx + slope_y * dy + half
                k0 = max(math.ceil((z - _REACH * spread) / cell), 0)
                k1 = min(math.floor((z + _REACH * spread) / cell), side - 1)
                for k in range(k0, k1 + 1):
                    u = (k * cell - z) / spread
                    hidden[i, j, k] += depth * math.exp(-0.5 * u * u)
    for i in range(first, last):
        for j in range(side):
            before = 0.0
            for k in range(side):
                here = hidden[i, j, k]
                hidden[i, j, k] = 1.0 - math.exp(-(before + 0.5 * here))
                before += here


@njit(nogil=True, cache=True, error_model="numpy")
def _rank_slab(first, last, turn, half, cell, hidden, least):  # type: ignore[no-untyped-def]
    """Sort what this view sees at world points (planes first..last) into their ascending `least` values."""
    side = hidden.shape[0]
    for i in range(first, last):
        for j in range(side):
            for k in range(side):
                x, y, z = i * cell - half, j * cell - half, k * cell - half
                u = (turn[0, 0] * x + turn[0, 1] * y + turn[0, 2] * z + half) / cell
                v = (turn[1, 0] * x + turn[1, 1] * y + turn[1, 2] * z + half) / cell
                w = (turn[2, 0] * x + turn[2, 1] * y + turn[2, 2] * z + half) / cell
                value = 0.0
                # Outside the view's box lies nothing: the box holds a ball that holds all Gaussians.
                if 0.0 <= u < side - 1 and 0.0 <= v < side - 1 and 0.0 <= w < side - 1:
                    value = _trilinear(hidden, u, v, w)
                elif 0.0 <= u < side - 1 and 0.0 <= v < side - 1 and w >= side - 1:
                    value = hidden[int(u + 0.5), int(v + 0.5), side - 1]
                for rank in range(least.shape[3]):
                    if value < least[i, j, k, rank]:
                        least[i, j, k, rank], value = value, least[i, j, k, rank]


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _trilinear(values, u, v, w):  # type: ignore[no-untyped-def]
    i, j, k = int(u), int(v), int(w)
    u, v, w = u - i, v - j, w - k
    low = (values[i, j, k] * (1 - u) + values[i + 1, j, k] * u) * (1 - v)
    low += (values[i, j + 1, k] * (1 - u) + values[i + 1, j + 1, k] * u) * v
    high = (values[i, j, k + 1] * (1 - u) + values[i + 1, j, k + 1] * u) * (1 - v)
    high += (values[i, j + 1, k + 1] * (1 - u) + values[i + 1, j + 1, k + 1] * u) * v
    return low * (1 - w) + high * w


def solid_lattice(
    means: Float[Tensor, "g 3"],
    quats_wxyz: Float[Tensor, "g 4"],
    scales: Float[Tensor, "g 3"],
    opacity: Float[Tensor, " g"],
    *,
    half_extent: float,
    cells_per_side: int,
    blur_m: float,
) -> Float[Tensor, "n n n"]:
    """O in [0, 1] at n = cells + 1 points per side of the cube [-half_extent, half_extent]^3, axes x, y, z.

    `blur_m` is the standard deviation that rendering adds to a splat; the ball of radius `half_extent` must hold
    all Gaussians.
    """
    cell = 2 * half_extent / cells_per_side
    seen = (opacity >= ALPHA_MIN).nonzero().squeeze(-1)
    m, s, o = (value.detach()[seen].cpu().double() for value in (means, scales, opacity))
    axes = rotation_matrices(quats_wxyz.detach()[seen].cpu().double()) * s[:, None, :]
    side = cells_per_side + 1
    least = np.full((side, side, side, _RANK), 1.0, np.float32)
    slabs = [(first, min(first + _SLAB, side)) for first in range(0, side, _SLAB)]
    for turn in _view_frames():
        turned = turn @ axes
        covariance = turned @ turned.transpose(1, 2)
        hidden = np.zeros((side, side, side), np.float32)
        arrays = ((m @ turn.T).numpy(), covariance.numpy(), o.numpy(), blur_m**2, half_extent, cell, hidden)
        run_tasks(_hide_slab, [(*slab, *arrays) for slab in slabs])
        run_tasks(_rank_slab, [(*slab, turn.numpy(), half_extent, cell, hidden, least) for slab in slabs])
    return torch.from_numpy(least[..., _RANK - 1].copy())


@dataclass(frozen=True)
class Palette:
    """Gaussians that can be asked for the colour at a point of their surface."""

    tree: cKDTree
    means: Float[Tensor, "g 3"]
    whiten: Float[Tensor, "g 3 3"]  # world offsets to standard deviations, as wide as rendering makes them
    log_weight: Float[Tensor, " g"]
    color: Float[Tensor, "g 3"]

    def colors_at(self, points: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
        """Mean colour of the nearest Gaussians, weighted by opacity, visibility and density at the point."""
        count = min(_NEIGHBOURS, len(self.means))
        ranks = list(range(1, count + 1))
        nearest = self.tree.query(points.detach().cpu().numpy(), k=ranks, workers=thread_count())[1]
        index = torch.from_numpy(nearest).to(self.means.device)
        away = (self.whiten[index] @ (points[:, None] - self.means[index])[..., None]).squeeze(-1)
        # A softmax of logarithms: far from every Gaussian the nearest one still counts.
        weight = torch.softmax(self.log_weight[index] - 0.5 * away.square().sum(-1), -1)
        return (weight[..., None] * self.color[index]).sum(1)


def make_palette(
    means: Float[Tensor, "g 3"],
    quats_wxyz: Float[Tensor, "g 4"],
    scales: Float[Tensor, "g 3"],
    opacity: Float[Tensor, " g"],
    color: Float[Tensor, "g 3"],
    pixel_m: float,
) -> Palette:
    """The palette of what can be seen: hidden Gaussians keep whatever colour they once had, and must not show."""
    visible = seen_share(means, quats_wxyz, scales, opacity, pixel_m)
    kept = visible > _HIDDEN_SHARE
    if not bool(kept.any()):
        kept = torch.ones_like(kept)
    m, q, s, o, c = (value.detach()[kept] for value in (means, quats_wxyz, scales, opacity, color))
    return Palette(
        tree=cKDTree(m.cpu().numpy()),
        means=m,
        whiten=rotation_matrices(q).transpose(1, 2) / (s.square() + BLUR_PX2 * pixel_m**2).sqrt()[:, :, None],
        log_weight=torch.log(o * visible[kept].clamp_min(_HIDDEN_SHARE)),
        color=c,
    )


def seen_share(
    means: Float[Tensor, "g 3"],
    quats_wxyz: Float[Tensor, "g 4"],
    scales: Float[Tensor, "g 3"],
    opacity: Float[Tensor, " g"],
    pixel_m: float,
) -> Float[Tensor, " g"]:
    """How much of each Gaussian shows in its third best view, from 0 (hidden) to about 1 (nothing in front).

    sum_pixels w_i / sum_pixels a_i; the numerator is the derivative of the image's sum by the Gaussian's colour, the
    denominator the splat's integral o 2 pi sqrt(det C).
    """
    fixed = [value.detach() for value in (means, quats_wxyz, scales, opacity)]
    m, q, s, o = fixed
    radius = max(float(m.norm(dim=-1).max()), 1e-3)
    px = int(min(max(2.2 * radius / pixel_m, 32), 256))
    axes = rotation_matrices(q) * s[:, None, :]
    shares = []
    for turn in _view_frames():
        camera = _far_camera(turn.to(m), radius, px)
        white = torch.ones_like(m).requires_grad_(True)
        with torch.enable_grad():
            image = rasterize_gaussians(m, q, s, o, white, camera, m.new_zeros(1, 3))
            (shown,) = torch.autograd.grad(image.rgb[:, 0].sum(), white)
        w2c = view_matrices(camera, m)[0]
        conic = project(m, axes, o, w2c, camera.intrinsics[0], px, px).conic
        area = 2 * math.pi / (conic[:, 0] * conic[:, 2] - conic[:, 1].square()).clamp_min(1e-12).sqrt()
        shares.append(shown[:, 0] / (o * area).clamp_min(1e-12))
    return torch.stack(shares).sort(0, descending=True).values[_RANK - 1]


def _far_camera(turn: Float[Tensor, "3 3"], radius: float, px: int) -> Cameras:
    """A camera far enough to be nearly parallel, that sees the ball of this radius."""
    distance = 20 * radius
    c2w = torch.eye(4).to(turn)[None].clone()
    c2w[0, :3, :3] = turn.T
    c2w[0, :3, 3] = -distance * turn[2]
    focal = 0.5 * px * distance / (1.1 * radius)
    intrinsics = torch.tensor([[[focal, 0, px / 2], [0, focal, px / 2], [0, 0, 1]]]).to(turn)
    one = torch.ones(1).to(turn)
    fov = 2 * math.degrees(math.atan(0.5 * px / focal))
    return Cameras(
        c2w=c2w,
        intrinsics=intrinsics,
        width_px=px,
        height_px=px,
        azimuth_deg=one * 0,
        elevation_deg=one * 0,
        radius=one * distance,
        fov_deg=one * fov,
    )


def _view_frames() -> Iterator[Float[Tensor, "3 3"]]:
    """World-to-view rotations (rows: right, down, forward) of parallel views from all around and from above."""
    directions = [(0.0, 89.0)]
    for row, elevation in enumerate(_ELEVATIONS_DEG):
        # Rows are staggered, so that no two views share an azimuth.
        directions += [
            (360.0 * (i + row / len(_ELEVATIONS_DEG)) / _AZIMUTHS, elevation) for i in range(_AZIMUTHS)
        ]
    for azimuth, elevation in directions:
        a, e = math.radians(azimuth), math.radians(elevation)
        forward = torch.tensor(
            [-math.sin(a) * math.cos(e), -math.sin(e), -math.cos(a) * math.cos(e)], dtype=torch.float64
        )
        right = torch.tensor([math.cos(a), 0.0, -math.sin(a)], dtype=torch.float64)
        yield torch.stack([right, torch.linalg.cross(forward, right), forward])
