"""Texture coordinates for a surface (xatlas charts)."""

from dataclasses import dataclass

import numpy as np
import torch
import xatlas
from jaxtyping import Float, Int
from torch import Tensor

from sds3d.errors import NoSurfaceError
from sds3d.interfaces import Surface
from sds3d.mathx.pose import fitting
from sds3d.mesh.checks import check_mesh
from sds3d.mesh.clean import measure
from sds3d.ops.raster_numba import uv_buffer

CHECK_PX = 1024  # of the picture in which overlaps are looked for
MAX_OVERLAP, UV_SLACK = 0.02, 1e-4


@dataclass(frozen=True, kw_only=True)
class Atlas:
    """A surface cut into charts: vertices on chart borders appear once per chart."""

    source: Int[Tensor, " w"]  # vertex of the surface behind each atlas vertex
    faces: Int[Tensor, "f 3"]  # the surface's faces, in its order, by atlas vertices
    uvs: Float[Tensor, "w 2"]  # as glTF: (0, 0) is the upper left corner of the texture
    charts: int


def unwrap(surface: Surface, *, texture_px: int, padding_px: int) -> Atlas:
    """Cut and flatten a surface for a square texture, charts at least about `padding_px` texels apart.

    Raises NoSurfaceError where there is nothing to flatten: no faces, or none with an area.
    """
    vertices, faces = surface.vertices.detach().cpu(), surface.faces.cpu()
    check_mesh(vertices, faces, "unwrap: the surface")
    try:
        pose = fitting(vertices, torch.eye(3, dtype=torch.float64), 1.0)  # xatlas's tolerances are lengths
    except ValueError as error:
        raise NoSurfaceError(f"unwrap: the surface has no extent: {error}") from error
    atlas = xatlas.Atlas()
    atlas.add_mesh(
        np.ascontiguousarray(pose.points(vertices).numpy(), dtype=np.float32),
        np.ascontiguousarray(faces.numpy(), dtype=np.uint32),
    )
    pack = xatlas.PackOptions()
    pack.resolution = texture_px  # xatlas only comes near it; `_fit` makes it exact
    pack.padding = padding_px
    pack.bilinear = True
    pack.bruteForce = False
    atlas.generate(xatlas.ChartOptions(), pack)
    source, corners, uvs = atlas[0]
    if max(atlas.width, atlas.height) == 0:
        raise NoSurfaceError(f"unwrap: none of the {len(faces)} faces has an area")
    return Atlas(
        source=torch.from_numpy(source.astype(np.int64)),
        faces=torch.from_numpy(corners.astype(np.int64)),
        uvs=torch.from_numpy(_fit(uvs, atlas.width, atlas.height)),
        charts=int(atlas.chart_count),
    )


def _fit(uvs: np.ndarray, width: int, height: int) -> np.ndarray:
    """Undo xatlas's separate division by width and height, so that a texel is square on the surface."""
    scale = np.array([width, height], np.float32) / max(width, height)
    return np.clip(uvs * scale, 0.0, 1.0).astype(np.float32)


def own_atlas(surface: Surface, uvs: Float[Tensor, "v 2"]) -> Atlas:
    """The atlas that a mesh brought with it."""
    flat = torch.cat([uvs, torch.zeros(len(uvs), 1)], dim=1)
    return Atlas(
        source=torch.arange(len(uvs)),
        faces=surface.faces,
        uvs=uvs.clamp(0.0, 1.0),
        charts=measure(Surface(vertices=flat, faces=surface.faces)).components,
    )


def fault_of_uvs(uvs: Float[Tensor, "v 2"], faces: Int[Tensor, "f 3"]) -> str | None:
    """Why a texture of its own cannot be put on these coordinates, in words; None if it can.

    They must lie in the unit square and give no texel to two places.
    """
    low, high = float(uvs.min()), float(uvs.max())
    if low < -UV_SLACK or high > 1.0 + UV_SLACK:
        return f"reach from {low:.3g} to {high:.3g}, outside the unit square: the texture repeats"
    corners = uvs.clamp(0.0, 1.0)[faces].double().numpy() * CHECK_PX
    first = np.full((CHECK_PX, CHECK_PX), -1, np.int64)
    uv_buffer(corners, first, np.zeros((CHECK_PX, CHECK_PX, 3), np.float32))
    covered = int((first >= 0).sum())
    a, b = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    area = float(np.abs(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum() / 2.0)
    if covered == 0:
        return "cover nothing"
    if area > covered * (1.0 + MAX_OVERLAP):
        return f"overlap: {100.0 * (area / covered - 1.0):.0f} % of the texture would belong to two places"
    return None
