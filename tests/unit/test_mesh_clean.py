"""Cleaning: each repair on a surface that has exactly that defect."""

import math

import numpy as np
import pytest
import torch
import trimesh
from scipy import ndimage
from skimage.measure import marching_cubes

from sds3d.errors import ConfigError, ExportError
from sds3d.interfaces import Surface
from sds3d.mesh import clean as c


def surface(mesh: trimesh.Trimesh) -> Surface:
    return c.to_surface(np.asarray(mesh.vertices), np.asarray(mesh.faces, dtype=np.int64))


def ball(subdivisions=3, radius=1.0, at=(0.0, 0.0, 0.0)) -> Surface:
    mesh = trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius)
    mesh.apply_translation(at)
    return surface(mesh)


def flipped(one: Surface) -> Surface:
    return Surface(vertices=one.vertices, faces=one.faces.flip(1))


def joined(*parts: Surface) -> Surface:
    offsets = np.cumsum([0] + [len(p.vertices) for p in parts])
    return Surface(
        vertices=torch.cat([p.vertices for p in parts]),
        faces=torch.cat([p.faces + int(o) for p, o in zip(parts, offsets[:-1], strict=True)]),
    )


def without_faces(one: Surface, gone) -> Surface:
    return Surface(vertices=one.vertices, faces=one.faces[~gone])


