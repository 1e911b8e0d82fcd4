"""Ray-marching of a dense voxel grid of density logits and colours: reference (torch) | numba.

Samples of a ray lie at t_k = (k + jitter) step_m metres from the eye, for all whole k >= 0 inside the box. Voxels
are blended trilinearly before the activation. With the logit s, the colour c and the camera-z d of sample i:

    tau_i = step_m density_scale max(0, softplus(s_i) - softplus(EMPTY_LOGIT))     optical depth
    T_i = exp(-sum_{j <= i} tau_j)                                                 transmittance behind the sample
    C(T) = max(0, T - OPAQUE) / (1 - OPAQUE)
    w_i = C(T_{i-1}) - C(T_i)                                                      weight
    alpha = sum w_i    rgb = sum w_i c_i + (1 - alpha) background    depth = sum w_i d_i    normal = sum w_i n_i

Two cuts make marching cheap, and both are continuous, so twins and finite differences agree across them: space
below EMPTY_LOGIT is exactly empty (and passes no gradient), and a ray that is opaque but for OPAQUE ends there.
Against Beer-Lambert the second changes alpha by at most OPAQUE.
Source: Max 1995, Optical Models for Direct Volume Rendering; Sun et al. 2022, Direct Voxel Grid Optimization,
arXiv:2111.11215, section 4.1 (activation after the interpolation).
"""

import math
from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sds3d.interfaces import Cameras
from sds3d.ops import voxel_kernels as kernels
from sds3d.ops.backend import backend_for
from sds3d.ops.threads import run_tasks
from sds3d.ops.volume import camera_rays

EMPTY_LOGIT = -6.0
OPAQUE = 5e-3

_TABLE_PER_LOGIT = 64  # linear interpolation errs by less than 1e-5 of the transmittance
_TABLE_END = 26.0  # logits above behave like this one; its optical depth per cell is beyond any float32 image
_BRICK_SHIFT = 2  # bricks of 4 x 4 x 4 cells
_RAYS_PER_TASK = 1024
_GRADIENT_BUFFERS = 2  # fixed, whatever the number of threads: sums must not depend on it


@dataclass(frozen=True, kw_only=True)
class VoxelImage:
    """What b cameras see; differentiable in the grid and the background."""

    rgb: Float[Tensor, "b 3 H W"]  # composited over the background
    alpha: Float[Tensor, "b 1 H W"]  # [0, 1]
    depth: Float[Tensor, "b 1 H W"]  # alpha-weighted metres along the camera z axis
    normal: Float[Tensor, "b 3 H W"] | None  # alpha-weighted unit vectors, world frame


def march_voxels(
    grid: Float[Tensor, "D H W 4"],
    cameras: Cameras,
    background: Float[Tensor, "b 3"],
    *,
    half_extent: float,
    step_m: float,
    density_scale: float,
    jitter: Float[Tensor, "b h w"],
    with_normals: bool = False,
) -> VoxelImage:
    """Renders grid[z, y, x] = (density logit, r, g, b), whose outermost voxels lie at +- half_extent metres.

    `density_scale` is the density (1/m) of softplus(logit) = 1; `jitter` in [0, 1) shifts the samples of each ray
    by that share of a step. Normals are n = -grad(logit) / |grad(logit)|, which is constant in no cell but jumps
    between cells. On the CPU in float32 compiled kernels run, else plain torch.
    """
    if backend_for(grid) != "numba" or grid.dtype != torch.float32:
        march = march_voxels_reference
        return march(grid, cameras, background, half_extent, step_m, density_scale, jitter, with_normals)
    views = _views(cameras, grid.shape, half_extent)
    settings = (np.float32(step_m), float(step_m * density_scale), with_normals)
    rgb, alpha, depth, normal = _March.apply(grid, background, jitter, views, settings)
    return VoxelImage(rgb=rgb, alpha=alpha, depth=depth, normal=normal if with_normals else None)


