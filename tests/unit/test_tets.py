"""Marching tetrahedra: closed, manifold, outward, in the right place, and differentiable."""

import math

import pytest
import torch
import trimesh

from sds3d.interfaces import Surface
from sds3d.mathx import mesh_penalty
from sds3d.mesh.clean import measure
from sds3d.mesh.tets import SAFE_OFFSET_CELLS, TetLattice, extract, march_tets
from sds3d.ops.mesh_edges import mesh_edges
from sds3d.ops.signed_distance import lattice_distance
from sds3d.rng import Stream

STREAM = Stream(5, "tets")
LATTICE = TetLattice(24, 1.0)


def sphere(points: torch.Tensor, radius: float = 0.6) -> torch.Tensor:
    return points.norm(dim=-1) - radius


def torus(points: torch.Tensor, large: float = 0.55, small: float = 0.22) -> torch.Tensor:
    ring = points[..., [0, 2]].norm(dim=-1) - large
    return (ring.square() + points[..., 1].square()).sqrt() - small


def stats(surface):  # type: ignore[no-untyped-def]
    return measure(Surface(vertices=surface.vertices.detach().float(), faces=surface.faces))


def test_the_lattice_fills_its_cube_with_equal_upright_tetrahedra() -> None:
    lattice = TetLattice(3, 1.0)
    points = lattice.positions()
    inside = torch.zeros(lattice.count, dtype=torch.bool)
    volume = 0.0
    seen = set()
    for vertex in range(
        lattice.count
    ):  # every tetrahedron has four vertices of which one may be the only inside
        inside.zero_()
        inside[vertex] = True
        tets = lattice.active_tets(inside)
        a, b, c, d = (points[tets[:, i]] for i in range(4))
        size = ((b - a) * torch.linalg.cross(c - a, d - a)).sum(-1) / 6
        torch.testing.assert_close(size, torch.full_like(size, lattice.cell_m**3 / 12))
        new = [tuple(sorted(t)) for t in tets.tolist()]
        volume += sum(s for s, t in zip(size.tolist(), new, strict=True) if t not in seen)
        seen |= set(new)
    # Whole but for a pyramid of a sixth of a cell under every outer face of a border cell.
    assert volume == pytest.approx(8.0 - 6 * 9 * lattice.cell_m**3 / 6)


@pytest.mark.parametrize(
    ("shape", "euler", "volume"),
    [(sphere, 2, 4 / 3 * math.pi * 0.6**3), (torus, 0, 2 * math.pi**2 * 0.55 * 0.22**2)],
)
def test_sphere_and_torus_are_closed_oriented_and_in_place(shape, euler: int, volume: float) -> None:  # type: ignore[no-untyped-def]
    points = LATTICE.positions()
    surface = extract(LATTICE, points, LATTICE.closed(shape(points)))
    found = stats(surface)
    assert found.watertight
    assert (found.euler, found.components) == (euler, 1)
    assert found.volume == pytest.approx(volume, rel=0.03)
    assert shape(surface.vertices).abs().max() < 0.1 * LATTICE.cell_m
    assert surface.mesh_edges().agree.all()


def test_any_values_give_a_closed_surface_even_with_moved_vertices() -> None:
    points = LATTICE.positions()
    shift = torch.sign(STREAM.fork("shift").normal(LATTICE.count, 3)) * SAFE_OFFSET_CELLS * LATTICE.cell_m
    noise = STREAM.fork("noise").normal(LATTICE.count)
    for values in (noise, -noise.abs(), noise - 1.5):
        surface = extract(LATTICE, points + shift, LATTICE.closed(values))
        edges = surface.mesh_edges()
        assert edges.agree.all()  # two faces at every edge, running it in opposite directions
        assert stats(surface).volume > 0
    tets = LATTICE.active_tets(noise < 0)
    a, b, c, d = ((points + shift)[tets[:, i]] for i in range(4))
    assert ((b - a) * torch.linalg.cross(c - a, d - a)).sum(-1).min() > 0


