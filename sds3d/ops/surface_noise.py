"""Gaussian noise that sticks to a surface: one view is exactly white, two views of one patch agree.

World space is cut into cubic cells, and every cell A and channel has a standard normal number W(A). A pixel p looks at
the surface through samples j on a regular sub-grid; it owns the cells whose centre it sees, and sums over the samples
Omega_p that hit those:

    G(p) = sum_{j in Omega_p} W(A_j) / sqrt(#{(j, l) in Omega_p^2 : A_j = A_l})

No cell has two owners in one view, so the pixels of a view are independent, and the denominator is the exact standard
deviation of the sum. Another view of the same patch sums over nearly the same cells. Front and back, and all surfaces
further apart than a cell, hold different cells. Pixels that see no surface are cells of their own, the same in all
views.

W needs no memory. It is a function of the cell, a seed, and an age tau that stands for slow renewal:

    W(A) = sqrt(-2 ln u) cos(2 pi v + omega tau),    u, v uniform, omega standard Cauchy, all hashed from (A, seed)

At every age this is Box and Muller's normal number (the sine is a second channel), and since
E cos(omega tau) = exp(-|tau|), the covariance over time is exp(-|tau - tau'|): that of
eps <- sqrt(1 - gamma) eps + sqrt(gamma) n where every step ages by -ln(1 - gamma) / 2.

The idea of summing texture cells per pixel is from Yan et al. 2025 (CFD, arXiv:2501.05445); the cells, their owners
and the renewal are our own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sds3d.errors import BackendError
from sds3d.interfaces import Cameras
from sds3d.ops.backend import backend_for
from sds3d.ops.surface_noise_numba import (
    GOLDEN,
    KEY_BITS,
    KEY_HALF,
    KEY_MASK,
    LOW_32,
    LOW_53,
    draw_pixels,
    draw_view,
    mix,
)
from sds3d.ops.threads import run_tasks

_mix_tensor = cast(Callable[[Tensor], Tensor], mix.py_func)


def _lattice() -> Float[Tensor, "3 3"]:
    """A rotation of the cell lattice that no modelled plane is parallel to.

    A face that lies exactly between two layers of cells would flicker between them.
    """
    w, x, y, z = np.array([1.0, 2**0.5 - 1, 3**0.5 - 1, 5**0.5 - 2]) / np.linalg.norm(
        [1.0, 2**0.5 - 1, 3**0.5 - 1, 5**0.5 - 2]
    )
    return torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ],
        dtype=torch.float64,
    )


LATTICE = _lattice()


@dataclass(frozen=True, kw_only=True)
class Views:
    """b cameras and what they see, in float64: lengths in cells, image coordinates in pixels of the noise."""

    near: Float[
        Tensor, "b H W"
    ]  # inverse depth of the surface at the pixels of the render, 0 where there is none
    tilt_x: Float[Tensor, "b H W"]  # its slopes to the right and down, per pixel of the render
    tilt_y: Float[Tensor, "b H W"]
    turn: Float[Tensor, "b 3 3"]  # camera axes to lattice axes
    origin: Float[Tensor, "b 3"]  # camera centre in the lattice
    lens: Float[Tensor, "b 4"]  # fx fy cx cy
    ray_x: Float[Tensor, "b N"]  # x / z of every column of samples, y / z of every row
    ray_y: Float[Tensor, "b M"]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Where the samples lie in the render: pixel, and offset from its centre, by column and by row."""

    u_pixel: Int[Tensor, " N"]
    v_pixel: Int[Tensor, " M"]
    u_rest: Float[Tensor, " N"]
    v_rest: Float[Tensor, " M"]