def march_voxels_reference(
    grid: Float[Tensor, "D H W 4"],
    cameras: Cameras,
    background: Float[Tensor, "b 3"],
    half_extent: float,
    step_m: float,
    density_scale: float,
    jitter: Float[Tensor, "b h w"],
    with_normals: bool,
) -> VoxelImage:
    """The twin in plain torch, for any device and dtype: every sample of every ray, one view after the other."""
    origins, directions, cosine = camera_rays(
        cameras.c2w.to(grid), cameras.intrinsics.to(grid), cameras.width_px, cameras.height_px
    )
    images = []
    for view in range(len(cameras)):
        o, d = origins[view], directions[view]
        near, far = _box_interval(o, d, half_extent)
        hit = far >= near
        if bool(hit.any()):
            first, last = (int(edge / step_m) for edge in (near[hit].min(), far[hit].max()))
        else:
            first, last = 0, 0
        k = torch.arange(first, last + 1, device=grid.device, dtype=grid.dtype)
        t = (k + jitter[view, ..., None].to(grid)) * step_m
        points = (o[..., None, :] + t[..., None] * d[..., None, :]) / half_extent
        inside = (t >= near[..., None]) & (t <= far[..., None])
        values = _blend(grid, points)
        live = inside & ~(values[..., 0] <= EMPTY_LOGIT)
        excess = F.softplus(values[..., 0]) - math.log1p(math.exp(EMPTY_LOGIT))
        tau = torch.where(live, excess * (step_m * density_scale), torch.zeros_like(t))
        behind = torch.exp(-tau.cumsum(-1))
        before = torch.cat([torch.ones_like(behind[..., :1]), behind[..., :-1]], -1)
        weights = (_clear(before) - _clear(behind))[..., None]
        layers = [values[..., 1:], (t * cosine[view][..., None])[..., None]]
        if with_normals:
            layers.append(_reference_normals(grid, points, half_extent, live))
        sums = (weights * torch.cat([layer.to(grid) for layer in layers], -1)).sum(-2)
        alpha = weights.sum(-2)
        sums = torch.cat([sums[..., :3] + (1 - alpha) * background[view].to(grid), alpha, sums[..., 3:]], -1)
        images.append(sums.permute(2, 0, 1))
    image = torch.stack(images)
    return VoxelImage(
        rgb=image[:, :3],
        alpha=image[:, 3:4],
        depth=image[:, 4:5],
        normal=image[:, 5:8] if with_normals else None,
    )


def _box_interval(
    origins: Float[Tensor, "h w 3"], directions: Float[Tensor, "h w 3"], half: float
) -> tuple[Float[Tensor, "h w"], Float[Tensor, "h w"]]:
    inverse = 1 / torch.where(directions.abs() > 1e-9, directions, torch.full_like(directions, 1e-9))
    a, b = (-half - origins) * inverse, (half - origins) * inverse
    return torch.minimum(a, b).amax(-1).clamp_min(0), torch.maximum(a, b).amin(-1)


def _blend(grid: Float[Tensor, "D H W 4"], points: Float[Tensor, "h w k 3"]) -> Float[Tensor, "h w k 4"]:
    """Trilinear values at points in [-1, 1]."""
    volume = grid.permute(3, 0, 1, 2)[None]
    values = F.grid_sample(volume, points[None], padding_mode="border", align_corners=True)
    return values[0].permute(1, 2, 3, 0)