def test_nothing_inside_gives_an_empty_mesh() -> None:
    surface = extract(LATTICE, LATTICE.positions(), torch.ones(LATTICE.count))
    assert surface.faces.shape == (0, 3)
    assert surface.vertices.shape == (0, 3)


@pytest.mark.parametrize("code", range(1, 15))
def test_every_sign_pattern_faces_outward(code: int) -> None:
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    sdf = torch.tensor([-0.3 - 0.1 * i if code >> i & 1 else 0.4 + 0.1 * i for i in range(4)])
    surface = march_tets(points, sdf, torch.tensor([[0, 1, 2, 3]]))
    a, b, c = (surface.vertices[surface.faces[:, i]] for i in range(3))
    rise = torch.linalg.solve(points[1:] - points[:1], sdf[1:] - sdf[0])  # the gradient of s
    assert ((torch.linalg.cross(b - a, c - a)) @ rise > 0).all()


def test_gradients_match_finite_differences() -> None:
    lattice = TetLattice(4, 1.0)
    points = (lattice.positions() + 0.02 * Stream(5, "g").normal(lattice.count, 3)).double()
    sdf = lattice.closed(sphere(points, 0.45)).double()
    tets = lattice.active_tets(sdf < 0)
    ends = sdf[march_tets(points, sdf, tets).edges]
    share = ends[:, 0] / (ends[:, 0] - ends[:, 1])
    assert 0.025 < share.min() < share.max() < 0.98  # nothing is held off the ends of its edge

    def vertices(at: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return march_tets(at, values, tets).vertices

    assert torch.autograd.gradcheck(
        vertices, (points.requires_grad_(), sdf.requires_grad_()), eps=1e-6, atol=1e-6, fast_mode=True
    )


def test_slivers_are_kept_off() -> None:
    points = LATTICE.positions()
    surface = extract(LATTICE, points, LATTICE.closed(sphere(points, 0.5)))  # meets lattice vertices exactly
    area = mesh_penalty.face_normals(surface.vertices, surface.faces).norm(dim=-1)
    assert area.min() > 1e-5 * LATTICE.cell_m**2


def test_signed_distance_to_a_mesh() -> None:
    count, low = 33, -1.0
    step = 2.0 / (count - 1)
    axis = torch.linspace(-1, 1, count)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    for shape, exact in (
        (trimesh.creation.icosphere(subdivisions=4, radius=0.6), sphere(points)),
        (trimesh.creation.box((0.8, 1.0, 0.4)), box(points, (0.4, 0.5, 0.2))),
    ):
        vertices, faces = torch.tensor(shape.vertices, dtype=torch.float32), torch.tensor(shape.faces)
        found = lattice_distance(vertices, faces, low=low, step=step, count=count)
        near = exact.abs() < step
        assert (found - exact).abs()[near].max() < 0.03 * step
        assert (found - exact).abs().max() < step
        assert ((found < 0) == (exact < 0))[exact.abs() > 0.05 * step].all()
        holed = lattice_distance(vertices, faces[1:], low=low, step=step, count=count)
        if len(faces) > 100:
            assert ((holed < 0) == (exact < 0))[exact.abs() > 0.05 * step].float().mean() > 0.999


def box(points: torch.Tensor, half: tuple[float, float, float]) -> torch.Tensor:
    away = points.abs() - torch.tensor(half)
    return away.clamp_min(0).norm(dim=-1) + away.amax(-1).clamp_max(0)


# The regularisers.


def test_normal_consistency_of_a_cube_and_a_plane() -> None:
    shape = trimesh.creation.box((1.0, 1.0, 1.0))
    vertices, faces = torch.tensor(shape.vertices), torch.tensor(shape.faces)
    pairs = mesh_edges(faces, 8).faces
    assert float(mesh_penalty.normal_consistency(vertices, faces, pairs)) == pytest.approx(12 / 18)
    flat = vertices * torch.tensor([1.0, 1.0, 0.0])
    upper = faces[(vertices[faces][..., 2] > 0).all(1)]
    pairs = mesh_edges(upper, 8).inner().faces
    assert float(mesh_penalty.normal_consistency(flat, upper, pairs)) == pytest.approx(0.0, abs=1e-9)


def test_laplacian_and_edge_length_of_an_icosahedron() -> None:
    """Unit vertices, neighbours at cosine 1 / sqrt 5: (1 - 1 / sqrt 5)^2 over edges of 2 - 2 / sqrt 5 squared."""
    shape = trimesh.creation.icosahedron()
    vertices, faces = torch.tensor(shape.vertices), torch.tensor(shape.faces)
    vertices = vertices / vertices.norm(dim=1, keepdim=True)
    ends = mesh_edges(faces, 12).ends
    exact = (1 - 1 / math.sqrt(5)) ** 2 / (2 - 2 / math.sqrt(5))
    for scale in (1.0, 0.1):  # without units
        assert float(mesh_penalty.laplacian(vertices * scale, ends)) == pytest.approx(exact)
        assert float(mesh_penalty.edge_length(vertices * scale, ends)) == pytest.approx(0.0, abs=1e-9)
    line = torch.tensor([[0.0, 0, 0], [1, 0, 0], [4, 0, 0]])
    ends = torch.tensor([[0, 1], [1, 2]])
    assert float(mesh_penalty.edge_length(line, ends)) == pytest.approx(0.25)
    # away: 1, (0 + 4) / 2 - 1 = 1, 3; mean square 11 / 3 over (1 + 9) / 2
    assert float(mesh_penalty.laplacian(line, ends)) == pytest.approx(11 / 3 / 5)


def test_eikonal_is_zero_for_distances_and_known_for_multiples() -> None:
    points = LATTICE.positions().double()
    plane = points @ torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64) - 0.1
    tets = LATTICE.active_tets(plane < 0)
    assert float(mesh_penalty.eikonal(points, plane, tets)) == pytest.approx(0.0, abs=1e-9)
    assert float(mesh_penalty.eikonal(points, 3 * plane, tets)) == pytest.approx(4.0)
    ball = sphere(points)
    assert float(mesh_penalty.eikonal(points, ball, LATTICE.active_tets(ball < 0))) < 1e-3


