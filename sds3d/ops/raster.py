"""Triangle rasterisation: which face each pixel sees, where on the face, and how far away.

The face of a pixel is found by a z-buffer (numba; the reference twin is a loop over faces in torch). The
barycentric coordinates and the depth are then computed in torch from the face's three corners, so both are
differentiable in the vertices whichever twin found the face. Visibility itself is not differentiable.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sds3d.errors import BackendError, ShapeError
from sds3d.interfaces import Cameras
from sds3d.ops.backend import backend_for
from sds3d.ops.raster_numba import CULL_SIGN, Cull, z_buffer
from sds3d.ops.threads import run_tasks

NEAR = 1e-3  # metres; a face with a corner nearer than this to the camera plane is not drawn


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
    backend = backend_for(vertices)
    with torch.no_grad():
        if backend == "reference":
            face_id = _face_ids_reference(screen, depth, faces, cameras, CULL_SIGN[cull])
        elif backend in ("numba", "cuda"):
            # No CUDA kernel: the z-buffer of a few views takes milliseconds on the CPU, the rest stays on the device.
            face_id = _face_ids_numba(screen, depth, faces, cameras, CULL_SIGN[cull])
        else:
            raise BackendError(f"rasterize_mesh has no backend {backend!r}; it has reference, numba, cuda")
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


def _face_ids_numba(
    screen: Tensor, depth: Tensor, faces: Tensor, cameras: Cameras, keep_sign: float
) -> Tensor:
    views, size = len(cameras), (cameras.height_px, cameras.width_px)
    face_id = np.full((views, *size), -1, np.int64)
    nearest = np.zeros((views, *size), np.float64)
    points = np.ascontiguousarray(screen.cpu().numpy())
    z = depth.cpu().numpy()
    inverse = np.where(z > NEAR, 1.0 / np.maximum(z, NEAR), 0.0)
    triangles = np.ascontiguousarray(faces.cpu().numpy().astype(np.int64))
    run_tasks(
        z_buffer,
        [(points[b], inverse[b], triangles, keep_sign, face_id[b], nearest[b]) for b in range(views)],
    )
    return torch.from_numpy(face_id).to(screen.device)


def _face_ids_reference(
    screen: Tensor, depth: Tensor, faces: Tensor, cameras: Cameras, keep_sign: float
) -> Tensor:
    """The same decisions as the kernel, one face at a time over the whole image."""
    height, width = cameras.height_px, cameras.width_px
    y = torch.arange(height, dtype=torch.float64, device=screen.device)[:, None] + 0.5
    x = torch.arange(width, dtype=torch.float64, device=screen.device)[None, :] + 0.5
    face_id = torch.full((len(cameras), height, width), -1, dtype=torch.int64, device=screen.device)
    nearest = torch.zeros(len(cameras), height, width, dtype=torch.float64, device=screen.device)
    for b in range(len(cameras)):
        for f, corners in enumerate(faces.tolist()):
            if bool((depth[b, corners] <= NEAR).any()):
                continue
            (xi, yi), (xj, yj), (xk, yk) = screen[b, corners]
            area = (xj - xi) * (yk - yi) - (xk - xi) * (yj - yi)
            if area == 0 or area * keep_sign > 0:
                continue
            weights = torch.stack(
                [
                    (xj - x) * (yk - y) - (xk - x) * (yj - y),
                    (xk - x) * (yi - y) - (xi - x) * (yk - y),
                    (xi - x) * (yj - y) - (xj - x) * (yi - y),
                ]
            )
            weights = weights / area
            over_z = weights * (1.0 / depth[b, corners])[:, None, None]
            inverse = (
                over_z[0] + over_z[1] + over_z[2]
            )  # summed as in the kernel: ties on shared edges fall alike
            seen = (weights >= 0).all(0) & (inverse > nearest[b])
            nearest[b] = torch.where(seen, inverse, nearest[b])
            face_id[b] = torch.where(seen, f, face_id[b])
    return face_id


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
