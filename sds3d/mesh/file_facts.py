"""Facts of a written file: is it one closed manifold, and how fine is its texture?"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sds3d.interfaces import Surface
from sds3d.mesh.clean import measure
from sds3d.mesh.files import welded
from sds3d.mesh.textured import TexturedMesh


@dataclass(frozen=True, kw_only=True)
class TexelDensity:
    """Texels per square metre of surface, over the faces, each weighted with its area."""

    median: float
    low: float  # 5 % of the surface have less
    high: float  # 5 % of the surface have more


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """A file that was read back from disk, its texture seams welded."""

    file: (
        str | None
    )  # its format; None: only formats that cannot be read back were written, so as it was in memory
    faces: int
    components: int
    boundary_edges: int  # edges with one face
    non_manifold_edges: int  # edges with three or more faces, or two that disagree in winding
    texels_per_m2: TexelDensity | None  # None where the format holds no texture
    file_bytes: Mapping[str, int]  # of each format that was written, all its files together


def facts_of(mesh: TexturedMesh, file: str | None, file_bytes: Mapping[str, int]) -> FileFacts:
    """Count and weigh a mesh as it came back from its file."""
    vertices, group = welded(mesh)
    surface = Surface(vertices=torch.from_numpy(vertices), faces=torch.from_numpy(group)[mesh.faces])
    stats = measure(surface)
    return FileFacts(
        file=file,
        faces=stats.faces,
        components=stats.components,
        boundary_edges=stats.border_edges,
        non_manifold_edges=stats.knotted_edges,
        texels_per_m2=texel_density(mesh),
        file_bytes=dict(file_bytes),
    )


def texel_density(mesh: TexturedMesh) -> TexelDensity | None:
    """How finely the base colour texture covers the surface; None without one."""
    if mesh.texture is None or mesh.uvs is None:
        return None
    height, width = mesh.texture.shape[:2]
    flat = mesh.uvs[mesh.faces].double() * torch.tensor([width, height]).double()
    a, b = flat[:, 1] - flat[:, 0], flat[:, 2] - flat[:, 0]
    texels = 0.5 * (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).abs()
    area = face_areas(mesh.vertices, mesh.faces)
    real = area > 0
    density = (texels[real] / area[real]).numpy()
    order = np.argsort(density, kind="stable")
    below = np.cumsum(area[real].numpy()[order])
    if len(order) == 0:
        return None
    low, median, high = (
        float(density[order[np.searchsorted(below, share * below[-1])]]) for share in (0.05, 0.5, 0.95)
    )
    return TexelDensity(median=median, low=low, high=high)


def face_areas(vertices: Float[Tensor, "v 3"], faces: Int[Tensor, "f 3"]) -> Float[Tensor, " f"]:
    """Square metres, float64."""
    a, b, c = vertices.double()[faces].unbind(1)
    return 0.5 * torch.linalg.cross(b - a, c - a).norm(dim=1)
