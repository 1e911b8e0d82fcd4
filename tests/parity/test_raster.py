"""Rasteriser: the twins agree, the geometry is right, gradients are right."""

import math
from dataclasses import replace

import pytest
import torch
import trimesh

from sds3d import ops
from sds3d.cameras.orbit import turntable_cameras
from sds3d.errors import ShapeError
from sds3d.mesh.textured import TexturedMesh, render_textured
from sds3d.ops.raster import NEAR, project, rasterize_mesh


def ball(subdivisions=1, radius=0.8):
    shape = trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius)
    return torch.tensor(shape.vertices, dtype=torch.float32), torch.tensor(shape.faces, dtype=torch.int64)


def soup(seed, count=40):
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(count, 1, 3, generator=generator) * 1.6 - 0.8
    vertices = (centre + 0.6 * torch.rand(count, 3, 3, generator=generator) - 0.3).reshape(-1, 3)
    return vertices, torch.arange(3 * count).reshape(-1, 3)


@pytest.mark.parametrize("cull", ["none", "back", "front"])
@pytest.mark.parametrize("shape", [ball(), soup(0), soup(1)], ids=["ball", "soup0", "soup1"])
def test_twins_see_the_same_faces(shape, cull):
    vertices, faces = shape
    cameras = turntable_cameras(3, 33, elevation_deg=20.0)
    fast = rasterize_mesh(vertices, faces, cameras, cull=cull)
    with ops.use("reference"):
        slow = rasterize_mesh(vertices, faces, cameras, cull=cull)
    assert fast.covered.any()
    assert torch.equal(fast.face_id, slow.face_id)
    assert torch.equal(fast.depth, slow.depth)


def test_twins_have_the_same_gradient():
    vertices, faces = soup(2)
    cameras = turntable_cameras(2, 21)
    gradients = []
    for backend in ("numba", "reference"):
        leaf = vertices.clone().requires_grad_()
        with ops.use(backend):
            out = rasterize_mesh(leaf, faces, cameras)
        (out.depth.sum() + (out.barycentrics**2).sum()).backward()
        gradients.append(leaf.grad)
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


def test_barycentrics_reconstruct_the_point_that_projects_to_the_pixel():
    vertices, faces = (x.double() if x.is_floating_point() else x for x in soup(3))
    cameras = turntable_cameras(2, 31, elevation_deg=35.0)
    out = rasterize_mesh(vertices, faces, cameras)
    view, row, column = torch.nonzero(out.covered, as_tuple=True)
    weights = out.barycentrics[view, row, column]
    assert torch.allclose(weights.sum(1), torch.ones(len(weights), dtype=torch.float64))
    assert weights.min() > -1e-12
    points = (vertices[faces[out.face_id[view, row, column]]] * weights[..., None]).sum(1)
    screen, depth = project(points, cameras)
    everyone = torch.arange(len(points))
    assert torch.allclose(screen[view, everyone], torch.stack([column, row], 1).double() + 0.5, atol=1e-9)
    assert torch.allclose(depth[view, everyone], out.depth[view, row, column], atol=1e-9)
    assert (out.barycentrics[~out.covered] == 0).all()
    assert (out.depth[~out.covered] == 0).all()


def test_gradients_match_finite_differences():
    vertices = torch.tensor([[-0.7, -0.6, 0.2], [0.8, -0.5, -0.3], [0.1, 0.9, 0.1]], dtype=torch.float64)
    faces = torch.tensor([[0, 1, 2]])
    cameras = turntable_cameras(1, 9)
    seen = rasterize_mesh(vertices, faces, cameras).covered

    def inner(points):
        out = rasterize_mesh(points, faces, cameras)
        assert torch.equal(out.covered, seen)  # differences are of depth and weights, not of visibility
        return out.barycentrics, out.depth

    assert torch.autograd.gradcheck(inner, vertices.requires_grad_(), eps=1e-7, atol=1e-5)


def test_a_ball_covers_its_disc_and_shows_its_near_side():
    """Silhouette of a sphere: a disc of radius f r / sqrt(d^2 - r^2) pixels; depth in the middle d - r."""
    vertices, faces = ball(5)
    cameras = turntable_cameras(1, 129, elevation_deg=0.0)
    out = rasterize_mesh(vertices, faces, cameras)
    radius_px = float(cameras.intrinsics[0, 0, 0]) * 0.8 / math.sqrt(3.3**2 - 0.8**2)
    assert int(out.covered.sum()) == pytest.approx(math.pi * radius_px**2, rel=0.01)
    assert float(out.depth[0, 64, 64]) == pytest.approx(2.5, abs=1e-3)


