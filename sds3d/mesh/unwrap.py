"""Texture coordinates for a surface (xatlas charts)."""

from dataclasses import dataclass

import numpy as np
import torch
import xatlas
from jaxtyping import Float, Int
from torch import Tensor

from sds3d.errors import ExportError
from sds3d.interfaces import Surface


@dataclass(frozen=True, kw_only=True)
class Atlas:
    """A surface cut into charts: vertices on chart borders appear once per chart."""

    source: Int[Tensor, " w"]  # vertex of the surface behind each atlas vertex
    faces: Int[Tensor, "f 3"]  # the surface's faces, in its order, by atlas vertices
    uvs: Float[Tensor, "w 2"]  # as glTF: (0, 0) is the upper left corner of the texture
    charts: int


def unwrap(surface: Surface, *, texture_px: int, padding_px: int) -> Atlas:
    """Cut and flatten a surface for a square texture, charts at least about `padding_px` texels apart."""
    if len(surface.faces) == 0:
        raise ExportError("unwrap: the surface has no faces")
    atlas = xatlas.Atlas()
    atlas.add_mesh(
        np.ascontiguousarray(surface.vertices.detach().cpu().numpy(), dtype=np.float32),
        np.ascontiguousarray(surface.faces.cpu().numpy(), dtype=np.uint32),
    )
    pack = xatlas.PackOptions()
    pack.resolution = texture_px  # xatlas only comes near it; `_fit` makes it exact
    pack.padding = padding_px
    pack.bilinear = True
    pack.bruteForce = False
    atlas.generate(xatlas.ChartOptions(), pack)
    source, faces, uvs = atlas[0]
    return Atlas(
        source=torch.from_numpy(source.astype(np.int64)),
        faces=torch.from_numpy(faces.astype(np.int64)),
        uvs=torch.from_numpy(_fit(uvs, atlas.width, atlas.height)),
        charts=int(atlas.chart_count),
    )


def _fit(uvs: np.ndarray, width: int, height: int) -> np.ndarray:
    """Undo xatlas's separate division by width and height, so that a texel is square on the surface."""
    scale = np.array([width, height], np.float32) / max(width, height)
    return np.clip(uvs * scale, 0.0, 1.0).astype(np.float32)
