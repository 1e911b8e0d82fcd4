"""Normals for a mesh that came without: smooth where it bends softly, split where it has an edge."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sds3d.interfaces import Surface
from sds3d.mesh.clean import to_arrays, vertex_normals

CREASE_DEG = 40.0  # faces that meet at a larger angle are shaded apart
MAX_AROUND = 64  # at a vertex with more faces (the tip of a cone, a fan) all are smoothed together


def split_at_creases(
    surface: Surface, group: Int[Tensor, " v"], crease_deg: float = CREASE_DEG
) -> tuple[Int[Tensor, " w"], Int[Tensor, "f 3"], Float[Tensor, "w 3"]]:
    """(source, faces, normals): vertices repeated at creases, each once per smooth fan of faces around it.

    `group` numbers the places: vertices with one number are one point, parted for texture coordinates only. `source`
    is the vertex behind each new one. A corner's normal is the angle-weighted mean over those faces at its place that
    are within the crease angle of its own face.
    """
    vertices, faces = to_arrays(surface)
    place = group.numpy()[faces].reshape(-1)
    normal, weight = _face_normals(vertices, faces)
    order = np.argsort(place, kind="stable")
    count = np.bincount(place)
    start = np.concatenate([[0], count.cumsum()[:-1]])
    around, first = count[place], start[place]
    own = np.repeat(normal, 3, axis=0)
    total = np.zeros_like(own)
    least = np.cos(np.deg2rad(crease_deg))
    for step in range(min(int(count.max()), MAX_AROUND)):
        there = np.flatnonzero((step < around) & (around <= MAX_AROUND))
        other = order[first[there] + step]
        joins = (own[there] * normal[other // 3]).sum(1) >= least
        total[there[joins]] += (weight[other, None] * normal[other // 3])[joins]
    length = np.linalg.norm(total, axis=1, keepdims=True)
    smooth = vertex_normals(_joined(surface, group)).numpy()[place]
    corner_normal = np.where(length > 1e-12, total / np.maximum(length, 1e-12), smooth).astype(np.float32)
    return _merged(faces.reshape(-1), corner_normal)


def _merged(
    vertex: np.ndarray, normal: np.ndarray
) -> tuple[Int[Tensor, " w"], Int[Tensor, "f 3"], Float[Tensor, "w 3"]]:
    """Corners of one vertex with one and the same normal are one."""
    keys = np.concatenate(
        [vertex[:, None], (normal + 0.0).view(np.int32)], axis=1
    )  # + 0.0: no negative zeros
    order = np.lexsort(keys.T[::-1])
    new = np.ones(len(keys), dtype=bool)
    new[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    index = np.zeros(len(keys), np.int64)
    index[order] = new.cumsum() - 1
    chosen = order[new]
    return (
        torch.from_numpy(vertex[chosen].astype(np.int64)),
        torch.from_numpy(index.reshape(-1, 3)),
        torch.from_numpy(normal[chosen]),
    )


def _joined(surface: Surface, group: Int[Tensor, " v"]) -> Surface:
    """The surface with one vertex per place."""
    points = torch.zeros(int(group.max()) + 1, 3).index_copy(0, group, surface.vertices.float())
    return Surface(vertices=points, faces=group[surface.faces])


def _face_normals(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit normals (f, 3), zero for faces without area, and the angles (3 f) at their corners."""
    corners = vertices[faces]
    normal = _unit(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]))
    ahead = _unit(np.roll(corners, -1, axis=1) - corners)
    behind = _unit(np.roll(corners, 1, axis=1) - corners)
    return normal, np.arccos(np.clip((ahead * behind).sum(2), -1.0, 1.0)).reshape(-1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-300)
