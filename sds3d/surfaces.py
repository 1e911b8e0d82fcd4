"""The surface of any scene, cleaned: from its own field, or fused from what it shows; and points on a surface."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.cameras.orbit import orbit_cameras, turntable_cameras
from sds3d.interfaces import Cameras, Scene, Surface
from sds3d.mathx.mesh_penalty import face_normals
from sds3d.mesh.clean import clean
from sds3d.mesh.fit_iso import fitted_surface
from sds3d.mesh.fuse import fused_surface
from sds3d.rng import Stream
from sds3d.scenes import MeshScene

SurfaceWay = Literal["density", "tsdf"]

_ISO_PX = 64  # of the views that the iso value is fitted to
_ELEVATIONS_DEG, _AZIMUTHS = (-12.0, 10.0, 32.0, 58.0), 8  # of the depth renders that are fused
_PX_PER_CELL = 1.5  # of these renders: the object fills most of them


def surface_of(
    scene: Scene, cells: int, *, max_faces: int | None = None, way: SurfaceWay = "density"
) -> Surface:
    """The cleaned surface of a scene, closed where it has holes, simplified to about `max_faces` (None: as it is).

    `density` asks the scene itself, at the iso value that looks most like its renders; `tsdf` fuses depth renders of
    any scene. Raises ExportError where there is none.
    """
    was_training = scene.training
    scene.eval()
    rounds = 2
    try:
        if way == "tsdf":
            raw = fused_surface(scene, cells, _all_around(max(_ISO_PX, round(_PX_PER_CELL * cells))))
        elif isinstance(scene, MeshScene):
            raw, rounds = scene.surface(cells), 0  # a given shape has no iso value, and its corners stay
        else:
            views = [turntable_cameras(4, _ISO_PX), turntable_cameras(2, _ISO_PX, 55.0)]
            raw = fitted_surface(scene, cells, views)
    finally:
        scene.train(was_training)
    return clean(raw, max_faces=max_faces, smooth_rounds=rounds)


def sample_surface(
    surface: Surface, count: int, rng: Stream
) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 3"]]:
    """`count` points spread evenly over the area of a surface, and the unit normals of their faces."""
    normal = face_normals(surface.vertices, surface.faces)
    area = normal.norm(dim=1).double().cumsum(0)
    draw = rng.fork("points").uniform(count, 3)
    face = torch.searchsorted(area, draw[:, 0].double() * area[-1]).clamp_max(len(area) - 1)
    root = draw[:, 1:2].sqrt()
    weights = torch.cat([1 - root, root * (1 - draw[:, 2:]), root * draw[:, 2:]], 1)
    points = (surface.vertices[surface.faces[face]] * weights[..., None]).sum(1)
    return points, torch.nn.functional.normalize(normal[face], dim=1, eps=1e-12)


def _all_around(size_px: int) -> Cameras:
    """Rows of staggered azimuths, and the top.

    None from far below: training hardly looks there, and what it never saw shall stay closed.
    """
    angles = [(0.0, 85.0)]
    for row, elevation in enumerate(_ELEVATIONS_DEG):
        shift = row / len(_ELEVATIONS_DEG)
        angles += [(360.0 * (i + shift) / _AZIMUTHS, elevation) for i in range(_AZIMUTHS)]
    azimuth, elevations = torch.tensor(angles).unbind(1)
    level = torch.ones(len(angles))
    return orbit_cameras(azimuth, elevations, 3.3 * level, 40.0 * level, size_px)
