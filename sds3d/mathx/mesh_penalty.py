"""Regularisers of triangle meshes and of signed distances on tetrahedra, as pure functions.

All are means without units: lengths are measured against the mesh's own edges, so that a weight means the same at
every resolution.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

_AREA_FLOOR = 1e-12  # square metres: below, a face has no direction worth a gradient


def face_normals(vertices: Float[Tensor, "v 3"], faces: Int[Tensor, "f 3"]) -> Float[Tensor, "f 3"]:
    """Normals of twice the faces' area in length, by the right hand."""
    a, b, c = vertices.index_select(0, faces.T.reshape(-1)).view(3, -1, 3).unbind(0)
    return torch.linalg.cross(b - a, c - a)


def normal_consistency(
    vertices: Float[Tensor, "v 3"], faces: Int[Tensor, "f 3"], pairs: Int[Tensor, "e 2"]
) -> Float[Tensor, ""]:
    """Mean of 1 - cos(angle) between the normals of faces that share an edge: 0 for a plane, 2/3 for a cube.

    `pairs` are the two faces of every inner edge. (The cube: 12 edges of 90 degrees, 6 flat diagonals.)
    """
    unit = F.normalize(face_normals(vertices, faces), dim=-1, eps=_AREA_FLOOR)
    first, second = unit.index_select(0, pairs[:, 0]), unit.index_select(0, pairs[:, 1])
    return (1 - (first * second).sum(-1)).sum() / max(len(pairs), 1)


def laplacian(vertices: Float[Tensor, "v 3"], ends: Int[Tensor, "e 2"]) -> Float[Tensor, ""]:
    """Mean of |v - mean of its neighbours|^2, over the mean square of an edge (which receives no gradient).

    The uniform Laplacian: it evens out the spacing of vertices as well as the surface.
    """
    start, end = ends.unbind(1)
    total = torch.zeros_like(vertices).index_add(0, start, vertices[end]).index_add(0, end, vertices[start])
    degree = torch.bincount(ends.reshape(-1), minlength=len(vertices)).to(vertices.dtype)
    away = (vertices - total / degree.clamp_min(1)[:, None]) * (degree > 0)[:, None]
    square = _square_lengths(vertices, ends).detach().sum() / max(len(ends), 1)
    return away.square().sum() / (degree > 0).sum().clamp_min(1) / square.clamp_min(_AREA_FLOOR)


def edge_length(vertices: Float[Tensor, "v 3"], ends: Int[Tensor, "e 2"]) -> Float[Tensor, ""]:
    """Mean of (l / mean l - 1)^2 over the edges; the mean length receives no gradient."""
    length = (_square_lengths(vertices, ends) + _AREA_FLOOR).sqrt()
    return (length / length.detach().mean() - 1).square().sum() / max(len(ends), 1)


def eikonal(
    positions: Float[Tensor, "v 3"], sdf: Float[Tensor, " v"], tets: Int[Tensor, "t 4"]
) -> Float[Tensor, ""]:
    """Mean of (|grad s| - 1)^2 over tetrahedra, in each of which s is linear: 0 for true distances.

    Source: Gropp et al. 2020, Implicit Geometric Regularization, arXiv:2002.10099, eq. 2.
    """
    corners = positions.index_select(0, tets.T.reshape(-1)).view(4, -1, 3)
    values = sdf.index_select(0, tets.T.reshape(-1)).view(4, -1, 1)
    a, b, c = (corners[1:] - corners[:1]).unbind(0)
    rise_a, rise_b, rise_c = (values[1:] - values[:1]).unbind(0)
    bc, ca, ab = torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)
    slope = (rise_a * bc + rise_b * ca + rise_c * ab) / (a * bc).sum(-1, keepdim=True)
    steepness = (slope.square().sum(-1) + 1e-12).sqrt()
    return (steepness - 1).square().sum() / max(len(tets), 1)


def sdf_sign(sdf: Float[Tensor, " v"], edges: Int[Tensor, "e 2"], scale_m: float) -> Float[Tensor, ""]:
    """Mean binary cross-entropy of s_a / scale against the sign of s_b and the reverse, on edges that change sign.

    It pulls such edges towards one sign, so that floaters and inner bubbles close; on a good surface both ends are
    small. Source: Munkberg et al. 2022, nvdiffrec, arXiv:2111.12503, section 3.
    """
    first, second = (sdf.index_select(0, end) / scale_m for end in edges.unbind(1))
    sides = ((first, second), (second, first))
    return sum(
        (F.binary_cross_entropy_with_logits(a, (b.detach() > 0).to(a), reduction="sum") for a, b in sides),
        start=sdf.new_zeros(()),
    ) / max(len(edges), 1)


def _square_lengths(vertices: Float[Tensor, "v 3"], ends: Int[Tensor, "e 2"]) -> Float[Tensor, " e"]:
    return (vertices.index_select(0, ends[:, 0]) - vertices.index_select(0, ends[:, 1])).square().sum(-1)
