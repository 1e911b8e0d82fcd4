"""3D Gaussian splatting on the CPU: the numba twin of `splat_reference`.

    forward   axes of every Gaussian | per view: order by depth, project, list per band | per band: composite
    backward  per band: un-composite | per Gaussian: sum over bands and views, un-project

A task is a fixed piece of work (one view, one band of 32 rows of one view, 2048 Gaussians) that writes to its own
memory, and every sum has a fixed order: the numbers do not depend on the number of threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from sds3d.interfaces import Cameras
from sds3d.ops.splat_numba_blocks import (
    BACKWARD_WIDTH,
    BAND_ROWS,
    FORWARD_WIDTH,
    MOMENTS,
    SIDE,
    SPLAT_WIDTH,
    Floats,
    Ints,
    composite_band,
    differentiate_band,
    load_band,
    open_band,
    write_band,
)
from sds3d.ops.splat_numba_project import (
    CAMERA_WIDTH,
    count_entries,
    differentiate_axes,
    differentiate_projection,
    find_visible,
    list_entries,
    make_axes,
    project_sorted,
)
from sds3d.ops.splat_reference import FRUSTUM_MARGIN, view_matrices
from sds3d.ops.threads import run_tasks

CHUNK = 2048  # Gaussians per task


@dataclass
class _Band:
    """32 rows of one view: which Gaussians (front to back), which blocks they touched, and how the pixels ended."""

    row_first: int  # of blocks
    ranks: Ints
    slots: Ints
    items: Ints
    ends: Ints
    state: Floats


@dataclass
class _View:
    """What the backward pass has to know about one view."""

    ids: Ints  # by rank: Gaussian
    splats: Floats  # by rank
    starts: Ints  # by rank: first row of `moments`
    bands: list[_Band] = field(default_factory=list)


def rasterize(
    means: Float[Tensor, "g 3"],
    quats_wxyz: Float[Tensor, "g 4"],
    scales: Float[Tensor, "g 3"],
    opacity: Float[Tensor, " g"],
    color: Float[Tensor, "g 3"],
    cameras: Cameras,
    background: Float[Tensor, "b 3"],
) -> tuple[Float[Tensor, "b 3 H W"], Float[Tensor, "b 1 H W"], Float[Tensor, "b 1 H W"]]:
    """Colour, alpha and alpha-weighted depth of all views."""
    size = (cameras.height_px, cameras.width_px)
    packed = _pack_cameras(cameras, means)
    return _Rasterize.apply(means, quats_wxyz, scales, opacity, color, background, packed, size)


def _pack_cameras(cameras: Cameras, like: Tensor) -> Floats:
    w2c = view_matrices(cameras, like).numpy()
    intrinsics = cameras.intrinsics.detach().to(like).numpy()
    packed = np.zeros((len(cameras), CAMERA_WIDTH), w2c.dtype)
    packed[:, :9] = w2c[:, :3, :3].reshape(-1, 9)
    packed[:, 9:12] = w2c[:, :3, 3]
    for axis, size_px in enumerate((cameras.width_px, cameras.height_px)):
        focal, center = intrinsics[:, axis, axis], intrinsics[:, axis, 2]
        margin = FRUSTUM_MARGIN * 0.5 * size_px / focal
        packed[:, 12 + axis], packed[:, 14 + axis] = focal, center
        packed[:, 16 + 2 * axis] = -center / focal - margin
        packed[:, 17 + 2 * axis] = (size_px - center) / focal + margin
    return packed


class _Rasterize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, cameras, (height, width) = inputs
        means, quats, scales, opacity, color, background = _arrays(tensors)
        count, views = means.shape[0], cameras.shape[0]
        axes = np.zeros((count, 9), means.dtype)
        run_tasks(make_axes, [(*chunk, quats, scales, axes) for chunk in _chunks(count)])

        found: dict[int, _View] = {}
        geometry = (means, axes, opacity, color)
        run_tasks(_prepare_view, [(found, v, geometry, cameras[v], height, width) for v in range(views)])
        prepared = [found[v] for v in range(views)]
        rgb = np.zeros((views, 3, height, width), means.dtype)
        alpha, depth = (np.zeros((views, height, width), means.dtype) for _ in range(2))
        tasks = [
            (view.splats, band, background[v], rgb[v], alpha[v], depth[v])
            for v, view in enumerate(prepared)
            for band in view.bands
        ]
        run_tasks(_composite, tasks)
        ctx.save_for_backward(*tensors)
        ctx.prepared, ctx.axes, ctx.cameras = prepared, axes, cameras
        return torch.from_numpy(rgb), torch.from_numpy(alpha[:, None]), torch.from_numpy(depth[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_images: Tensor) -> tuple[Tensor | None, ...]:
        prepared, axes, cameras = ctx.prepared, ctx.axes, ctx.cameras
        means, quats, scales, opacity, color, background = _arrays(ctx.saved_tensors)
        d_rgb, d_alpha, d_depth = _arrays(d_images)
        moments = [np.zeros((view.starts[-1], MOMENTS), means.dtype) for view in prepared]
        d_backgrounds = np.zeros((len(prepared), max(len(view.bands) for view in prepared), 3), means.dtype)
        tasks = [
            (
                view.splats,
                band,
                background[v],
                d_rgb[v],
                d_alpha[v, 0],
                d_depth[v, 0],
                moments[v],
                d_backgrounds[v, n],
            )
            for v, view in enumerate(prepared)
            for n, band in enumerate(view.bands)
        ]
        run_tasks(_differentiate, tasks)

        d_axes = np.zeros_like(axes)
        gradients = [np.zeros_like(array) for array in (means, quats, scales, opacity, color)]
        d_means, d_quats, d_scales, d_opacity, d_color = gradients
        rank_of = np.full((len(prepared), means.shape[0]), -1, np.int32)
        for v, view in enumerate(prepared):
            rank_of[v, view.ids] = np.arange(len(view.ids), dtype=np.int32)

        def gather(first: int, last: int) -> None:
            for v, view in enumerate(prepared):
                geometry = (view.starts, view.splats, moments[v], means, axes, cameras[v])
                differentiate_projection(
                    first, last, rank_of[v], *geometry, d_means, d_axes, d_opacity, d_color
                )
            differentiate_axes(first, last, quats, scales, d_axes, d_quats, d_scales)

        run_tasks(gather, _chunks(means.shape[0]))
        gradients.append(d_backgrounds.sum(1))
        return (*(torch.from_numpy(gradient) for gradient in gradients), None, None)


def _arrays(tensors: Sequence[Tensor]) -> list[Floats]:
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


def _chunks(count: int) -> list[tuple[int, int]]:
    return [(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]


def _prepare_view(
    found: dict[int, _View], index: int, geometry: tuple[Floats, ...], camera: Floats, height: int, width: int
) -> None:
    """Order, project and list the Gaussians of one view; the result goes to found[index]."""
    means, axes, opacity, color = geometry
    unordered, depth = np.zeros(means.shape[0], np.int32), np.zeros(means.shape[0], means.dtype)
    visible = find_visible(means, opacity, camera, unordered, depth)
    ids = unordered[_order_by_depth(depth[:visible])]
    splats = np.zeros((visible, SPLAT_WIDTH), means.dtype)
    project_sorted(ids, means, axes, opacity, color, camera, width, height, splats)

    rows, columns = -(-height // SIDE), -(-width // SIDE)
    starts = np.zeros(visible + 1, np.int32)
    bands = -(-rows // BAND_ROWS)
    entries, capacity = np.zeros(bands, np.int32), np.zeros(bands, np.int64)
    count_entries(splats, columns, starts, entries, capacity)
    offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(entries, dtype=np.int32)])
    ranks, slots = np.zeros(offsets[-1], np.int32), np.zeros(offsets[-1], np.int32)
    list_entries(splats, starts, offsets, ranks, slots)
    view = _View(ids, splats, starts)
    for band in range(bands):
        row_first = band * BAND_ROWS
        blocks = min(BAND_ROWS, rows - row_first) * columns
        mine = slice(offsets[band], offsets[band + 1])
        view.bands.append(
            _Band(
                row_first,
                ranks[mine],
                slots[mine],
                items=np.zeros(capacity[band], np.int32),
                ends=np.zeros(entries[band], np.int32),
                state=np.zeros((blocks, FORWARD_WIDTH), means.dtype),
            )
        )
    found[index] = view


def _order_by_depth(depth: Floats) -> Ints:
    """Front to back at full precision; equal depths in the order they came."""
    if depth.dtype != np.float32:
        return np.argsort(depth, kind="stable").astype(np.int32)
    # Positive floats sort like their bits; with the index below them, an unstable (vectorised) sort is stable.
    keys = depth.view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(len(depth), dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int32)


def _composite(
    splats: Floats, band: _Band, background: Floats, rgb: Floats, alpha: Floats, depth: Floats
) -> None:
    height, width = alpha.shape
    columns = -(-width // SIDE)
    open_px = np.zeros(len(band.state), np.int32)
    open_band(band.row_first, columns, width, height, band.state, open_px)
    composite_band(splats, band.ranks, band.row_first, columns, band.state, open_px, band.items, band.ends)
    write_band(band.row_first, columns, band.state, background, rgb, alpha, depth)


def _differentiate(
    splats: Floats,
    band: _Band,
    background: Floats,
    d_rgb: Floats,
    d_alpha: Floats,
    d_depth: Floats,
    moments: Floats,
    d_background: Floats,
) -> None:
    columns = -(-d_alpha.shape[1] // SIDE)
    state = np.zeros((len(band.state), BACKWARD_WIDTH), splats.dtype)
    load_band(band.row_first, columns, band.state, background, d_rgb, d_alpha, d_depth, state, d_background)
    differentiate_band(
        splats, band.ranks, band.slots, band.row_first, columns, state, band.items, band.ends, moments
    )