def test_sdf_sign_closed_form_and_direction() -> None:
    sdf = torch.tensor([0.2, -0.1], dtype=torch.float64, requires_grad=True)
    loss = mesh_penalty.sdf_sign(sdf, torch.tensor([[0, 1]]), 0.1)
    # BCE(2 against 0) + BCE(-1 against 1)
    assert float(loss.detach()) == pytest.approx(math.log1p(math.exp(2)) + math.log1p(math.exp(1)))
    loss.backward()
    assert sdf.grad[0] > 0 > sdf.grad[1]  # descent lowers the positive end, raises the negative one


def test_gradients_of_regularisers_match_finite_differences() -> None:
    lattice = TetLattice(4, 1.0)
    points = lattice.positions().double()
    sdf = lattice.closed(sphere(points, 0.45)).double()
    tets = lattice.active_tets(sdf < 0)
    shape = trimesh.creation.icosphere(subdivisions=1)
    faces = torch.tensor(shape.faces)
    noise = STREAM.fork("r").normal(len(shape.vertices), 3).double()
    vertices = (torch.tensor(shape.vertices) + 0.05 * noise).requires_grad_()
    edges = mesh_edges(faces, len(vertices))
    check = torch.autograd.gradcheck
    assert check(lambda s: mesh_penalty.eikonal(points, s, tets), (sdf.requires_grad_(),), fast_mode=True)
    assert check(
        lambda v: mesh_penalty.normal_consistency(v, faces, edges.faces), (vertices,), fast_mode=True
    )
    # The yardsticks of these two receive no gradient, so only differences at a fixed yardstick compare.
    for penalty, rigid in ((mesh_penalty.laplacian, True), (mesh_penalty.edge_length, False)):
        (slope,) = torch.autograd.grad(penalty(vertices, edges.ends), vertices)
        assert slope.abs().max() > 0
        if rigid:
            torch.testing.assert_close(slope.sum(0), torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)
