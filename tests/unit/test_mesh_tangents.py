"""Tangent frames: a plane, a sphere, mirrored charts, and normals in and out of the frames."""

import numpy as np
import pytest
import torch
import trimesh
from torch.nn.functional import normalize

from sds3d.interfaces import Surface
from sds3d.mesh.clean import vertex_normals
from sds3d.mesh.tangents import from_tangent_space, to_tangent_space, vertex_tangents
from sds3d.mesh.textured import TexturedMesh
from sds3d.mesh.unwrap import unwrap
from sds3d.rng import Stream


def square(uvs: list[list[float]]) -> TexturedMesh:
    """The unit square in the plane z = 0, seen from +z."""
    return TexturedMesh(
        vertices=torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]),
        faces=torch.tensor([[0, 1, 2], [0, 2, 3]]),
        normals=torch.tensor([[0.0, 0, 1]]).expand(4, -1).contiguous(),
        uvs=torch.tensor(uvs),
    )


@pytest.mark.parametrize(
    ("uvs", "tangent", "sign"),
    [
        ([[0.0, 1], [1, 1], [1, 0], [0, 0]], [1.0, 0, 0], 1.0),  # as a picture on the wall
        ([[1.0, 1], [0, 1], [0, 0], [1, 0]], [-1.0, 0, 0], -1.0),  # mirrored
        ([[0.0, 0], [0, 1], [1, 1], [1, 0]], [0.0, 1, 0], 1.0),  # turned by a quarter
    ],
)
def test_a_square_follows_its_texture(uvs: list[list[float]], tangent: list[float], sign: float) -> None:
    found = vertex_tangents(square(uvs))
    expected = torch.tensor([*tangent, sign]).expand(4, -1)
    torch.testing.assert_close(found, expected)


def ball() -> TexturedMesh:
    shape = trimesh.creation.icosphere(subdivisions=3)
    surface = Surface(
        vertices=torch.tensor(shape.vertices, dtype=torch.float32), faces=torch.tensor(shape.faces)
    )
    atlas = unwrap(surface, texture_px=256, padding_px=2)
    return TexturedMesh(
        vertices=surface.vertices[atlas.source],
        faces=atlas.faces,
        normals=vertex_normals(surface)[atlas.source],
        uvs=atlas.uvs,
    )


def test_frames_of_a_ball_are_orthonormal_and_point_along_the_texture() -> None:
    mesh = ball()
    found = vertex_tangents(mesh)
    torch.testing.assert_close(found[:, :3].norm(dim=1), torch.ones(len(found)))
    assert ((found[:, :3] * mesh.normals).sum(1)).abs().max() < 1e-5
    assert set(found[:, 3].tolist()) <= {1.0, -1.0}
    # Along every edge, the texture moves as the frame says: du by the tangent, dv (up) by w cross(n, t).
    a, b = mesh.faces[:, 0], mesh.faces[:, 1]
    edge, moved = mesh.vertices[b] - mesh.vertices[a], (mesh.uvs[b] - mesh.uvs[a]) * torch.tensor([1.0, -1.0])
    up = found[a, 3:] * torch.linalg.cross(mesh.normals[a], found[a, :3])
    seen = torch.stack([(edge * found[a, :3]).sum(1), (edge * up).sum(1)], dim=1)
    agreement = (normalize(seen, dim=1) * normalize(moved, dim=1)).sum(1)
    assert agreement.median() > 0.99
    assert (agreement > 0.7).float().mean() > 0.98


def test_degenerate_faces_and_lone_vertices_get_a_tangent_too() -> None:
    mesh = square([[0.5, 0.5]] * 4)
    found = vertex_tangents(mesh)
    torch.testing.assert_close(found[:, :3].norm(dim=1), torch.ones(4))
    assert found[:, 2].abs().max() < 1e-6
    with pytest.raises(ValueError, match="no texture coordinates"):
        vertex_tangents(TexturedMesh(vertices=mesh.vertices, faces=mesh.faces, normals=mesh.normals))


def test_into_the_frame_and_out_again_is_the_same_normal() -> None:
    stream = Stream(0, "frames")
    normal = stream.fork("n").normal(200, 3)
    tangent = torch.cat([stream.fork("t").normal(200, 3), stream.fork("s").uniform(200, 1) - 0.5], dim=1)
    wanted = normalize(normal + 0.4 * stream.fork("w").normal(200, 3), dim=1)
    inside = to_tangent_space(wanted, normal, tangent)
    torch.testing.assert_close(from_tangent_space(inside, normal, tangent), wanted, rtol=0, atol=1e-4)
    unit = normalize(normal, dim=1)
    flat = to_tangent_space(unit, normal, tangent)
    np.testing.assert_allclose(flat, np.tile([0.0, 0.0, 1.0], (200, 1)), atol=1e-4)
