"""Triangle rasterisation: which face each pixel sees, where on the face, and how far away.

The face of a pixel is found by `mesh_raster.visible_faces`. The barycentric coordinates and the depth are then computed
in torch from the face's three corners in float64, so both are differentiable in the vertices whichever twin found the
face. Visibility itself is not differentiable. Scenes render with `mesh_raster.look` instead: lists, in their own dtype.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sds3d.errors import ShapeError
from sds3d.interfaces import Cameras
from sds3d.ops.mesh_raster import NEAR, visible_faces
from sds3d.ops.raster_numba import Cull


@dataclass(frozen=True, kw_only=True)
class Fragments:
    """What b views see of a mesh at every pixel centre."""

    face_id: Int[Tensor, "b H W"]  # int64; -1 where nothing is seen
    barycentrics: Float[
        Tensor, "b H W 3"
    ]  # perspective-correct weights of the face's corners; 0 where nothing
    depth: Float[Tensor, "b H W"]  # metres along the camera z axis; 0 where nothing

    @property
    def covered(self) -> Tensor:
        """Boolean (b, H, W): where a face is seen."""
        return self.face_id >= 0


def rasterize_mesh(
    vertices: Float[Tensor, "v 3"], faces: Int[Tensor, "f 3"], cameras: Cameras, *, cull: Cull = "none"
) -> Fragments:
    """The nearest face at every pixel centre of every view, with barycentrics and depth.

    `vertices` are world metres; `cull` "back" leaves out faces seen from behind. Faces that reach closer than
    `NEAR` to the camera plane are left out whole: the camera is meant to stay outside the object.
    Differentiable in `vertices` (barycentrics and depth).
    """
    if faces.numel() and (int(faces.min()) < 0 or int(faces.max()) >= len(vertices)):
        raise ShapeError(f"rasterize_mesh: faces name vertices outside 0..{len(vertices) - 1}")
    screen, depth = project(vertices, cameras)
    with torch.no_grad():
        inverse = torch.where(depth > NEAR, 1.0 / depth.clamp_min(NEAR), torch.zeros_like(depth))
        size = (cameras.height_px, cameras.width_px)
        face_id = visible_faces(screen, inverse, faces, size, cull=cull)
    return _interpolate(screen, depth, faces, face_id, vertices.dtype)


def project(
    vertices: Float[Tensor, "v 3"], cameras: Cameras
) -> tuple[Float[Tensor, "b v 2"], Float[Tensor, "b v"]]:
    """Pixel coordinates (float64) and camera depth of points; behind the camera the former mean nothing."""
    c2w = cameras.c2w.to(vertices.device, torch.float64)
    intrinsics = cameras.intrinsics.to(vertices.device, torch.float64)
    local = (vertices.double()[None] - c2w[:, None, :3, 3]) @ c2w[:, :3, :3]
    depth = local[..., 2]
    image = local @ intrinsics.transpose(1, 2)
    safe = torch.where(depth > NEAR, depth, torch.ones_like(depth))
    return image[..., :2] / safe[..., None], depth


def _interpolate(
    screen: Tensor, depth: Tensor, faces: Tensor, face_id: Tensor, dtype: torch.dtype
) -> Fragments:
    """Perspective-correct barycentrics: b_i = (l_i / z_i) / sum_k (l_k / z_k), with l the weights in the image."""
    view, row, column = torch.nonzero(face_id >= 0, as_tuple=True)
    corners = faces.to(screen.device, torch.int64)[face_id[view, row, column]]
    centres = torch.stack([column, row], dim=1).to(screen.dtype) + 0.5
    to_corner = screen[view[:, None], corners] - centres[:, None]
    weights = _cross(to_corner.roll(-1, 1), to_corner.roll(-2, 1))
    over_z = weights / weights.sum(1, keepdim=True) / depth[view[:, None], corners]
    z = 1.0 / over_z.sum(1)
    barycentrics = torch.zeros(*face_id.shape, 3, dtype=dtype, device=screen.device)
    far = torch.zeros(face_id.shape, dtype=dtype, device=screen.device)
    pixels = (view, row, column)
    return Fragments(
        face_id=face_id,
        barycentrics=barycentrics.index_put(pixels, (over_z * z[:, None]).to(dtype)),
        depth=far.index_put(pixels, z.to(dtype)),
    )


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