def _samples(
    noise_px: int, render_px: int, samples: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Along one side: position in pixels of the noise, pixel of the render, offset from that pixel's centre."""
    at = (torch.arange(noise_px * samples, device=device, dtype=torch.float64) + 0.5) / samples
    in_render = at * (render_px / noise_px)
    pixel = in_render.long()
    return at, pixel, in_render - pixel - 0.5


def _slope(near: Float[Tensor, "b H W"], dim: int) -> Float[Tensor, "b H W"]:
    """The smaller of the two one-sided differences along `dim`; values of 0 are no neighbours."""
    first, second = near.narrow(dim, 0, near.shape[dim] - 1), near.narrow(dim, 1, near.shape[dim] - 1)
    step = torch.where((first > 0) & (second > 0), second - first, math.inf)
    none = torch.full_like(near.narrow(dim, 0, 1), math.inf)
    forth, back = torch.cat([step, none], dim), torch.cat([none, step], dim)
    slope = torch.where(forth.abs() < back.abs(), forth, back)
    return torch.where(slope.isfinite(), slope, 0.0)


def _prepare(
    depth: Float[Tensor, "b H W"], cameras: Cameras, height: int, width: int, cell_m: float, samples: int
) -> tuple[Views, Grid]:
    """What both twins share: cameras and samples."""
    c2w = cameras.c2w.to(depth.device, torch.float64)
    intrinsics = cameras.intrinsics.to(depth.device, torch.float64)
    lattice = LATTICE.to(depth.device)
    across, down = width / cameras.width_px, height / cameras.height_px
    fx, cx = intrinsics[:, 0, 0] * across, intrinsics[:, 0, 2] * across
    fy, cy = intrinsics[:, 1, 1] * down, intrinsics[:, 1, 2] * down
    near = torch.where(depth > 0, cell_m / depth.double(), 0.0)
    x, u_pixel, u_rest = _samples(width, depth.shape[2], samples, depth.device)
    y, v_pixel, v_rest = _samples(height, depth.shape[1], samples, depth.device)
    views = Views(
        near=near,
        tilt_x=_slope(near, 2),
        tilt_y=_slope(near, 1),
        turn=lattice @ c2w[:, :3, :3],
        origin=c2w[:, :3, 3] @ lattice.T / cell_m,
        lens=torch.stack([fx, fy, cx, cy], dim=1),
        ray_x=(x - cx[:, None]) / fx[:, None],
        ray_y=(y - cy[:, None]) / fy[:, None],
    )
    return views, Grid(u_pixel=u_pixel, v_pixel=v_pixel, u_rest=u_rest, v_rest=v_rest)


@torch.no_grad()
def surface_noise(
    depth: Float[Tensor, "b H W"],
    cameras: Cameras,
    shape: tuple[int, int, int],
    *,
    cell_m: float,
    samples: int = 3,
    seed: int = 0,
    age: float = 0.0,
) -> tuple[Float[Tensor, "b c h w"], Bool[Tensor, "b h w"]]:
    """G(p) for `shape` = (c, h, w) and every view, and where it comes from the surface; float32.

    `depth` is the surface's distance along the camera z axis in metres, 0 where there is none; its size need not be
    that of the noise. Between its pixel centres the surface is a plane per pixel, with the smaller of the two slopes
    to the neighbours, so that silhouettes are not stretched. `cell_m` is the side of a cell, `samples` the number of
    samples along a pixel's side.
    """
    views, grid = _prepare(depth, cameras, shape[1], shape[2], cell_m, samples)
    backend = backend_for(depth)
    if backend == "numba":
        return _numba(views, grid, shape, seed, age)
    if backend in ("reference", "cuda"):
        return _torch(views, grid, shape, seed, age)
    raise BackendError(f"surface_noise has no backend {backend!r}; it has reference, numba, cuda")


def _numba(
    views: Views, grid: Grid, shape: tuple[int, int, int], seed: int, age: float
) -> tuple[Float[Tensor, "b c h w"], Bool[Tensor, "b h w"]]:
    pixels = np.zeros(shape, np.float32)
    draw_pixels(seed, age, pixels)
    noise = np.repeat(pixels[None], len(views.near), axis=0)
    covered = np.zeros((len(noise), *shape[1:]), np.bool_)
    own = zip(*(part.contiguous().numpy() for part in vars(views).values()), strict=True)
    shared = [part.numpy() for part in vars(grid).values()]
    run_tasks(
        draw_view,
        [(*parts, *shared, seed, age, noise[view], covered[view]) for view, parts in enumerate(own)],
    )
    return torch.from_numpy(noise), torch.from_numpy(covered)


def _torch(
    views: Views, grid: Grid, shape: tuple[int, int, int], seed: int, age: float
) -> tuple[Float[Tensor, "b c h w"], Bool[Tensor, "b h w"]]:
    """The reference twin; also what runs on CUDA."""
    channels, height, width = shape
    key, owned = (_per_pixel(part, height, width) for part in _cells(views, grid, height, width))
    same = (key[..., :, None] == key[..., None, :]) & owned[..., :, None] & owned[..., None, :]
    pairs = same.sum((-2, -1))
    covered = pairs > 0
    values = torch.where(owned[..., None], _normal(key, channels, seed, age), 0.0)
    surface = values.sum(-2) / pairs.clamp(min=1).double().sqrt()[..., None]
    pixel = -1 - torch.arange(height * width, device=key.device).reshape(1, height, width)
    noise = torch.where(covered[..., None], surface, _normal(pixel, channels, seed, age))
    return noise.permute(0, 3, 1, 2).float().contiguous(), covered


def _cells(
    views: Views, grid: Grid, height: int, width: int
) -> tuple[Int[Tensor, "b M N"], Bool[Tensor, "b M N"]]:
    """Key of the cell that each sample hits, and whether the sample's pixel owns it."""
    at = (slice(None), grid.v_pixel[:, None], grid.u_pixel[None])
    inverse = views.near[at] + grid.u_rest * views.tilt_x[at] + grid.v_rest[:, None] * views.tilt_y[at]
    hit = (views.near[at] > 0) & (inverse > 0)
    z = 1.0 / torch.where(hit, inverse, 1.0)
    x, y = views.ray_x[:, None] * z, views.ray_y[:, :, None] * z
    turn, origin = views.turn[..., None, None], views.origin[..., None, None]
    cell = [
        (turn[:, i, 0] * x + turn[:, i, 1] * y + turn[:, i, 2] * z + origin[:, i]).floor() for i in range(3)
    ]
    # The pixel that sees the centre of a cell owns the cell.
    da, db, dc = (cell[i] + 0.5 - origin[:, i] for i in range(3))
    x, y, depth = (turn[:, 0, i] * da + turn[:, 1, i] * db + turn[:, 2, i] * dc for i in range(3))
    ahead = depth > 0
    depth = torch.where(ahead, depth, 1.0)
    fx, fy, cx, cy = (views.lens[:, i, None, None] for i in range(4))
    column = torch.arange(width, device=x.device).repeat_interleave(x.shape[2] // width)
    row = torch.arange(height, device=x.device).repeat_interleave(x.shape[1] // height)
    owned = hit & ahead & ((x / depth * fx + cx).floor() == column)
    owned = owned & ((y / depth * fy + cy).floor() == row[:, None])
    a, b, c = ((part.long() + KEY_HALF) & KEY_MASK for part in cell)
    return (a << (2 * KEY_BITS)) | (b << KEY_BITS) | c, owned


def _per_pixel(part: Tensor, height: int, width: int) -> Tensor:
    """(b, h s, w s) to (b, h, w, s s)."""
    tiles = part.unflatten(2, (width, -1)).unflatten(1, (height, -1))
    return tiles.transpose(2, 3).flatten(3)


def _normal(key: Int[Tensor, "*n"], channels: int, seed: int, age: float) -> Float[Tensor, "*n c"]:
    """W of every key and channel."""
    state = _mix_tensor(key * GOLDEN + seed)
    turn = torch.zeros((), dtype=torch.float64, device=key.device)
    if age > 0.0:
        bits = (_mix_tensor(state) >> 11) & LOW_53
        turn = age * torch.tan(math.pi * ((bits.double() + 0.5) * 2.0**-53 - 0.5))
    columns: list[Tensor] = []
    while len(columns) < channels:
        state = state + GOLDEN
        bits = _mix_tensor(state)
        radius = (-2.0 * ((((bits >> 32) & LOW_32).double() + 0.5) * 2.0**-32).log()).sqrt()
        angle = 2.0 * math.pi * (((bits & LOW_32).double() + 0.5) * 2.0**-32) + turn
        columns += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(columns[:channels], dim=-1)
