"""Tangent frames of a textured mesh, and normals in them."""

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from sds3d.mesh.textured import TexturedMesh

Floats = NDArray[np.float64]


def vertex_tangents(mesh: TexturedMesh) -> Float[Tensor, "v 4"]:
    """Unit tangents (xyz, along growing u) and the sign w with which w cross(normal, tangent) points up the texture.

    As MikkTSpace makes them, which is what glTF viewers and engines expect: every face's tangent is projected onto
    the plane of the vertex normal, normalised and weighted by the face's angle there. Vertices without a usable
    face get any tangent. MikkTSpace parts vertices whose faces are mirrored against each other; here the larger
    share of the angle wins (unwrapping into charts makes none).
    Source: Mikkelsen 2008, Simulation of Wrinkled Surfaces Revisited.
    """
    if mesh.uvs is None:
        raise ValueError("vertex_tangents: the mesh has no texture coordinates")
    vertices, normals = (part.double().numpy() for part in (mesh.vertices, mesh.normals))
    # v counted upwards: green of a glTF normal texture is up, while its v grows downwards.
    uvs = mesh.uvs.double().numpy() * [1.0, -1.0]
    faces = mesh.faces.numpy()
    corners, flat = vertices[faces], uvs[faces]
    e1, e2 = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    d1, d2 = flat[:, 1] - flat[:, 0], flat[:, 2] - flat[:, 0]
    area = d1[:, 0] * d2[:, 1] - d1[:, 1] * d2[:, 0]
    along_u = (d2[:, 1:] * e1 - d1[:, 1:] * e2) * np.sign(area)[:, None]
    total = np.zeros((2, len(vertices), 3))  # by orientation
    angles = np.zeros((2, len(vertices)))
    side = (area > 0).astype(np.int64)
    for corner in range(3):
        at = faces[:, corner]
        normal = normals[at]
        tangent = _unit(_flattened(along_u, normal))
        ahead = _unit(_flattened(corners[:, (corner + 1) % 3] - corners[:, corner], normal))
        behind = _unit(_flattened(corners[:, (corner + 2) % 3] - corners[:, corner], normal))
        angle = np.arccos(np.clip((ahead * behind).sum(1), -1.0, 1.0)) * (area != 0)
        np.add.at(angles, (side, at), angle)
        np.add.at(total, (side, at), angle[:, None] * tangent)
    upright = angles[1] >= angles[0]
    chosen = np.where(upright[:, None], total[1], total[0])
    tangent = _unit(_flattened(chosen, normals))
    lost = np.linalg.norm(tangent, axis=1) < 0.5
    tangent[lost] = _any_across(normals[lost])
    sign = np.where(upright, 1.0, -1.0)
    return torch.from_numpy(np.concatenate([tangent, sign[:, None]], axis=1).astype(np.float32))


def to_tangent_space(
    wanted: Float[Tensor, "n 3"], normal: Float[Tensor, "n 3"], tangent: Float[Tensor, "n 4"]
) -> Float[Tensor, "n 3"]:
    """Unit normals `wanted` (world) in the frames of interpolated, not normalised vertex normals and tangents.

    Exactly undone by what shaders do: normalise(x T + y w cross(N, T) + z N).
    """
    across = tangent[:, :3]
    up = tangent[:, 3:].sign() * torch.linalg.cross(normal, across)
    frame = torch.stack([across, up, normal], dim=2).double()
    inside = torch.linalg.solve(frame, wanted.double()[..., None])[..., 0]
    return torch.nn.functional.normalize(inside, dim=1).to(wanted.dtype)


def from_tangent_space(
    inside: Float[Tensor, "n 3"], normal: Float[Tensor, "n 3"], tangent: Float[Tensor, "n 4"]
) -> Float[Tensor, "n 3"]:
    """World normals of tangent-space ones, as a shader makes them."""
    across = tangent[:, :3]
    up = tangent[:, 3:].sign() * torch.linalg.cross(normal, across)
    world = inside[:, :1] * across + inside[:, 1:2] * up + inside[:, 2:] * normal
    return torch.nn.functional.normalize(world, dim=1)


def _flattened(vectors: Floats, normals: Floats) -> Floats:
    return vectors - (vectors * normals).sum(1, keepdims=True) * normals


def _unit(vectors: Floats) -> Floats:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(length > 1e-12, vectors / np.maximum(length, 1e-12), 0.0)


def _any_across(normals: Floats) -> Floats:
    helper = np.eye(3)[np.abs(normals).argmin(axis=1)]
    return _unit(np.cross(normals, helper))
