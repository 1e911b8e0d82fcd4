import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from sds3d.errors import ExportError
from sds3d.interfaces import Cameras, Render, Shading, Surface
from sds3d.mesh.isosurface import auto_iso, marching_cubes
from sds3d.ops.hashgrid import HashGridConfig
from sds3d.rng import Stream
from sds3d.scenes.hashgrid import HashGridFieldConfig
from sds3d.scenes.nerf import NerfScene

STREAM = Stream(11, "nerf")
FIELD = HashGridFieldConfig(encoding=HashGridConfig(log2_rows=12, finest_cells=64))
CONFIG = NerfScene.Config(field=FIELD, samples_per_ray=48)


class Untouched:
    """An optimiser that a NeRF must leave alone: its parameters keep their shapes."""

    def replace(self, *given: object) -> None:
        raise AssertionError("a NeRF never replaces parameters")


UNUSED = Untouched()


def cameras(azimuth: list[float], elevation_deg: float = 15.0, px: int = 24) -> Cameras:
    a, radius = torch.tensor(azimuth).deg2rad(), torch.full((len(azimuth),), 3.3)
    e = torch.full_like(a, math.radians(elevation_deg))
    outward = torch.stack([a.sin() * e.cos(), e.sin(), a.cos() * e.cos()], -1)
    right = torch.stack([a.cos(), torch.zeros_like(a), -a.sin()], -1)
    c2w = torch.eye(4).repeat(len(a), 1, 1)
    c2w[:, :3, :3] = torch.stack([right, -torch.linalg.cross(outward, right), -outward], -1)
    c2w[:, :3, 3] = outward * radius[:, None]
    focal = px / 2 / math.tan(math.radians(20))
    intrinsics = torch.tensor([[focal, 0, px / 2], [0, focal, px / 2], [0, 0, 1]]).repeat(len(a), 1, 1)
    return Cameras(
        c2w=c2w,
        intrinsics=intrinsics,
        width_px=px,
        height_px=px,
        azimuth_deg=a.rad2deg(),
        elevation_deg=e.rad2deg(),
        radius=radius,
        fov_deg=torch.full_like(a, 40.0),
    )


def lit(mode: str, b: int) -> Shading:
    light = nn.functional.normalize(torch.tensor([[0.3, 1.0, 0.5]]), dim=-1).expand(b, 3)
    return Shading(mode=mode, background=torch.ones(b, 3), light=light, ambient=0.2)


def scene(config: NerfScene.Config = CONFIG) -> NerfScene:
    return NerfScene(config, STREAM.fork("init"))


class Ball(nn.Module):
    """A ball of 0.7 m with a soft edge and known normals."""

    def __init__(self, center: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> None:
        super().__init__()
        self.encoding = nn.Module()
        self.encoding.table = nn.Parameter(torch.ones(1))
        self.center = torch.tensor(center)

    def density(self, points: torch.Tensor, *, progress: float = 1.0) -> torch.Tensor:
        edge = (0.7 - (points - self.center).norm(dim=-1)) / 0.02
        return 80.0 * torch.sigmoid(edge) * self.encoding.table

    def density_color(self, points: torch.Tensor, *, progress: float = 1.0):
        return self.density(points), torch.tensor([0.8, 0.4, 0.2]).expand_as(points)


def ball_scene(**changes: object) -> NerfScene:
    made = scene(replace(CONFIG, **changes)).eval()
    made.field = Ball()
    return made


def train(made: NerfScene, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        view = made.render(cameras([40.0 * step]), Shading(), STREAM.at(step), progress=step / 6)
        loss = (view.rgb - 0.3).square().mean() + 0.01 * made.penalties(view)["tv_density"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        made.adapt(view, UNUSED, step)


def adam(made: NerfScene) -> torch.optim.Optimizer:
    return torch.optim.Adam([{"params": list(g.params), "lr": g.lr} for g in made.groups()])


def test_the_first_render_is_a_centred_blob() -> None:
    alpha = scene().eval().render(cameras([0.0, 120.0], px=33), Shading(), STREAM).alpha[:, 0]
    assert alpha[:, 16, 16].min() > 0.95
    border = torch.cat([alpha[:, 0], alpha[:, -1], alpha[:, :, 0], alpha[:, :, -1]], 1)
    assert border.max() < 0.05


def test_culling_by_occupancy_leaves_the_image_unchanged() -> None:
    made = ball_scene(occupancy_threshold=1e-3)
    dense = made.render(cameras([0.0, 60.0]), Shading(), STREAM)
    made.adapt(dense, UNUSED, 0)
    axis = (torch.arange(32) + 0.5) / 16 * 1.05 - 1.05
    middles = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).norm(dim=-1)
    assert made.occupancy.occupied[middles < 0.7].all()
    assert not made.occupancy.occupied[middles > 0.98].any()
    culled = made.render(cameras([0.0, 60.0]), Shading(), STREAM)
    assert culled.private.weights.numel() < dense.private.weights.numel()
    # A depth is an opacity times metres: the same bound, at the distance of the far side of the ball.
    for name, bound in (("rgb", 1e-3), ("alpha", 1e-3), ("depth", 1e-3 * (3.3 + 1.05))):
        torch.testing.assert_close(getattr(culled, name), getattr(dense, name), atol=bound, rtol=0)


def test_a_ball_has_its_depth_its_colour_and_radial_normals() -> None:
    view = ball_scene(normals="analytic").render(cameras([30.0], px=33), lit("textureless", 1), STREAM)
    assert math.isclose(view.depth[0, 0, 16, 16].item(), 3.3 - 0.7, abs_tol=0.05)
    camera = cameras([30.0]).c2w[0, :3, 3]
    outward = nn.functional.normalize(camera, dim=-1)
    assert (view.normal[0, :, 16, 16] @ outward).item() > 0.995
    albedo = ball_scene().render(cameras([30.0], px=33), Shading(), STREAM).rgb[0, :, 16, 16]
    torch.testing.assert_close(albedo, torch.tensor([0.8, 0.4, 0.2]), atol=1e-3, rtol=0)


def test_both_normals_agree_on_a_smooth_field() -> None:
    points = nn.functional.normalize(STREAM.fork("points").normal(60, 3), dim=-1) * 0.7
    for mode in ("analytic", "finite_difference"):
        normals = ball_scene(normals=mode, normal_step_m=0.01).normals(points)
        torch.testing.assert_close(normals, points / 0.7, atol=2e-2, rtol=0)


def test_background_shows_where_nothing_is_and_not_where_matter_is() -> None:
    made = ball_scene()
    red, blue = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 0, 1.0]])
    one = made.render(cameras([0.0], px=33), Shading(background=red), STREAM)
    two = made.render(cameras([0.0], px=33), Shading(background=blue), STREAM)
    torch.testing.assert_close(one.rgb[0, :, 0, 0], red[0])
    torch.testing.assert_close(one.rgb - two.rgb, (1 - one.alpha) * (red - blue)[:, :, None, None])
    assert made.render(cameras([0.0]), Shading(), STREAM).rgb[0, :, 0, 0].abs().max() == 0