def test_image_axes():
    """Front camera: +x is right, +y is up; from azimuth 90 deg, +z is on the left."""
    triangle = torch.tensor([[0.0, -0.05, 0.0], [0.0, 0.05, 0.0], [0.05, 0.0, 0.05]])
    cameras = turntable_cameras(4, 64, elevation_deg=0.0)
    for offset, view, rows, columns in (
        ([0.5, 0, 0], 0, slice(24, 40), slice(32, 64)),
        ([0, 0.5, 0], 0, slice(0, 32), slice(24, 40)),
        ([0, 0, 0.5], 1, slice(24, 40), slice(0, 32)),
    ):
        out = rasterize_mesh(triangle + torch.tensor(offset), torch.tensor([[0, 1, 2]]), cameras)
        assert out.covered[view].any()
        assert out.covered[view, rows, columns].sum() == out.covered[view].sum()


def test_no_pixel_falls_through_a_shared_edge():
    """A square of two faces whose diagonal runs exactly through pixel centres."""
    vertices = torch.tensor([[-1.0, -1.0, 0.0], [1.0, -1.0, 0.0], [1.0, 1.0, 0.0], [-1.0, 1.0, 0.0]])
    out = rasterize_mesh(
        vertices, torch.tensor([[0, 1, 2], [0, 2, 3]]), turntable_cameras(1, 64, elevation_deg=0.0)
    )
    rows, columns = out.covered[0].any(1).sum(), out.covered[0].any(0).sum()
    assert out.covered[0].sum() == rows * columns


def test_culling_splits_a_ball_into_its_two_sides():
    vertices, faces = ball(3)
    cameras = turntable_cameras(1, 65)
    near, far = (rasterize_mesh(vertices, faces, cameras, cull=side).depth for side in ("back", "front"))
    both = rasterize_mesh(vertices, faces, cameras).depth
    assert torch.equal(near, both)
    assert float(far[0, 32, 32] - near[0, 32, 32]) == pytest.approx(1.6, abs=0.01)


def test_faces_at_the_camera_plane_are_left_out():
    camera = turntable_cameras(1, 16, elevation_deg=0.0)
    behind = torch.tensor([[-1.0, -1.0, 0.0], [1.0, -1.0, 0.0], [0.0, 1.0, 3.3 - NEAR / 2]])
    assert not rasterize_mesh(behind, torch.tensor([[0, 1, 2]]), camera).covered.any()


def test_views_do_not_depend_on_each_other_or_on_threads(monkeypatch):
    vertices, faces = soup(4)
    cameras = turntable_cameras(3, 24)
    together = rasterize_mesh(vertices, faces, cameras).face_id
    monkeypatch.setenv("SDS3D_THREADS", "1")
    assert torch.equal(rasterize_mesh(vertices, faces, cameras).face_id, together)


def test_faces_without_vertices_are_a_shape_error():
    vertices, faces = ball()
    with pytest.raises(ShapeError, match="outside"):
        rasterize_mesh(vertices, faces + 1000, turntable_cameras(1, 8))


def test_empty_mesh_shows_the_background():
    mesh = TexturedMesh(
        vertices=torch.zeros(0, 3), faces=torch.zeros(0, 3, dtype=torch.int64), normals=torch.zeros(0, 3)
    )
    rgb, alpha, depth = render_textured(
        mesh, turntable_cameras(2, 8), torch.tensor([[0.1, 0.2, 0.3], [1, 1, 1]])
    )
    assert torch.allclose(rgb[0, :, 0, 0], torch.tensor([0.1, 0.2, 0.3]))
    assert (alpha == 0).all()
    assert (depth == 0).all()


def test_textured_square_shows_its_texture_upright():
    """uv (0, 0) is the upper left corner of the image; four quarters of known colour."""
    texture = torch.zeros(8, 8, 3, dtype=torch.uint8)
    texture[:4, :4], texture[:4, 4:], texture[4:, :4], texture[4:, 4:] = (
        torch.tensor(c, dtype=torch.uint8) for c in ([255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255])
    )
    mesh = TexturedMesh(
        vertices=torch.tensor([[-0.5, -0.5, 0.0], [0.5, -0.5, 0.0], [0.5, 0.5, 0.0], [-0.5, 0.5, 0.0]]),
        faces=torch.tensor([[0, 1, 2], [0, 2, 3]]),
        normals=torch.tensor([[0.0, 0.0, 1.0]]).repeat(4, 1),
        uvs=torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]),
        texture=texture,
    )
    cameras = turntable_cameras(2, 64, elevation_deg=0.0)  # the second sees the back: mirrored, still drawn
    rgb, alpha, _ = render_textured(mesh, cameras, torch.zeros(2, 3))
    assert rgb[0, :, 26, 26].tolist() == [1, 0, 0]
    assert rgb[0, :, 26, 38].tolist() == [0, 1, 0]
    assert rgb[0, :, 38, 26].tolist() == [0, 0, 1]
    assert rgb[1, :, 26, 26].tolist() == [0, 1, 0]
    lit, _, _ = render_textured(mesh, cameras, torch.zeros(2, 3), look="lit")
    assert 0.8 < float(lit[0, 0, 26, 26]) < 1.0
    wide = replace(mesh, vertices=mesh.vertices * 10)
    assert (render_textured(wide, cameras, torch.zeros(2, 3))[1] == 1).all()
    assert 0 < alpha.mean() < 1
