"""Which face each pixel of a triangle mesh shows, on any device, and what torch computes from the answer.

Clip space: (x, y, z, w) with w the depth along the camera axis (m); the image point is column (x/w + 1) W / 2, row
(y/w + 1) H / 2 (row 0 above). z / w rises from -1 at NEAR to 1 far away; only nvdiffrast reads it. Visibility is found
by a z-buffer and carries no gradient; barycentrics, depth and attributes are computed from the corners in torch and
are differentiable in them, whichever backend found the faces.

Backends: numba (CPU), torch without any kernel (CUDA; on the CPU the reference twin), nvdiffrast where asked for.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sds3d.errors import BackendError, ShapeError
from sds3d.interfaces import Cameras
from sds3d.ops.backend import backend_for
from sds3d.ops.boxes import walk_boxes
from sds3d.ops.nvdiffrast_faces import nvdiffrast_faces
from sds3d.ops.raster_numba import CULL_SIGN, Cull, z_buffer
from sds3d.ops.threads import run_tasks

NEAR = 1e-3  # metres; a face with a corner nearer than this to the camera plane is not drawn
_UNSEEN = torch.iinfo(torch.int64).max
_FACE_BITS = (1 << 32) - 1


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """The n pixels of b views that show a face, and where on it they look."""

    size: tuple[int, int, int]  # b, H, W
    pixel: Int[Tensor, " n"]  # flat index into (b, H, W), rising
    view: Int[Tensor, " n"]
    corners: Int[Tensor, "n 3"]  # vertices of the face
    barycentrics: Float[Tensor, "n 3"]  # perspective-correct
    depth: Float[Tensor, " n"]  # metres along the camera axis
    front: Bool[Tensor, " n"]  # the face runs counter-clockwise as seen

    def interpolate(self, values: Float[Tensor, "v c"]) -> Float[Tensor, "n c"]:
        """Vertex attributes at the pixels; differentiable in the attributes and the vertices."""
        # Term by term: reductions over an axis of three are slow.
        weights, corners = self.barycentrics.unbind(1), self.corners.unbind(1)
        first, second, third = (
            values.index_select(0, k) * w[:, None] for k, w in zip(corners, weights, strict=True)
        )
        return first + second + third

    def image(self, values: Float[Tensor, "n c"]) -> Float[Tensor, "b c H W"]:
        """Values of the pixels as images; 0 elsewhere."""
        b, height, width = self.size
        flat = values.new_zeros(b * height * width, values.shape[1]).index_copy(0, self.pixel, values)
        return flat.view(b, height, width, -1).permute(0, 3, 1, 2)


def to_clip(vertices: Float[Tensor, "v 3"], cameras: Cameras) -> Float[Tensor, "b v 4"]:
    """Clip-space vertices for every camera, in the vertices' dtype; differentiable."""
    c2w, lens = (x.to(vertices.device, torch.float64) for x in (cameras.c2w, cameras.intrinsics))
    scale = torch.tensor([2 / cameras.width_px, 2 / cameras.height_px], device=lens.device, dtype=lens.dtype)
    project = torch.zeros_like(c2w)
    project[:, :2, :3] = lens[:, :2] * scale[:, None]
    project[:, :2, 2] -= 1.0
    project[:, 2, 2], project[:, 2, 3] = 1.0, -2 * NEAR
    project[:, 3, 2] = 1.0
    matrix = (project @ torch.linalg.inv(c2w)).to(vertices.dtype)
    return vertices @ matrix[:, :, :3].mT + matrix[:, None, :, 3]


def to_screen(
    clip: Float[Tensor, "b v 4"], size: tuple[int, int]
) -> tuple[Float[Tensor, "b v 2"], Float[Tensor, "b v"]]:
    """Image points (column, row; pixel centres at +0.5) and 1 / depth; both 0 where nearer than NEAR."""
    w = clip[..., 3]
    inverse = torch.where(w > NEAR, 1.0 / w.clamp_min(NEAR), torch.zeros_like(w))
    half = torch.tensor([size[1] / 2, size[0] / 2], dtype=clip.dtype, device=clip.device)
    return (clip[..., :2] * inverse[..., None] + 1.0) * half * (inverse > 0)[..., None], inverse


def rasterize(
    clip: Float[Tensor, "b v 4"],
    faces: Int[Tensor, "f 3"],
    size: tuple[int, int],
    *,
    cull: Cull = "none",
    use_nvdiffrast: bool = False,
) -> Int[Tensor, "b H W"]:
    """The nearest face at every pixel centre of b views of H x W = `size` pixels, -1 where there is none.

    Faces that reach nearer than `NEAR` are left out whole. Equal depths (in float32) keep the lower face.

    Raises:
        ShapeError: a face names a vertex that is not there.
        BackendError: nvdiffrast is asked for and cannot be used.
    """
    if faces.numel() and (int(faces.min()) < 0 or int(faces.max()) >= clip.shape[1]):
        raise ShapeError(f"rasterize: faces name vertices outside 0..{clip.shape[1] - 1}")
    with torch.no_grad():
        if use_nvdiffrast:
            return nvdiffrast_faces(clip, faces, size, cull=cull, near=NEAR)
        screen, inverse = to_screen(clip.double(), size)
        return visible_faces(screen, inverse, faces, size, cull=cull)


