"""Signed distance to a triangle mesh at the points of a regular lattice."""

import torch
from jaxtyping import Float, Int
from scipy import ndimage
from torch import Tensor

from sds3d.ops.boxes import walk_boxes

_BAND = (
    1.1  # lattice steps around the faces in which distances are exact: where a zero level can be told from it
)
_NUDGE = (
    1.2345e-6,
    2.3456e-6,
)  # of a step: no line of points meets an edge of a mesh drawn on the lattice itself


@torch.no_grad()
def lattice_distance(
    vertices: Float[Tensor, "v 3"], faces: Int[Tensor, "f 3"], *, low: float, step: float, count: int
) -> Float[Tensor, "n n n"]:
    """Metres to the mesh, negative inside, at (low + i step, low + j step, low + k step), i, j, k < `count`.

    Exact up to one step away; farther, up to the way round the nearest point of that band (an overestimate by less
    than a step). Inside is where most of three axis-parallel rays find a positive winding number, so small holes in
    the mesh do no harm.
    """
    grid = ((vertices.detach().double().cpu() - low) / step)[faces.long().cpu()]  # f 3 corners 3, in steps
    distance = _band_distance(grid.float(), count).double()
    near = torch.isfinite(distance)
    if not bool(near.any()):  # no face comes near the lattice
        distance = _to_points(grid.mean(1), count)
    elif not bool(near.all()):
        away, index = ndimage.distance_transform_edt(~near.numpy(), return_indices=True)
        distance = distance[tuple(torch.from_numpy(axis).long() for axis in index)] + torch.from_numpy(away)
    votes = torch.zeros(count, count, count, dtype=torch.int64)
    for axis in range(3):
        votes += _winding(grid.roll(-axis, -1), count).movedim((0, 1, 2), _axes(axis)) > 0
    signed = torch.where(votes >= 2, -distance, distance)
    return (signed * step).to(vertices)


def _axes(axis: int) -> tuple[int, int, int]:
    """Where the axes of coordinates rolled by -axis belong."""
    return (axis % 3, (axis + 1) % 3, (axis + 2) % 3)


def _band_distance(corners: Float[Tensor, "f 3 3"], count: int) -> Float[Tensor, "n n n"]:
    best = torch.full((count**3,), torch.inf, dtype=corners.dtype)
    low = (corners.amin(1) - _BAND).ceil().clamp(0, count).long()
    high = (corners.amax(1) + _BAND).floor().clamp(-1, count - 1).long()
    for face, point in walk_boxes(low, high):
        distance = point_triangle(point.to(corners.dtype), corners[face])
        flat = (point[:, 0] * count + point[:, 1]) * count + point[:, 2]
        best.scatter_reduce_(0, flat, distance, "amin")
    return torch.where(best <= _BAND, best, torch.inf).view(count, count, count)


def _to_points(points: Float[Tensor, "m 3"], count: int) -> Float[Tensor, "n n n"]:
    centre = torch.full((1, 3), 0.5 * (count - 1), dtype=points.dtype)
    if len(points) == 0:
        return torch.full((count, count, count), 2.0 * count, dtype=points.dtype)
    nearest = points[torch.cdist(centre, points)[0].argmin()]
    axis = torch.arange(count, dtype=points.dtype)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    return (grid - nearest).norm(dim=-1)


def point_triangle(point: Float[Tensor, "c 3"], corners: Float[Tensor, "c 3 3"]) -> Float[Tensor, " c"]:
    """Distance of each point to its triangle: to the plane where the foot lies inside, else to the nearest side."""
    following = corners.roll(-1, 1)
    side = following - corners  # c 3 3
    to_point = point[:, None] - corners
    length = (side * side).sum(-1).clamp_min(1e-30)
    share = ((to_point * side).sum(-1) / length).clamp(0, 1)
    to_sides = (to_point - share[..., None] * side).square().sum(-1).amin(1)
    normal = torch.linalg.cross(side[:, 0], side[:, 1])
    size = (normal * normal).sum(-1)
    within = ((torch.linalg.cross(side, to_point) * normal[:, None]).sum(-1) >= 0).all(1) & (size > 1e-30)
    to_plane = (to_point[:, 0] * normal).sum(-1).square() / size.clamp_min(1e-30)
    return torch.where(within, to_plane, to_sides).sqrt()


def _winding(corners: Float[Tensor, "f 3 3"], count: int) -> Int[Tensor, "n n n"]:
    """How often the ray from each point along the last axis leaves the mesh more often than it enters it."""
    nudge = torch.tensor(_NUDGE, dtype=corners.dtype)
    flat = corners[..., :2] - nudge
    a, b, c = flat.unbind(1)
    area = _cross(b - a, c - a)
    low = flat.amin(1).ceil().clamp(0, count).long()
    high = flat.amax(1).floor().clamp(-1, count - 1).long()
    high = torch.where(area[:, None] != 0, high, -1)
    passes = torch.zeros(count * count, count + 1, dtype=torch.int32)
    for face, column in walk_boxes(low, high):
        p = column.to(corners.dtype)
        x, y, z = (flat[face, i] for i in range(3))
        weights = torch.stack([_cross(y - p, z - p), _cross(z - p, x - p), _cross(x - p, y - p)], 1)
        weights = weights / area[face, None]
        hit = (weights >= 0).all(1).nonzero()[:, 0]
        height = (weights[hit] * corners[face[hit], :, 2]).sum(1)
        below = height.ceil().clamp(0, count).long()  # the first lattice point at or above the face
        sign = area[face[hit]].sign().int()  # counter-clockwise from above: the ray leaves there
        cell = column[hit, 0] * count + column[hit, 1]
        passes.view(-1).index_add_(0, cell * (count + 1) + below, sign)
    # The ray from point k meets the faces at heights above k: those counted at indices > k.
    total = passes.flip(1).cumsum(1).flip(1)[:, 1:]
    return total.view(count, count, count)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