def test_a_learned_background_is_used_only_where_none_is_given() -> None:
    made = scene(replace(CONFIG, background="learned"))
    assert [group.name for group in made.groups()] == ["encoding", "network", "background"]
    given = made.render(cameras([0.0]), Shading(background=torch.zeros(1, 3)), STREAM).rgb
    assert given[0, :, 0, 0].abs().max() == 0
    own = made.render(cameras([0.0]), Shading(), STREAM).rgb
    own.sum().backward()
    assert own[0, :, 0, 0].min() > 0
    assert all(p.grad.abs().max() > 0 for p in made.environment.parameters())


def test_locked_levels_get_no_gradient_until_they_are_released() -> None:
    made = scene()
    first_locked = made.field.encoding.levels[FIELD.start_levels][1]
    for progress, released in ((0.0, False), (1.0, True)):
        made.zero_grad()
        made.render(cameras([0.0]), Shading(), STREAM, progress=progress).rgb.sum().backward()
        assert bool(made.field.encoding.table.grad[first_locked:].any()) is released
        assert made.field.encoding.table.grad[:first_locked].any()


def test_levels_unlock_one_by_one() -> None:
    counts = [scene().field.active_levels(p) for p in (0.0, 0.1, 0.2, 0.3, 0.4, 1.0)]
    assert counts == [4, 5, 6, 7, 8, 8]


def test_same_stream_same_image_and_training_jitters() -> None:
    made = scene()
    a, b = (made.render(cameras([0.0]), Shading(), STREAM).rgb for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, made.render(cameras([0.0]), Shading(), STREAM.at(1)).rgb)
    made.eval()
    a, b = (made.render(cameras([0.0]), Shading(), STREAM.at(k)).rgb for k in range(2))
    assert torch.equal(a, b)


def test_resuming_takes_the_same_path_bit_for_bit() -> None:
    config = replace(CONFIG, occupancy_every_steps=2, occupancy_warmup_steps=3)
    straight = scene(config)
    train(straight, adam(straight), range(6))
    stopped = scene(config)
    optimizer = adam(stopped)
    train(stopped, optimizer, range(3))
    resumed = NerfScene(config, STREAM.fork("init"))
    resumed.load_state_dict(stopped.state_dict())
    resumed_optimizer = adam(resumed)
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    train(resumed, resumed_optimizer, range(3, 6))
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_every_penalty_is_a_finite_scalar_that_reaches_the_field() -> None:
    made = scene()
    view = made.render(cameras([0.0, 90.0]), Shading(), STREAM)
    penalties = made.penalties(view)
    assert tuple(penalties) == made.penalty_names
    for name, value in penalties.items():
        assert value.shape == ()
        (gradient,) = torch.autograd.grad(value, made.field.encoding.table, retain_graph=True)
        assert torch.isfinite(gradient).all(), name
        assert gradient.any(), name