def sponge(seed: int, cells: int = 64, sigma: float = 1.6) -> Surface:
    """A noisy ball full of tunnels: what an under-trained density field looks like."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((cells,) * 3), sigma)
    axis = np.linspace(-1, 1, cells)
    radius = np.sqrt((np.stack(np.meshgrid(axis, axis, axis, indexing="ij")) ** 2).sum(0))
    field = 0.25 * noise / noise.std() + 3 * (0.7 - radius)
    vertices, faces, _, _ = marching_cubes(field, 0.0, gradient_direction="descent")
    return c.to_surface(vertices, faces.astype(np.int64))


def test_measure_of_known_shapes():
    sphere = c.measure(ball(4))
    assert sphere.watertight
    assert (sphere.components, sphere.euler, sphere.faces) == (1, 2, 5120)
    assert sphere.volume == pytest.approx(4 / 3 * math.pi, rel=0.01)
    assert sphere.area == pytest.approx(4 * math.pi, rel=0.01)
    assert sphere.low == pytest.approx((-1, -1, -1), abs=0.01)
    assert c.measure(surface(trimesh.creation.torus(1.0, 0.3))).euler == 0
    assert c.measure(flipped(ball())).volume < 0


def test_measure_reports_each_defect():
    one_missing = c.measure(without_faces(ball(), torch.arange(1280) == 5))
    assert not one_missing.watertight
    assert (one_missing.border_edges, one_missing.knotted_edges) == (3, 0)
    one = ball()
    turned = one.faces.clone()
    turned[7] = turned[7].flip(0)
    assert c.measure(Surface(vertices=one.vertices, faces=turned)).knotted_edges == 3


def test_measure_agrees_with_trimesh_on_a_sponge():
    one = c.fill_holes(c.tidy(sponge(0)))  # an open surface has no volume of its own
    stats = c.measure(one)
    other = trimesh.Trimesh(one.vertices.numpy(), one.faces.numpy(), process=False)
    assert stats.volume == pytest.approx(other.volume, rel=1e-5)
    assert stats.area == pytest.approx(other.area, rel=1e-5)
    assert stats.components == other.body_count
    assert stats.watertight == other.is_watertight


def test_tidy_welds_a_triangle_soup_back():
    one = ball()
    soup = Surface(
        vertices=one.vertices[one.faces].reshape(-1, 3), faces=torch.arange(3 * 1280).reshape(-1, 3)
    )
    assert not c.measure(soup).watertight
    assert c.measure(c.tidy(soup)) == c.measure(c.tidy(one))


def test_tidy_removes_doubled_faces_and_folded_sheets():
    one = ball()
    extra = torch.cat([one.faces, one.faces[3:4].roll(1, 1), torch.tensor([[4, 4, 9]])])
    assert c.measure(c.tidy(Surface(vertices=one.vertices, faces=extra))).watertight
    sheet = torch.tensor([[1000, 1001, 1002], [1002, 1001, 1000]])
    vertices = torch.cat([one.vertices, torch.rand(1003 - len(one.vertices), 3, generator=torch.Generator())])
    folded = c.tidy(Surface(vertices=vertices, faces=torch.cat([one.faces, sheet])))
    assert len(folded.faces) == 1280
    assert len(folded.vertices) == len(one.vertices)


def test_tidy_keeps_the_winding():
    assert c.measure(c.tidy(flipped(ball()))).volume < 0


def test_specks_and_cavities_go_and_large_parts_stay():
    big, second = ball(), ball(radius=0.5, at=(3, 0, 0))
    speck, cavity = ball(2, radius=0.05, at=(0, 2, 0)), flipped(ball(radius=0.6))
    kept = c.drop_specks(joined(speck, cavity, big, second), 0.02)
    assert c.measure(kept).components == 2
    assert c.measure(kept).volume == pytest.approx(c.measure(joined(big, second)).volume, rel=1e-5)
    inside_out = c.drop_specks(flipped(joined(cavity, big)), 0.02)
    assert c.measure(inside_out).volume == pytest.approx(-c.measure(big).volume, rel=1e-5)


def test_outward_orientation_is_idempotent():
    once = c.orient_outward(flipped(ball()))
    assert c.measure(once).volume > 0
    assert torch.equal(c.orient_outward(once).faces, once.faces)


@pytest.mark.parametrize("limit", [c.MAX_EAR_EDGES, 0], ids=["ears", "fan"])
def test_holes_close_flat(limit, monkeypatch):
    """An open tube over a regular polygon: its flat lids make a prism, whose volume is known exactly."""
    monkeypatch.setattr(c, "MAX_EAR_EDGES", limit)
    n, height = 100, 1.5
    angle = 2 * np.pi * np.arange(n) / n
    low = np.stack([np.cos(angle), np.sin(angle), 0 * angle], 1)
    i, j = np.arange(n), np.roll(np.arange(n), -1)
    sides = np.concatenate([np.stack([i, j, j + n], 1), np.stack([i, j + n, i + n], 1)])
    filled = c.measure(
        c.fill_holes(c.to_surface(np.concatenate([low, low + np.array([0, 0, height])]), sides))
    )
    assert filled.watertight
    assert filled.euler == 2
    assert filled.volume == pytest.approx(height * n / 2 * math.sin(2 * math.pi / n), rel=1e-5)


def test_a_bent_hole_is_filled_without_overlap():
    """A C-shaped hole in a flat sheet: ears keep the area; a fan round the centre would overlap itself."""
    axis = np.arange(13.0)
    x, y = np.meshgrid(axis, axis, indexing="ij")
    vertices = np.stack([x, y, 0 * x], -1).reshape(-1, 3)
    i, j = (a.reshape(-1) for a in np.meshgrid(np.arange(12), np.arange(12), indexing="ij"))
    corner = i * 13 + j
    faces = np.concatenate(
        [np.stack([corner, corner + 13, corner + 14], 1), np.stack([corner, corner + 14, corner + 1], 1)]
    )
    ring = (i >= 3) & (i <= 8) & (j >= 3) & (j <= 8)
    hole = ring & ~((i >= 5) & (j >= 5) & (j <= 6))
    filled = c.fill_holes(c.to_surface(vertices, faces[~np.tile(hole, 2)]))
    assert c.measure(filled).watertight  # the outer border is a loop too: the sheet becomes two-sided
    top = c.to_arrays(filled)
    corners = top[0][top[1]]
    up = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])[:, 2] / 2
    assert up[up > 0].sum() == pytest.approx(144.0)
    assert up[up < 0].sum() == pytest.approx(-144.0)


def test_holes_that_touch_in_a_vertex_close():
    one = ball()
    hub = int(one.faces[0, 0])
    around = torch.nonzero((one.faces == hub).any(1)).flatten()
    gone = torch.zeros(len(one.faces), dtype=torch.bool)
    gone[around[0]] = True
    apart = [
        f
        for f in around[1:].tolist()
        if not len(set(one.faces[f].tolist()) & set(one.faces[around[0]].tolist())) > 1
    ]
    gone[apart[0]] = True
    filled = c.measure(c.fill_holes(without_faces(one, gone)))
    assert filled.watertight
    assert filled.faces == 1280


def test_smoothing_takes_off_steps_and_keeps_the_volume():
    axis = np.arange(40) - 19.5
    solid = (np.stack(np.meshgrid(axis, axis, axis, indexing="ij")) ** 2).sum(0) < 15**2
    vertices, faces, _, _ = marching_cubes(solid.astype(np.float32), 0.5, gradient_direction="descent")
    stairs = c.to_surface(vertices - 19.5, faces.astype(np.int64))
    smooth = c.smooth(stairs, 10)

    def tilt(one):
        """Mean angle between faces and the ball that they approximate."""
        vertices, faces = c.to_arrays(one)
        corners = vertices[faces]
        normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        outward = corners.mean(1)
        cosine = (normal * outward).sum(1) / np.linalg.norm(normal, axis=1) / np.linalg.norm(outward, axis=1)
        return np.arccos(np.clip(np.abs(cosine), 0, 1)).mean()

    assert tilt(smooth) < 0.5 * tilt(stairs)
    assert c.measure(smooth).volume == pytest.approx(c.measure(stairs).volume, rel=0.01)
    assert torch.equal(c.smooth(stairs, 0).vertices, stairs.vertices)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_sponge_keeps_budget_and_stays_closed(seed):
    """Plain quadric collapses knot thin walls of such surfaces; the result must still be closed and small."""
    cleaned = c.clean(sponge(seed), max_faces=3000)
    stats = c.measure(cleaned)
    assert stats.watertight
    assert stats.faces <= 3000 * 1.02
    assert stats.volume > 0


def test_decimation_keeps_shape():
    fine = ball(5)
    coarse = c.decimate(fine, 1000)
    assert 900 <= len(coarse.faces) <= 1000
    assert c.measure(coarse).watertight
    assert c.measure(coarse).volume == pytest.approx(c.measure(fine).volume, rel=0.02)
    assert c.decimate(coarse, 5000) is coarse
    with pytest.raises(ConfigError, match="at least 4"):
        c.decimate(fine, 3)


def test_normals_of_a_ball_approach_its_positions():
    errors = [float((c.vertex_normals(ball(k)) - ball(k).vertices).abs().max()) for k in (2, 3, 4)]
    assert errors[2] < 0.003
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.6 * errors[1]


def test_normals_of_faces_without_area_are_still_unit():
    flat = Surface(vertices=torch.zeros(3, 3), faces=torch.tensor([[0, 1, 2]]))
    assert torch.equal(c.vertex_normals(flat).norm(dim=1), torch.ones(3))


def test_nothing_left_is_an_export_error():
    with pytest.raises(ExportError, match="no faces"):
        c.clean(
            Surface(vertices=torch.zeros(0, 3), faces=torch.zeros(0, 3, dtype=torch.int64)), max_faces=100
        )
