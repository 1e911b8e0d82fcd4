"""Mesh rasteriser in clip space: twins, differentiable attributes, and silhouettes against analytic areas."""

import math

import pytest
import torch
import trimesh

from sds3d import ops
from sds3d.cameras.orbit import orbit_cameras, turntable_cameras
from sds3d.errors import BackendError, ShapeError
from sds3d.ops.antialias import antialias, find_crossings
from sds3d.ops.boxes import walk_boxes
from sds3d.ops.mesh_edges import mesh_edges
from sds3d.ops.mesh_raster import NEAR, look, rasterize, to_clip, to_screen
from sds3d.ops.raster import project
from sds3d.rng import Stream

STREAM = Stream(3, "mesh raster")


def ball(subdivisions: int = 2, radius: float = 0.6) -> tuple[torch.Tensor, torch.Tensor]:
    shape = trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius)
    return torch.tensor(shape.vertices), torch.tensor(shape.faces)


def soup(count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    centre = STREAM.fork("centre").uniform(count, 1, 3) * 1.6 - 0.8
    vertices = (centre + 0.5 * STREAM.fork("corner").uniform(count, 3, 3) - 0.25).reshape(-1, 3)
    return vertices, torch.arange(3 * count).reshape(-1, 3)


def coverage(vertices: torch.Tensor, faces: torch.Tensor, cameras, *, chosen=None):  # type: ignore[no-untyped-def]
    """Antialiased alpha, and what was decided (faces, crossings) on the way."""
    clip = to_clip(vertices, cameras)
    if chosen is None:
        face_id = rasterize(clip.detach(), faces, (cameras.height_px, cameras.width_px))
        depth = look(clip, faces, face_id)
        image = depth.image(depth.depth[:, None]).detach()[:, 0]
        chosen = (
            face_id,
            find_crossings(clip.detach(), faces, mesh_edges(faces, len(vertices)), face_id, image),
        )
    alpha = (chosen[0] >= 0)[:, None].to(vertices.dtype)
    return antialias(alpha, clip, chosen[1]), chosen


def test_walk_boxes_lists_every_point_once() -> None:
    low = torch.tensor([[0, 0], [3, 1], [5, 5], [2, 2]])
    high = torch.tensor([[1, 2], [3, 1], [4, 9], [4, 3]])
    for chunk in (1, 5, 1000):
        found = [
            (int(b), *map(int, p))
            for boxes, points in walk_boxes(low, high, chunk=chunk)
            for b, p in zip(boxes, points, strict=True)
        ]
        expected = [
            (b, x, y)
            for b in range(4)
            for x in range(int(low[b, 0]), int(high[b, 0]) + 1)
            for y in range(int(low[b, 1]), int(high[b, 1]) + 1)
        ]
        assert found == expected


def test_clip_space_projects_like_the_cameras() -> None:
    points = STREAM.fork("p").uniform(50, 3).double() - 0.5
    cameras = orbit_cameras(
        *(torch.tensor(x) for x in ([20.0, 200.0], [10.0, -40.0], [3.0, 2.5], [40.0, 50.0])), 48
    )
    cameras.intrinsics[:, 0, 2] += 3.0  # off-centre
    clip = to_clip(points, cameras)
    screen, inverse = to_screen(clip, (48, 48))
    expected, depth = project(points, cameras)
    torch.testing.assert_close(screen, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(1 / inverse, depth, atol=1e-6, rtol=0)
    torch.testing.assert_close(clip[..., 2], clip[..., 3] - 2 * NEAR)


@pytest.mark.parametrize("cull", ["none", "back"])
@pytest.mark.parametrize("shape", [ball(1), ball(4), soup()], ids=["coarse", "fine", "soup"])
def test_twins_see_the_same_faces(shape, cull) -> None:  # type: ignore[no-untyped-def]
    vertices, faces = shape
    clip = to_clip(vertices.float(), turntable_cameras(3, 40, elevation_deg=25.0))
    fast = rasterize(clip, faces, (40, 40), cull=cull)
    with ops.use("reference"):
        slow = rasterize(clip, faces, (40, 40), cull=cull)
    assert (fast >= 0).any()
    assert torch.equal(fast, slow)


def test_views_may_be_wide_and_meshes_empty() -> None:
    clip = torch.tensor([[[-1.0, -1, 0, 1], [1, -1, 0, 1], [1, 1, 0, 1], [-1, 1, 0, 1]]]) * 2
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    for backend in ("numba", "reference"):
        with ops.use(backend):
            assert (rasterize(clip, faces, (5, 9)) >= 0).all()
            assert (rasterize(clip, faces[:0], (5, 9)) == -1).all()
            assert (rasterize(clip * torch.tensor([1, 1, 1, -1.0]), faces, (5, 9)) == -1).all()


def test_wrong_arguments_are_refused() -> None:
    clip = torch.ones(1, 3, 4)
    with pytest.raises(ShapeError, match="outside"):
        rasterize(clip, torch.tensor([[0, 1, 3]]), (8, 8))
    with pytest.raises(BackendError, match="CUDA tensors only"):
        rasterize(clip, torch.tensor([[0, 1, 2]]), (8, 8), use_nvdiffrast=True)


def test_attributes_are_perspective_correct() -> None:
    """World position as an attribute must land on the pixel it was asked at."""
    vertices, faces = soup()
    vertices = vertices.double()
    cameras = turntable_cameras(2, 32, elevation_deg=20.0)
    clip = to_clip(vertices, cameras)
    pixels = look(clip, faces, rasterize(clip, faces, (32, 32)))
    screen, depth = project(pixels.interpolate(vertices), cameras)
    everyone = torch.arange(len(pixels.pixel))
    centre = torch.stack([pixels.pixel % 32, pixels.pixel // 32 % 32], 1) + 0.5
    torch.testing.assert_close(screen[pixels.view, everyone], centre.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(depth[pixels.view, everyone], pixels.depth, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_gradients_of_depth_and_attributes_match_finite_differences(backend) -> None:  # type: ignore[no-untyped-def]
    vertices, faces = ball(0)
    cameras = turntable_cameras(1, 10, elevation_deg=20.0)
    values = STREAM.fork("v").normal(len(vertices), 2).double().requires_grad_()
    with ops.use(backend):
        face_id = rasterize(to_clip(vertices, cameras), faces, (10, 10))

    def shown(points: torch.Tensor, attribute: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = look(to_clip(points, cameras), faces, face_id)
        return pixels.depth, pixels.interpolate(attribute)

    assert torch.autograd.gradcheck(shown, (vertices.requires_grad_(), values), eps=1e-6, atol=1e-5)


def test_gradients_of_silhouettes_match_finite_differences() -> None:
    vertices, faces = ball(1)
    cameras = turntable_cameras(1, 12, elevation_deg=20.0)
    _, chosen = coverage(vertices, faces, cameras)
    image = STREAM.fork("i").uniform(1, 2, 12, 12).double().requires_grad_()
    assert len(chosen[1].near) > 10

    def blended(points: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        return antialias(picture, to_clip(points, cameras), chosen[1])

    vertices.requires_grad_()
    assert torch.autograd.gradcheck(blended, (vertices, image), eps=1e-6, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("subdivisions", [1, 3, 5])  # the last: faces much smaller than a pixel
def test_coverage_is_the_area_of_a_ball_and_moves_with_it(subdivisions: int) -> None:
    """A ball of radius r at distance d shows a disc of radius f r / sqrt(d^2 - r^2) pixels."""
    vertices, faces = ball(subdivisions)
    cameras = turntable_cameras(2, 48, elevation_deg=0.0)
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    alpha, _ = coverage(vertices * factor, faces, cameras)
    focal = float(cameras.intrinsics[0, 0, 0])

    def area(radius: float) -> float:
        return 2 * math.pi * focal**2 * radius**2 / (3.3**2 - radius**2)

    (slope,) = torch.autograd.grad(alpha.sum(), factor)
    exact = (area(0.601) - area(0.599)) / 0.002 * 0.6
    # A coarse ball is a polyhedron inside the sphere.
    assert float(alpha.detach().sum()) == pytest.approx(
        area(0.6), rel={1: 0.12, 3: 0.012, 5: 0.004}[subdivisions]
    )
    assert float(slope / alpha.detach().sum()) == pytest.approx(exact / area(0.6), rel=0.07)


def test_coverage_of_a_square_equals_its_area_in_every_place() -> None:
    """A turned square is moved in steps of a fifth of a pixel: alpha sums to its area, whose slope is about 0.

    (Sides of 5.4 px pull by as many pixels each; a corner between two pixel rows leaves at most a pixel of it.)
    """
    corner = torch.tensor([[1.0, 0.2], [-0.2, 1.0], [-1.0, -0.2], [0.2, -1.0]], dtype=torch.float64) * 5.3
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    edges = mesh_edges(faces, 4)
    exact = 2 * 1.04 * 5.3**2
    for step in range(5):
        shift = torch.tensor([0.2 * step, 0.13 * step], dtype=torch.float64, requires_grad=True)
        place = (corner + 8.3 + shift) / 8 - 1
        clip = torch.cat([place, torch.zeros(4, 1), torch.ones(4, 1)], 1).double()[None]
        face_id = rasterize(clip.detach(), faces, (16, 16))
        found = find_crossings(clip.detach(), faces, edges, face_id, (face_id >= 0).double())
        alpha = antialias((face_id >= 0)[:, None].double(), clip, found)
        assert float(alpha.detach().sum()) == pytest.approx(exact, rel=0.01)
        (slope,) = torch.autograd.grad(alpha.sum(), shift)
        assert slope.abs().max() < 1.1


def test_hidden_and_inner_edges_blend_nothing() -> None:
    """A small ball behind a large one has silhouettes that no pixel shows."""
    (big, faces), (small, more) = ball(3), ball(3, 0.2)
    cameras = turntable_cameras(1, 32, elevation_deg=0.0)
    _, alone = coverage(big, faces, cameras)
    behind = small + torch.tensor([0.0, 0.0, -0.9])
    both = torch.cat([big, behind]), torch.cat([faces, more + len(big)])
    _, together = coverage(*both, cameras)
    assert torch.equal(alone[1].near, together[1].near)
    assert torch.equal(alone[1].far, together[1].far)
    ahead = small + torch.tensor([0.0, 0.0, 0.9])
    _, crossed = coverage(torch.cat([big, ahead]), both[1], cameras)
    assert len(crossed[1].near) > len(alone[1].near)


def test_edges_know_their_faces() -> None:
    vertices, faces = ball(2)
    edges = mesh_edges(faces, len(vertices))
    assert len(edges.ends) == len(faces) * 3 // 2
    assert edges.agree.all()
    assert (edges.faces >= 0).all()
    for side in range(2):
        assert all(
            set(e) <= set(f)
            for e, f in zip(edges.ends.tolist(), faces[edges.faces[:, side]].tolist(), strict=True)
        )
    opened = mesh_edges(faces[1:], len(vertices))
    assert (opened.faces[:, 1] < 0).sum() == 3
    assert len(opened.inner().ends) == len(opened.ends) - 3
    flipped = faces.clone()
    flipped[0] = flipped[0].flip(0)
    assert (~mesh_edges(flipped, len(vertices)).agree).sum() == 3
    fan = mesh_edges(torch.tensor([[0, 1, 2], [0, 1, 3], [0, 1, 4]]), 5)
    assert (fan.faces[:, 1] < 0).all()
    assert len(fan.ends) == 9


def test_outlines_lead_a_ball_to_the_right_size_and_place() -> None:
    """Descent on the coverage alone: nothing else moves the vertices."""
    vertices, faces = ball(2, 0.4)
    cameras = turntable_cameras(2, 24)
    want, _ = coverage(vertices * 1.4 + torch.tensor([0.1, 0.15, 0.0]), faces, cameras)
    size, place = (
        torch.ones((), dtype=torch.float64, requires_grad=True),
        torch.zeros(3, dtype=torch.float64, requires_grad=True),
    )
    adam = torch.optim.Adam([size, place], lr=0.03)
    for _ in range(40):
        alpha, _ = coverage(vertices * size + place, faces, cameras)
        adam.zero_grad()
        (alpha - want.detach()).square().sum().backward()
        adam.step()
    assert float(size.detach()) == pytest.approx(1.4, abs=0.03)
    torch.testing.assert_close(
        place.detach(), torch.tensor([0.1, 0.15, 0.0], dtype=torch.float64), atol=0.02, rtol=0
    )
