import copy
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from sds3d.cameras.orbit import orbit_cameras, turntable_cameras
from sds3d.errors import ConfigError, ExportError
from sds3d.interfaces import Render, Shading, Surface
from sds3d.moment import Moment
from sds3d.ops.depth_normals import depth_normals
from sds3d.ops.raster import rasterize_mesh
from sds3d.optim import Optimizer, OptimizerConfig
from sds3d.rng import Stream
from sds3d.scenes.gaussian_adapt import MAX_COPIES, Rows, grow, relocate, split_mass
from sds3d.scenes.gaussian_density import seen_share
from sds3d.scenes.gaussians import PARAMETERS, GaussianScene
from tests.toys import gaussians_at as filled
from tests.toys import shell

STREAM = Stream(3, "gaussians")
CONFIG = GaussianScene.Config(count=300, cap=600, adapt_every_steps=5)


def scene(config: GaussianScene.Config = CONFIG, name: str = "init") -> GaussianScene:
    return GaussianScene(config, STREAM.fork(name))


def views(step: int, count: int = 2, px: int = 32):
    azimuth = torch.arange(count) * 360.0 / count + 37.0 * step
    full = torch.ones(count)
    return orbit_cameras(azimuth, full * 15.0, full * 3.3, full * 40.0, px)


def white(count: int) -> Shading:
    return Shading(background=torch.ones(count, 3))


def volume(surface: Surface) -> float:
    a, b, c = surface.vertices.double()[surface.faces].unbind(1)
    return float((a * torch.linalg.cross(b, c)).sum() / 6)


def is_closed(surface: Surface) -> bool:
    f = surface.faces
    edges = torch.cat([f[:, [0, 1]], f[:, [1, 2]], f[:, [2, 0]]])
    there = {(int(a), int(b)) for a, b in edges}
    return len(there) == len(edges) and all((b, a) in there for a, b in there)


# ------------------------------------------------------------------------------------------- the set changes


@pytest.mark.parametrize("copies", [1, 2, 5, MAX_COPIES])
@pytest.mark.parametrize("opacity", [0.05, 0.5, 0.95])
def test_copies_together_hide_as_much_as_the_one_they_replace(copies: int, opacity: float) -> None:
    o, s = split_mass(torch.tensor([opacity]), torch.tensor([[0.2, 0.1, 0.3]]), torch.tensor([copies]))
    x = torch.linspace(-6, 6, 20001, dtype=torch.float64) * 0.2
    one = opacity * torch.exp(-0.5 * (x / 0.2) ** 2)
    together = 1 - (1 - o.double() * torch.exp(-0.5 * (x / s[0, 0].double()) ** 2)) ** copies
    assert together.sum() == pytest.approx(float(one.sum()), rel=1e-5)
    assert together.max() == pytest.approx(opacity, rel=1e-5)
    torch.testing.assert_close(s / s[:, :1], torch.tensor([[1.0, 0.5, 1.5]]))


def rows_of(made: GaussianScene) -> Rows:
    return Rows.of({name: getattr(made, name).detach().clone() for name in PARAMETERS})


def test_relocation_moves_the_dead_and_hardly_changes_the_picture() -> None:
    made = filled(shell(400), scale=0.05, opacity=0.6)
    dead = torch.zeros(400, dtype=torch.bool)
    dead[::10] = True
    with torch.no_grad():
        made.opacity_logits[dead] = -12.0
    before = made.render(views(0), white(2), STREAM).alpha
    rows = relocate(rows_of(made), dead, STREAM.fork("relocate"))
    assert not dead[rows.gather].any(), "every row now stems from a living one"
    assert torch.equal(rows.gather[~dead], torch.arange(400)[~dead])
    source = rows.gather[dead]
    assert rows.fresh[dead].all()
    assert rows.fresh[source].all()
    untouched = ~rows.fresh
    for name in PARAMETERS:
        assert torch.equal(rows.values[name][untouched], getattr(made, name).detach()[untouched])
        if name not in ("means",):
            assert torch.equal(rows.values[name][dead], rows.values[name][source]), (
                f"{name}: copy and source agree"
            )
    shared = torch.bincount(source, minlength=400)[source] + 1
    opacity = torch.sigmoid(rows.values["opacity_logits"][dead])
    torch.testing.assert_close(1 - (1 - opacity) ** shared, torch.full_like(opacity, 0.6))
    assert (rows.values["log_scales"][dead] < math.log(0.05)).all()
    moved = (rows.values["means"][dead] - made.means.detach()[source]).norm(dim=-1)
    assert (moved > 0).all()
    assert moved.max() < 4 * 0.05
    with torch.no_grad():
        for name in PARAMETERS:
            getattr(made, name).copy_(rows.values[name])
    after = made.render(views(0), white(2), STREAM).alpha
    assert (after - before).abs().mean() < 0.01