def test_a_penalty_is_computed_when_asked_for_and_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = scene(), []
    view = made.render(cameras([0.0]), Shading(), STREAM)
    original = made.normals
    monkeypatch.setattr(made, "normals", lambda *a, **k: calls.append(1) or original(*a, **k))
    penalties = made.penalties(view)
    assert penalties["opacity"].item() > 0
    assert calls == []
    assert penalties["orientation"] is penalties["orientation"]
    assert calls == [1]


def test_lit_modes_shade_a_ball_and_textureless_ignores_its_colour() -> None:
    made = scene()
    view = made.render(cameras([0.0]), lit("textureless", 1), STREAM)
    inside = view.rgb.detach()[0][:, view.alpha[0, 0] > 0.99]
    assert inside.std(1).min() > 0.1
    torch.testing.assert_close(inside[0], inside[2])
    view.rgb.sum().backward()
    last = made.field.network[-1]
    assert not last.weight.grad[1:].any()
    assert last.weight.grad[0].any()
    length = view.normal.detach().norm(dim=1)[view.alpha.detach()[:, 0] > 0.5]
    torch.testing.assert_close(length, torch.ones_like(length))


def test_an_empty_scene_renders_its_background_and_keeps_a_graph() -> None:
    made = scene()
    made.occupancy.estimator.binaries.fill_(False)
    view = made.render(cameras([0.0]), Shading(background=torch.full((1, 3), 0.25)), STREAM)
    assert torch.equal(view.rgb, torch.full_like(view.rgb, 0.25))
    view.rgb.sum().backward()


def test_a_foreign_render_is_refused() -> None:
    blank = torch.zeros(1, 1, 2, 2)
    with pytest.raises(TypeError, match="NerfScene"):
        scene().penalties(Render(rgb=blank.expand(1, 3, 2, 2), alpha=blank, depth=blank))


def signed_volume(surface: Surface) -> float:
    a, b, c = surface.vertices.double()[surface.faces].unbind(1)
    return float((a * torch.linalg.cross(b, c)).sum() / 6)


def assert_closed(surface: Surface) -> None:
    faces = surface.faces.numpy()
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    there = {tuple(edge) for edge in edges.tolist()}
    assert len(there) == len(edges)
    assert all((j, i) in there for i, j in there)


def test_the_surface_of_a_ball_is_closed_outward_and_in_its_place() -> None:
    made = ball_scene()
    made.field = Ball(center=(0.2, -0.1, 0.05))
    surface = made.surface(96)
    assert_closed(surface)
    radius = (surface.vertices - made.field.center).norm(dim=-1)
    assert radius.std() < 2e-3  # one level set
    assert abs(radius.mean().item() - 0.7) < 2.1 / 96  # within one cell of the middle of the soft edge
    assert math.isclose(signed_volume(surface), 4 / 3 * math.pi * radius.mean().item() ** 3, rel_tol=0.01)


def test_matter_at_the_border_is_closed_there() -> None:
    surface = marching_cubes(torch.full((9, 9, 9), 5.0), 1.0, 1.0)
    assert_closed(surface)
    assert 2.0**3 < signed_volume(surface) < 2.5**3  # at most one cell beyond the border


def test_the_iso_value_parts_two_levels_and_does_not_depend_on_the_empty_space() -> None:
    small = torch.zeros(20, 20, 20)
    small[5:15, 5:15, 5:15] = 30.0
    small[9:11, 9:11, 9:11] = 200.0
    large = nn.functional.pad(small, (20, 20, 20, 20, 20, 20))
    iso = auto_iso(small, 0.05)
    assert 0.5 < iso < 30.0
    assert math.isclose(iso, auto_iso(large, 0.05), rel_tol=1e-9)


def test_haze_is_left_out_by_the_iso_value() -> None:
    density = torch.full((20, 20, 20), 0.3)
    density[5:15, 5:15, 5:15] = 40.0
    assert 0.3 < auto_iso(density, 0.05) < 40.0


def test_an_empty_scene_has_no_surface() -> None:
    with pytest.raises(ExportError, match="empty"):
        auto_iso(torch.zeros(8, 8, 8), 0.1)
    with pytest.raises(ExportError, match="stays below"):
        marching_cubes(torch.ones(8, 8, 8), 2.0, 1.0)


def test_material_is_the_field_s_colour_and_dielectric() -> None:
    material = ball_scene().material(torch.zeros(5, 3))
    torch.testing.assert_close(material.base_color, torch.tensor([0.8, 0.4, 0.2]).expand(5, 3))
    assert not material.metallic.any()
    assert torch.equal(material.roughness, torch.full((5, 1), 0.6))