@torch.no_grad()
def visible_faces(
    screen: Float[Tensor, "b v 2"],
    inverse_z: Float[Tensor, "b v"],
    faces: Int[Tensor, "f 3"],
    size: tuple[int, int],
    *,
    cull: Cull = "none",
) -> Int[Tensor, "b H W"]:
    """`rasterize` for image points and 1 / depth in float64; 1 / depth is 0 for vertices nearer than NEAR."""
    backend = backend_for(screen)
    if backend == "numba":
        return _visible_numba(screen, inverse_z, faces, size, CULL_SIGN[cull])
    if backend in ("reference", "cuda"):
        return _visible_torch(screen, inverse_z, faces, size, CULL_SIGN[cull])
    raise BackendError(f"rasterize has no backend {backend!r}; it has reference, numba, cuda")


def _visible_numba(
    screen: Tensor, inverse_z: Tensor, faces: Tensor, size: tuple[int, int], keep_sign: float
) -> Tensor:
    views = len(screen)
    face_id = np.full((views, *size), -1, np.int64)
    nearest = np.zeros((views, *size), np.float32)
    points, inverse = (np.ascontiguousarray(x.detach().cpu().numpy()) for x in (screen, inverse_z))
    triangles = np.ascontiguousarray(faces.cpu().numpy(), dtype=np.int64)
    run_tasks(
        z_buffer,
        [(points[b], inverse[b], triangles, keep_sign, face_id[b], nearest[b]) for b in range(views)],
    )
    return torch.from_numpy(face_id).to(screen.device)


def _visible_torch(
    screen: Tensor, inverse_z: Tensor, faces: Tensor, size: tuple[int, int], keep_sign: float
) -> Tensor:
    """The pixels of every face's bounding box at once; the nearest wins by the minimum of (depth, face) packed."""
    (height, width), views = size, len(screen)
    count = len(faces)
    faces = faces.long()
    corners = screen[:, faces].view(-1, 3, 2)
    over_z = inverse_z[:, faces].view(-1, 3)
    (xi, yi), (xj, yj), (xk, yk) = (corner.unbind(-1) for corner in corners.unbind(1))
    area = (xj - xi) * (yk - yi) - (xk - xi) * (yj - yi)
    drawn = (over_z > 0).all(1) & (area != 0) & (area * keep_sign <= 0)
    limit = torch.tensor([width - 1, height - 1], device=screen.device)
    low = (corners.amin(1) - 0.5).ceil().clamp(-1, max(size) + 1).long().clamp_min(0)
    high = torch.minimum((corners.amax(1) - 0.5).floor().clamp(-1, max(size) + 1).long(), limit)
    high = torch.where(drawn[:, None], high, -1)
    keys = torch.full((views * height * width,), _UNSEEN, device=screen.device)
    for item, point in walk_boxes(low, high):
        x, y = (point.to(screen.dtype) + 0.5).unbind(1)
        (xi, yi), (xj, yj), (xk, yk) = (corner.unbind(-1) for corner in corners[item].unbind(1))
        whole = area[item]
        bi = ((xj - x) * (yk - y) - (xk - x) * (yj - y)) / whole
        bj = ((xk - x) * (yi - y) - (xi - x) * (yk - y)) / whole
        bk = ((xi - x) * (yj - y) - (xj - x) * (yi - y)) / whole
        inside = ((bi >= 0) & (bj >= 0) & (bk >= 0)).nonzero()[:, 0]
        item, point = item[inside], point[inside]
        wi, wj, wk = over_z[item].unbind(1)
        inverse = (bi[inside] * wi + bj[inside] * wj + bk[inside] * wk).float()
        # The bits of positive floats rise with their value.
        rank = torch.iinfo(torch.int32).max - inverse.view(torch.int32).long()
        pixel = ((item // count) * height + point[:, 1]) * width + point[:, 0]
        keys.scatter_reduce_(0, pixel, (rank << 32) | (item % count), "amin")
    face_id = torch.where(keys == _UNSEEN, -1, keys & _FACE_BITS)
    return face_id.view(views, height, width)


def look(clip: Float[Tensor, "b v 4"], faces: Int[Tensor, "f 3"], face_id: Int[Tensor, "b H W"]) -> Pixels:
    """Barycentrics and depth at every pixel that shows a face, differentiable in `clip`.

    With p_i = x_i - x w_i and q_i = y_i - y w_i (x, y the pixel in [-1, 1]), b_i is proportional to
    p_j q_k - p_k q_j and w = sum_i b_i w_i: perspective-correct without a division by depth.
    Source: Olano and Greer 1997, Triangle Scan Conversion Using 2D Homogeneous Coordinates.
    """
    views, height, width = face_id.shape
    flat = face_id.reshape(-1)
    pixel = (flat >= 0).nonzero()[:, 0]
    corners = faces.long().index_select(0, flat[pixel])
    view = pixel // (height * width)
    at = (corners + (view * clip.shape[1])[:, None]).view(-1)
    # In float64: the weights of a face seen edge-on cancel to nothing in float32.
    points = clip.reshape(-1, 4).index_select(0, at).double().view(-1, 3, 4)
    x = ((pixel % width).double() + 0.5) * (2.0 / width) - 1.0
    y = ((pixel // width % height).double() + 0.5) * (2.0 / height) - 1.0
    across, down, _, w = points.unbind(-1)
    weights = torch.linalg.cross(across - x[:, None] * w, down - y[:, None] * w)
    i, j, k = weights.unbind(1)
    total = (i + j + k)[:, None]
    barycentrics = weights / total
    return Pixels(
        size=(views, height, width),
        pixel=pixel,
        view=view,
        corners=corners,
        barycentrics=barycentrics.to(clip.dtype),
        depth=torch.linalg.vecdot(barycentrics, w).to(clip.dtype),
        front=total.detach()[:, 0] < 0,
    )