def test_relocation_without_dead_or_without_living_does_nothing() -> None:
    rows = rows_of(scene())
    for dead in (torch.zeros(300, dtype=torch.bool), torch.ones(300, dtype=torch.bool)):
        assert relocate(rows, dead, STREAM) is rows


def test_growth_splits_the_large_and_clones_the_small() -> None:
    made = filled(shell(6), scale=0.03, opacity=0.6)
    with torch.no_grad():
        made.log_scales[4] = math.log(0.2)
    rows = grow(rows_of(made), torch.tensor([4, 1]), 0.1, STREAM)
    assert rows.gather.tolist() == [0, 1, 2, 3, 4, 5, 4, 1]
    assert rows.fresh.tolist() == [False, True, False, False, True, False, True, True]
    scales, means = rows.values["log_scales"].exp(), rows.values["means"]
    opacity = torch.sigmoid(rows.values["opacity_logits"])
    torch.testing.assert_close(scales[[4, 6]], torch.full((2, 3), 0.2 / 1.6))
    torch.testing.assert_close(means[4] + means[6], 2 * made.means.detach()[4])
    assert not torch.equal(means[4], means[6])
    torch.testing.assert_close(opacity[[4, 6]], torch.full((2,), 0.6))
    assert torch.equal(means[1], made.means.detach()[1])
    torch.testing.assert_close(1 - (1 - opacity[1]) * (1 - opacity[7]), torch.tensor(0.6))
    assert (scales[[1, 7]] < 0.03).all()