def _clear(transmittance: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    return (transmittance - OPAQUE).clamp_min(0) / (1 - OPAQUE)


def _reference_normals(
    grid: Float[Tensor, "D H W 4"], points: Float[Tensor, "h w k 3"], half: float, live: Tensor
) -> Float[Tensor, "h w k 3"]:
    """Unit vectors against the slope of the logit within each cell; zero where a sample is not `live`."""
    size = torch.tensor(grid.shape[2::-1], device=grid.device)
    place = (points[live] + 1) / 2 * (size - 1)
    cell = place.long().clamp_min(0).minimum(size - 2)
    f = place - cell
    offsets = torch.tensor([[i & 1, i >> 1 & 1, i >> 2] for i in range(8)], device=grid.device)
    x, y, z = (cell[:, None] + offsets).unbind(-1)
    logits = grid[z, y, x, 0]  # n 8
    side = torch.where(offsets.bool(), f[:, None], 1 - f[:, None])  # n 8 3
    sign = (2 * offsets - 1).to(grid)
    wx, wy, wz = side.unbind(-1)
    slope = torch.stack([wy * wz, wx * wz, wx * wy], -1) * sign * logits[..., None]
    slope = slope.sum(1) * (size - 1) / (2 * half)
    normals = -slope / (slope.square().sum(-1, keepdim=True) + 1e-12).sqrt()
    return torch.zeros_like(points).index_put((live,), normals)


def _views(cameras: Cameras, shape: torch.Size, half: float) -> np.ndarray:
    """Cameras in cells, as `voxel_kernels.py` wants them (b 19)."""
    per_m = (np.array(shape[2::-1]) - 1) / (2 * half)
    c2w = cameras.c2w.detach().double().cpu().numpy()
    k = cameras.intrinsics.detach().double().cpu().numpy()
    b = len(cameras)
    eye = (c2w[:, :3, 3] + half) * per_m
    axes = [c2w[:, :3, axis] * per_m for axis in (2, 0, 1)]
    lens = np.stack([1 / k[:, 0, 0], 1 / k[:, 1, 1], k[:, 0, 2], k[:, 1, 2]], 1)
    return np.concatenate([eye, *axes, lens, np.tile(per_m, (b, 1))], 1).astype(np.float32)


@lru_cache(maxsize=8)
def _table(depth_scale: float) -> np.ndarray:
    """Rows (exp(-tau), its step, d(tau)/d(logit), its step) on a lattice of logits from EMPTY_LOGIT up."""
    logit = EMPTY_LOGIT + np.arange(int((_TABLE_END - EMPTY_LOGIT) * _TABLE_PER_LOGIT) + 2) / _TABLE_PER_LOGIT
    tau = depth_scale * (np.logaddexp(0, logit) - np.logaddexp(0, EMPTY_LOGIT))
    columns = np.exp(-tau), depth_scale / (1 + np.exp(-logit))
    rows = [column for values in columns for column in (values[:-1], np.diff(values))]
    return np.stack(rows, 1).astype(np.float32)


def _leaps(flat: np.ndarray, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Chessboard distances (in bricks) to matter, and the box around all matter in cells (x y z, x y z)."""
    leap = np.zeros([(n - 2 >> _BRICK_SHIFT) + 1 for n in shape], np.uint8)
    kernels.mark_bricks(flat, *shape, _BRICK_SHIFT, np.float32(EMPTY_LOGIT), leap)
    full = np.argwhere(leap == 0)
    if len(full) == 0:
        return leap, np.full(6, -1e6, np.float32)
    kernels.chessboard(leap)
    low, high = full.min(0) << _BRICK_SHIFT, full.max(0) + 1 << _BRICK_SHIFT
    high = np.minimum(high, np.array(shape) - 1)
    return leap, np.concatenate([low[::-1], high[::-1]]).astype(np.float32)


# Fresh pages from the system would cost more than the samples written to them, so tapes are used again.
_idle_tapes: deque[np.ndarray] = deque(maxlen=64)


class _Tape:
    """Memory for the samples of one task, lent until the graph that needs it is gone."""

    def __init__(self, rows: int) -> None:
        try:
            self.rows = _idle_tapes.pop()
        except IndexError:
            self.rows = np.zeros((0, kernels.TAPE_COLUMNS), np.float32)
        if len(self.rows) < rows:
            # The bound is generous, but only memory that samples are written to is ever touched.
            self.rows = np.empty((rows, kernels.TAPE_COLUMNS), np.float32)  # noqa: TID251

    def __del__(self) -> None:
        _idle_tapes.append(self.rows)


class _March(torch.autograd.Function):
    """The compiled march. Keeps one tape of samples per task, so the backward pass never looks at empty space."""

    @staticmethod
    def forward(ctx: Any, grid: Tensor, background: Tensor, jitter: Tensor, views: Any, settings: Any) -> Any:
        step, depth_scale, with_normals = settings
        b, height, width = jitter.shape
        shape = (grid.shape[0], grid.shape[1], grid.shape[2])
        # .detach() so that numpy accepts it; kernels only read.
        flat = grid.detach().contiguous().numpy().reshape(-1)
        behind = background.detach().float().contiguous().numpy()
        shifts = jitter.detach().float().contiguous().numpy()
        leap, box = _leaps(flat, shape)
        rgb = np.zeros((b, 3, height, width), np.float32)
        alpha, depth = (np.zeros((b, 1, height, width), np.float32) for _ in range(2))
        normal = np.zeros((b, 3, height, width) if with_normals else (b, 3, 0, 0), np.float32)
        counts = np.zeros((b, height, width), np.int32)
        recording = any(ctx.needs_input_grad[:2])
        rows = max(1, _RAYS_PER_TASK // width)
        diagonal = 2 * math.sqrt(
            sum(((n - 1) / p) ** 2 for n, p in zip(shape[::-1], views[0, 16:], strict=True))
        )
        most = rows * width * (int(diagonal / step) + 2)
        nowhere = np.zeros((0, kernels.TAPE_COLUMNS), np.float32)
        bands, tasks = [], []
        for view in range(b):
            for row in range(0, height, rows):
                tape = _Tape(most) if recording else None
                band = (row, min(row + rows, height))
                bands.append((view, band, tape))
                tasks.append(
                    (flat, *shape, leap, _BRICK_SHIFT, box, views[view], step, _table(depth_scale),
                     np.float32(_TABLE_PER_LOGIT), np.float32(EMPTY_LOGIT), np.float32(OPAQUE), shifts[view],
                     behind[view], *band, rgb[view], alpha[view], depth[view], normal[view],
                     nowhere if tape is None else tape.rows, counts[view])
                )  # fmt: skip
        run_tasks(kernels.march_forward, tasks)
        ctx.kept = (flat, shape, views, behind, counts, bands)
        images = tuple(torch.from_numpy(image) for image in (rgb, alpha, depth, normal))
        ctx.save_for_backward(images[1])
        return images

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        flat, shape, views, behind, counts, bands = ctx.kept
        (alpha,) = ctx.saved_tensors
        d_rgb, d_alpha, d_depth, d_normal = (g.float().contiguous().numpy() for g in gradients)
        sums = np.zeros((_GRADIENT_BUFFERS, flat.size), np.float32)

        def accumulate(index: int) -> None:
            for view, band, tape in bands[index::_GRADIENT_BUFFERS]:
                kernels.march_backward(  # type: ignore[call-arg]
                    flat, *shape, views[view], np.float32(OPAQUE), behind[view], *band, counts[view], tape.rows,
                    d_rgb[view], d_alpha[view], d_depth[view], d_normal[view], sums[index],
                )  # fmt: skip

        d_background = None
        if ctx.needs_input_grad[0]:
            run_tasks(accumulate, [(index,) for index in range(_GRADIENT_BUFFERS)])
        if ctx.needs_input_grad[1]:
            d_background = ((1 - alpha) * gradients[0]).sum((2, 3))
        for extra in sums[1:]:
            sums[0] += extra
        d_grid = torch.from_numpy(sums[0].reshape(*shape, 4))
        return d_grid, d_background, None, None, None