class Recorder:
    """An optimiser that only writes down what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, nn.Parameter, nn.Parameter, Tensor, Tensor]] = []

    def replace(self, name, old, new, gather, fresh) -> None:
        self.calls.append((name, old, new, gather, fresh))


def adapt_once(made: GaussianScene, step: int = 5, progress: float = 0.5) -> Recorder:
    recorder = Recorder()
    view = made.render(views(step), white(2), STREAM, progress=progress)
    (view.rgb - 0.2).square().mean().backward()
    made.adapt(view, recorder, step)
    return recorder


def test_adapt_grows_where_gradients_are_largest_and_tells_the_optimiser() -> None:
    made = scene()
    old = {name: getattr(made, name) for name in PARAMETERS}
    recorder = adapt_once(made)
    assert [call[0] for call in recorder.calls] == list(PARAMETERS) == [group.name for group in made.groups()]
    grown = round(0.15 * 300)
    busy = old["means"].grad.norm(dim=-1)
    for name, before, new, gather, fresh in recorder.calls:
        assert before is old[name]
        assert new is getattr(made, name)
        assert new.requires_grad
        assert len(new) == len(gather) == len(fresh) == 300 + grown
    assert set(gather[300:].tolist()) == set(busy.topk(grown).indices.tolist())
    assert len(made.gradient_sum) == len(made.gradient_count) == 300 + grown
    assert not made.gradient_sum.any()
    assert made.pixel_m == pytest.approx(3.3 / (16 / math.tan(math.radians(20))), rel=1e-5)


@pytest.mark.parametrize(("step", "progress"), [(0, 0.5), (4, 0.5), (5, 0.05), (5, 0.7)])
def test_adapt_outside_its_steps_only_gathers_gradients(step: int, progress: float) -> None:
    made = scene()
    assert adapt_once(made, step, progress).calls == []
    assert made.gradient_sum.sum() > 0


def test_the_cap_holds() -> None:
    made = scene(replace(CONFIG, cap=310, grow_frac=1.0))
    for step in (5, 10, 15):
        adapt_once(made, step)
    assert len(made.means) == 310


@pytest.mark.parametrize("what", ["opacity", "scale", "bound"])
@pytest.mark.parametrize("dead", ["relocate", "remove"])
def test_the_dead_are_moved_or_removed(what: str, dead: str) -> None:
    made = scene(replace(CONFIG, dead=dead, grow_frac=0.0))
    with torch.no_grad():
        if what == "opacity":
            made.opacity_logits[:7] = -9.0
        elif what == "scale":
            made.log_scales[:7, 1] = 0.0
        else:
            made.means[:7] *= 50.0
    recorder = adapt_once(made)
    gather, fresh = recorder.calls[0][3:]
    assert len(made.means) == (300 if dead == "relocate" else 293)
    assert (gather >= 7).all()
    assert fresh[:7].all() == (dead == "relocate")


def test_a_scene_of_dead_gaussians_stays_as_it_is() -> None:
    for dead in ("relocate", "remove"):
        made = scene(replace(CONFIG, dead=dead, grow_frac=0.0))
        with torch.no_grad():
            made.opacity_logits.fill_(-9.0)
        adapt_once(made)
        assert len(made.means) == 300


def test_nonfinite_gradients_are_not_gathered() -> None:
    made = scene()
    view = made.render(views(1), white(2), STREAM, progress=0.5)
    made.means.grad = torch.full_like(made.means, float("nan"))
    made.adapt(view, Recorder(), 1)
    assert not made.gradient_sum.any()
    assert not made.gradient_count.any()


# --------------------------------------------------------------------------------------- training and resuming


@cache
def known_scene() -> GaussianScene:
    """A ball, red above and blue below."""
    means = shell(1500, 0.5)
    color = torch.where(means[:, 1:2] > 0, torch.tensor([0.9, 0.1, 0.1]), torch.tensor([0.1, 0.2, 0.9]))
    return filled(means, scale=0.03, opacity=0.9, color=color)


def target(step: int) -> tuple[Render, Shading]:
    """Views of the known scene over a plain colour."""
    known = known_scene()
    shading = Shading(background=STREAM.at(step).uniform(2, 3))
    with torch.no_grad():
        return known.render(views(step), shading, STREAM), shading


def train(made: GaussianScene, optimizer: Optimizer, steps: range, total: int) -> None:
    for step in steps:
        wanted, shading = target(step)
        view = made.render(views(step), shading, STREAM.at(step), progress=step / total)
        loss = (view.rgb - wanted.rgb).square().sum() / 4 + 0.01 * made.penalties(view)["scale"]
        optimizer.step(loss, Moment(step, total))
        made.adapt(view, optimizer, step)


def fresh_run() -> tuple[GaussianScene, Optimizer]:
    made = scene()
    return made, Optimizer(made.groups(), OptimizerConfig())


def test_an_oracle_is_learned_within_the_cap() -> None:
    made = scene(replace(CONFIG, count=600, cap=900, adapt_every_steps=20))
    train(made, Optimizer(made.groups(), OptimizerConfig()), range(100), 100)
    assert 600 < len(made.means) <= 900
    wanted, shading = target(999)
    with torch.no_grad():
        shown = made.render(views(999), shading, STREAM)
    error = (shown.rgb - wanted.rgb).square().mean()
    assert -10 * math.log10(error) > 27.0


def test_resuming_equals_never_having_stopped() -> None:
    straight, optimizer = fresh_run()
    train(straight, optimizer, range(23), 30)
    first, first_optimizer = fresh_run()
    train(first, first_optimizer, range(13), 30)
    assert len(first.means) > 300
    saved = copy.deepcopy((first.state_dict(), first_optimizer.state_dict()))
    second, second_optimizer = fresh_run()
    second.load_state_dict(saved[0])
    second_optimizer.load_state_dict(saved[1])
    train(second, second_optimizer, range(13, 23), 30)
    for name, value in straight.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    for name, value in optimizer.state_dict().items():
        assert torch.equal(second_optimizer.state_dict()[name], value), name


def test_loading_another_number_of_gaussians_keeps_the_parameter_objects() -> None:
    made, other = scene(), scene(replace(CONFIG, count=77))
    objects = [getattr(made, name) for name in PARAMETERS]
    made.load_state_dict(other.state_dict())
    assert [getattr(made, name) for name in PARAMETERS] == objects or all(
        getattr(made, name) is one for name, one in zip(PARAMETERS, objects, strict=True)
    )
    torch.testing.assert_close(made.means, other.means)
    with pytest.raises(RuntimeError, match="size mismatch"):
        made.load_state_dict(made.state_dict() | {"means": torch.zeros(5, 4)})


def test_the_start_depends_on_the_stream_alone() -> None:
    for start in ("ball", "sphere"):
        config = replace(CONFIG, start=start)
        one, same, other = scene(config), scene(config), scene(config, "elsewhere")
        assert torch.equal(one.means, same.means)
        assert not torch.equal(one.means, other.means)
        radius = one.means.detach().norm(dim=-1)
        assert radius.max() <= 0.5 + 1e-6
        assert (radius.min() > 0.499) == (start == "sphere")
        torch.testing.assert_close(one.opacity, torch.full((300,), 0.1))
        assert 0.3 < one.scales.detach().mean().item() / (0.5 * (4 / 3 * math.pi / 300) ** (1 / 3)) < 1.5


def test_a_cap_below_the_count_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cap \(10\) is smaller than count \(20\)"):
        GaussianScene.Config(count=20, cap=10)


# ------------------------------------------------------------------------------------------ what a view shows


def test_rendering_stands_before_the_asked_background_or_black() -> None:
    made = scene()
    seen = made.render(views(0), Shading(background=torch.tensor([[1.0, 0, 0], [0, 1, 0]])), STREAM)
    black = made.render(views(0), Shading(), STREAM)
    torch.testing.assert_close(seen.rgb[0, :, 0, 0], torch.tensor([1.0, 0, 0]))
    torch.testing.assert_close(seen.rgb[1, :, 0, 0], torch.tensor([0, 1.0, 0]))
    assert not black.rgb[:, :, 0, 0].any()
    assert seen.normal is None
    torch.testing.assert_close(seen.alpha, black.alpha)


def test_depth_normals_of_a_sphere_point_outwards() -> None:
    cameras = views(2, count=3, px=64)
    origins = cameras.c2w[:, :3, 3]
    rows = torch.arange(64) + 0.5
    y, x = torch.meshgrid(rows, rows, indexing="ij")
    focal = cameras.intrinsics[0, 0, 0]
    local = torch.stack([(x - 32) / focal, (y - 32) / focal, torch.ones_like(x)], -1)
    ray = torch.einsum("bij,hwj->bhwi", cameras.c2w[:, :3, :3], local)
    b = (ray * origins[:, None, None]).sum(-1)
    a = (ray * ray).sum(-1)
    root = b * b - a * ((origins**2).sum(-1)[:, None, None] - 0.8**2)
    hit = root > 0
    depth = torch.where(hit, (-b - root.clamp_min(0).sqrt()) / a, torch.zeros_like(b))
    found = depth_normals(depth[:, None], hit[:, None].float(), cameras)
    wanted = (origins[:, None, None] + depth[..., None] * ray) / 0.8
    facing = (hit & (-(wanted * ray).sum(-1) / ray.norm(dim=-1) > 0.4))[:, None]
    cosine = (found * wanted.permute(0, 3, 1, 2)).sum(1, keepdim=True)
    assert facing.sum() > 1000
    assert cosine[facing].min() > 0.99
    torch.testing.assert_close(found.norm(dim=1, keepdim=True)[facing], torch.ones(int(facing.sum())))


def test_light_falls_on_the_side_it_comes_from() -> None:
    made = filled(shell(), scale=0.03, opacity=0.95, color=torch.tensor([[0.2, 0.6, 0.4]]).repeat(3000, 1))
    cameras = turntable_cameras(2, 48)
    light = torch.tensor([[0.0, 1.0, 0.0], [0.0, -1.0, 0.0]])
    for mode in ("textureless", "lambertian"):
        shading = Shading(mode=mode, light=light, ambient=0.2, background=torch.ones(2, 3))
        view = made.render(cameras, shading, STREAM)
        assert view.normal is not None
        up, down = view.rgb[:, :, 18, 24].mean(1), view.rgb[:, :, 33, 24].mean(1)
        assert up[0] > 1.5 * down[0]
        assert down[1] > 1.5 * up[1]
        torch.testing.assert_close(view.rgb[:, :, 0, 0], torch.ones(2, 3))
    view.rgb.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in made.parameters())
    with pytest.raises(ConfigError, match="needs light"):
        made.render(cameras, Shading(mode="lambertian"), STREAM)


def test_penalties_have_their_names_and_gradients() -> None:
    made = scene()
    with torch.no_grad():
        made.log_scales[:, 0] += math.log(3.0)
    view = made.render(views(0), white(2), STREAM)
    penalties = made.penalties(view)
    assert set(penalties) == set(GaussianScene.penalty_names)
    assert penalties["anisotropy"].item() == pytest.approx(math.log(3.0), rel=1e-5)
    assert penalties["scale"].item() == pytest.approx(made.scales.detach().mean().item())
    sum(penalties.values()).backward()
    assert made.log_scales.grad.abs().sum() > 0
    assert made.opacity_logits.grad.abs().sum() > 0


def test_a_foreign_view_is_refused() -> None:
    made = scene()
    foreign = replace(made.render(views(0), white(2), STREAM), private=None)
    with pytest.raises(TypeError, match="not made by a GaussianScene"):
        made.adapt(foreign, Recorder(), 1)


# -------------------------------------------------------------------------------------------------- surfaces


def test_a_thin_shell_becomes_a_solid_ball() -> None:
    made = filled(shell(), scale=0.015, opacity=0.7)
    made.pixel_m.fill_(0.01)
    surface = made.surface(48)
    assert is_closed(surface)
    radius = surface.vertices.norm(dim=-1)
    assert abs(float(radius.mean()) / 0.6 - 1) < 0.02
    assert radius.min() > 0.57, "no inner wall"
    assert volume(surface) == pytest.approx(4 / 3 * math.pi * float(radius.mean()) ** 3, rel=0.03)


@pytest.mark.parametrize("opacity", [0.2, 0.9])
def test_the_surface_has_the_outline_that_training_saw(opacity: float) -> None:
    """Half-transparent Gaussians as wide as a pixel: the outline is where a view is half opaque."""
    points = shell(2500) * torch.tensor([1.0, 0.6, 0.8])
    made = filled(points, scale=0.03, opacity=opacity)
    cameras = views(3, count=4, px=64)
    seen = made.render(cameras, white(4), STREAM)
    made.pixel_m.copy_(seen.private.pixel_m)
    surface = made.surface(64)
    covered = rasterize_mesh(surface.vertices, surface.faces, cameras).covered
    opaque = (seen.alpha > 0.5).float()
    pool = nn.functional.max_pool2d
    wider, narrower = pool(opaque, 3, 1, 1)[:, 0] > 0, pool(1 - opaque, 3, 1, 1)[:, 0] < 1
    assert not (covered & ~wider).any(), "at most a pixel too large"
    assert (narrower & ~covered).float().sum() < 0.02 * opaque.sum(), "and hardly anywhere a pixel too small"


def test_a_leaky_shell_is_still_solid() -> None:
    points = shell()
    leak = (points - torch.tensor([0.0, 0.1, 0.59])).norm(dim=-1) < 0.05
    assert leak.sum() > 4
    surface = filled(points[~leak], scale=0.02, opacity=0.9).surface(48)
    assert is_closed(surface)
    assert volume(surface) > 0.9 * 4 / 3 * math.pi * 0.6**3


def test_a_bowl_keeps_its_hollow() -> None:
    points = shell(4000)
    surface = filled(points[points[:, 1] < 0.2], scale=0.025, opacity=0.95).surface(48)
    assert is_closed(surface)
    assert volume(surface) < 0.6 * 4 / 3 * math.pi * 0.6**3
    axis = surface.vertices[surface.vertices[:, [0, 2]].norm(dim=-1) < 0.1]
    assert -0.5 > axis[:, 1].max() > -0.66, "the floor of the bowl is where it was modelled"


def test_nothing_opaque_means_no_surface() -> None:
    faint = filled(shell(), scale=0.02, opacity=0.01)
    with pytest.raises(ExportError, match="the scene is empty"):
        faint.surface(24)
    gone = filled(shell(20), scale=0.001, opacity=0.003)
    with pytest.raises(ExportError, match="the scene is empty"):
        gone.surface(24)


def test_material_is_the_color_of_what_can_be_seen() -> None:
    outer, inner = shell(2500, 0.6), shell(500, 0.5)
    red, blue = torch.tensor([0.9, 0.1, 0.1]), torch.tensor([0.1, 0.1, 0.9])
    color = torch.where(outer[:, :1] > 0, red, blue)
    green = torch.tensor([[0.0, 1.0, 0.0]]).repeat(500, 1)
    made = filled(torch.cat([outer, inner]), scale=0.04, opacity=0.95, color=torch.cat([color, green]))
    points = shell(400, 0.57)
    points = points[points[:, 0].abs() > 0.15]
    material = made.material(points)
    wanted = torch.where(points[:, :1] > 0, red, blue)
    assert (material.base_color - wanted).abs().max() < 0.03
    assert material.base_color.shape == (len(points), 3)
    assert material.metallic.shape == material.roughness.shape == (len(points), 1)
    visible = seen_share(made.means, made.quats, made.scales, made.opacity, 0.04)
    assert visible[:2500].min() > 5 * visible[2500:].max()


def test_material_follows_a_changed_parameter() -> None:
    made = filled(shell(200), scale=0.05, opacity=0.9)
    before = made.material(shell(10)).base_color
    with torch.no_grad():
        made.color_logits.add_(2.0)
    assert (made.material(shell(10)).base_color > before + 0.2).all()
