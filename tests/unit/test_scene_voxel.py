import math

import pytest
import torch
import torch.nn.functional as F

from sds3d.cameras.orbit import turntable_cameras
from sds3d.errors import ConfigError, ExportError
from sds3d.interfaces import Cameras, Render, Shading
from sds3d.mesh.fit_iso import fitted_surface, see, see_surface
from sds3d.rng import Stream
from sds3d.scenes.shade import irradiance, shade
from sds3d.scenes.voxel import VoxelScene, _lookup

STREAM = Stream(7, "voxel scene")
SMALL = VoxelScene.Config(resolutions=(6, 12, 24))


def cameras(azimuth: list[float], elevation_deg: float = 15.0, px: int = 24) -> Cameras:
    a = torch.tensor(azimuth).deg2rad()
    e = torch.full_like(a, math.radians(elevation_deg))
    outward = torch.stack([a.sin() * e.cos(), e.sin(), a.cos() * e.cos()], -1)
    right = torch.stack([a.cos(), torch.zeros_like(a), -a.sin()], -1)
    c2w = torch.eye(4).repeat(len(a), 1, 1)
    c2w[:, :3, :3] = torch.stack([right, -torch.linalg.cross(outward, right), -outward], -1)
    c2w[:, :3, 3] = outward * 3.3
    focal = px / 2 / math.tan(math.radians(20))
    intrinsics = torch.tensor([[focal, 0, px / 2], [0, focal, px / 2], [0, 0, 1]]).repeat(len(a), 1, 1)
    return Cameras(
        c2w=c2w,
        intrinsics=intrinsics,
        width_px=px,
        height_px=px,
        azimuth_deg=a.rad2deg(),
        elevation_deg=e.rad2deg(),
        radius=torch.full_like(a, 3.3),
        fov_deg=torch.full_like(a, 40.0),
    )


def scene(config: VoxelScene.Config = SMALL) -> VoxelScene:
    return VoxelScene(config, STREAM.fork("init"))


def ball(radius: float, n: int = 48, center: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> VoxelScene:
    """A ball with a sharp edge; red for x > 0, else blue; grey where nothing is."""
    made = scene(VoxelScene.Config(resolutions=(12, n)))
    z, y, x = torch.meshgrid(*[torch.linspace(-1.05, 1.05, n)] * 3, indexing="ij")
    r = ((x - center[0]) ** 2 + (y - center[1]) ** 2 + (z - center[2]) ** 2).sqrt()
    made.base.copy_((200 * (radius - r)).clamp(-9, 9))
    solid = (r < radius).float()
    with torch.no_grad():
        made.levels[-1][0, 1] = solid * torch.where(x > 0, 3.0, -3.0)
        made.levels[-1][0, 2] = solid * -3.0
        made.levels[-1][0, 3] = solid * torch.where(x > 0, -3.0, 3.0)
    return made


def test_the_start_is_a_grey_blob_in_the_middle() -> None:
    view = scene(VoxelScene.Config()).render(
        cameras([0.0, 120.0], px=32), Shading(background=torch.ones(2, 3)), STREAM
    )
    assert view.alpha[:, 0, 16, 16].min() > 0.95
    assert view.alpha[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]].max() < 0.2
    torch.testing.assert_close(view.rgb[:, :, 16, 16], torch.full((2, 3), 0.5), atol=0.03, rtol=0)


def test_every_level_learns_density_and_colour() -> None:
    made = scene()
    view = made.render(cameras([10.0, 130.0]), Shading(), STREAM)
    (view.rgb * STREAM.fork("d").normal(*view.rgb.shape)).sum().backward()
    for level in made.levels:
        assert (level.grad.abs().amax((0, 2, 3, 4)) > 0).all()
    assert {id(p) for group in made.groups() for p in group.params} == {id(p) for p in made.parameters()}


def test_learning_rates_rise_towards_coarse_levels() -> None:
    config = VoxelScene.Config(resolutions=(6, 12, 24), lr=0.1, lr_per_level=2.0)
    assert [group.lr for group in scene(config).groups()] == pytest.approx([0.4, 0.2, 0.1])


@pytest.mark.parametrize("resolutions", [(), (24, 12), (12, 12)])
def test_resolutions_must_rise(resolutions: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"scene\.resolutions"):
        scene(VoxelScene.Config(resolutions=resolutions))


def test_jitter_follows_the_stream_in_training_and_is_absent_in_evaluation() -> None:
    made, cams = scene(), cameras([0.0])
    first, again, other = (made.render(cams, Shading(), STREAM.at(i)).rgb for i in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    made.eval()
    assert torch.equal(*(made.render(cams, Shading(), STREAM.at(i)).rgb for i in (0, 1)))


def test_depth_is_the_distance_along_the_camera_axis() -> None:
    made = ball(0.5).eval()
    view = made.render(cameras([0.0], 0.0, px=33), Shading(), STREAM)
    # The logit rises by 200 per metre, so optical depth 12 * 200 d^2 / 2 = 1 lies d = 0.029 m inside.
    assert view.depth[0, 0, 16, 16].item() == pytest.approx(3.3 - 0.5 + 0.029, abs=0.015)


def test_right_is_right_and_up_is_up() -> None:
    """World x is red's side: to the right from the front, to the left from behind."""
    made = ball(0.5, center=(0.0, 0.3, 0.0)).eval()
    view = made.render(cameras([0.0, 180.0], 0.0, px=32), Shading(), STREAM)
    assert view.rgb[0, 0, 11, 20] > 0.8 > 0.2 > view.rgb[0, 2, 11, 20]
    assert view.rgb[1, 2, 11, 20] > 0.8 > 0.2 > view.rgb[1, 0, 11, 20]
    assert view.alpha[0, 0, :16].sum() > 3 * view.alpha[0, 0, 16:].sum()


def lit(mode: str, light: list[float], ambient: float = 0.2) -> Shading:
    return Shading(mode=mode, background=torch.ones(1, 3), light=torch.tensor([light]), ambient=ambient)  # type: ignore[arg-type]


def test_lit_modes_follow_the_light() -> None:
    made, cams = ball(0.6).eval(), cameras([0.0], 0.0, px=33)
    albedo = made.render(cams, Shading(background=torch.ones(1, 3)), STREAM).rgb
    front, back = (made.render(cams, lit("textureless", [0.0, 0.0, s]), STREAM).rgb for s in (1.0, -1.0))
    assert front[0, :, 16, 16].min() > 0.97
    torch.testing.assert_close(back[0, :, 16, 16], torch.full((3,), 0.2), atol=0.02, rtol=0)
    lambertian = made.render(cams, lit("lambertian", [0.0, 0.0, -1.0]), STREAM).rgb
    torch.testing.assert_close(lambertian[0, :, 16, 20], 0.2 * albedo[0, :, 16, 20], atol=0.02, rtol=0)
    for image in (front, back, lambertian):
        torch.testing.assert_close(image[0, :, 0, 0], torch.ones(3))


def test_textureless_light_teaches_shape_but_not_colour() -> None:
    made = scene()
    made.render(cameras([30.0]), lit("textureless", [0.6, 0.8, 0.0]), STREAM).rgb.square().sum().backward()
    for level in made.levels:
        assert level.grad[0, 0].abs().max() > 0
        assert level.grad[0, 1:].abs().max() == 0


def test_lit_modes_need_a_light() -> None:
    with pytest.raises(ValueError, match="light"):
        scene().render(cameras([0.0]), Shading(mode="lambertian"), STREAM)
    with pytest.raises(ValueError, match="light"):
        shade(torch.ones(2, 3), torch.ones(2, 3), Shading(mode="textureless"))


def test_shading_formula() -> None:
    normal = F.normalize(STREAM.fork("n").normal(50, 3), dim=-1)
    light = torch.tensor([[0.0, 0.6, 0.8]])
    white = irradiance(normal, light, 0.3)
    torch.testing.assert_close(white[:, 0], 0.3 + 0.7 * (normal @ light[0]).clamp_min(0))
    albedo = STREAM.fork("a").uniform(50, 3)
    torch.testing.assert_close(
        shade(albedo, normal, Shading(mode="lambertian", light=light, ambient=0.3)), albedo * white
    )
    torch.testing.assert_close(
        shade(albedo, normal, Shading(mode="lambertian", light=light, ambient=1.0)), albedo
    )
    assert torch.equal(shade(albedo, normal, Shading()), albedo)


def test_penalties_have_their_closed_forms() -> None:
    made = ball(0.5, n=24)
    view = made.render(cameras([0.0, 90.0]), Shading(), STREAM)
    values = made.penalties(view)
    assert tuple(values) == VoxelScene.penalty_names
    a = view.alpha.clamp(1e-3, 1 - 1e-3)
    assert values["opacity"].item() == pytest.approx(view.alpha.mean().item())
    assert values["entropy"].item() == pytest.approx(
        -(a * a.log() + (1 - a) * (1 - a).log()).mean().item(), rel=1e-5
    )
    grid = made.grid().detach()
    logit = grid[..., 0].clamp(-6, 6)
    squares = sum((logit.diff(dim=axis) ** 2).sum().item() for axis in range(3))
    assert values["tv_density"].item() == pytest.approx(squares / 24**3, rel=1e-4)
    squares = sum((grid[..., 1:].diff(dim=axis) ** 2).sum().item() for axis in range(3))
    assert values["tv_color"].item() == pytest.approx(squares / (3 * 24**3), rel=1e-4)
    for name in VoxelScene.penalty_names:
        gradient = torch.autograd.grad(values[name], made.levels[-1], retain_graph=True)[0]
        assert gradient.abs().max() > 0, name


def test_penalties_refuse_a_foreign_render() -> None:
    flat = torch.zeros(1, 3, 2, 2)
    with pytest.raises(TypeError, match="this scene"):
        scene().penalties(Render(rgb=flat, alpha=flat[:, :1], depth=flat[:, :1]))


@pytest.mark.parametrize("cells", [47, 64])
@pytest.mark.parametrize("center", [(0.0, 0.0, 0.0), (0.2, -0.1, 0.3)])
def test_the_surface_of_a_ball_lies_within_half_a_cell(
    cells: int, center: tuple[float, float, float]
) -> None:
    made = ball(0.6, center=center)
    surface = made.surface(cells)
    offset = (surface.vertices - torch.tensor(center)).norm(dim=-1) - 0.6
    assert offset.abs().max() < 0.5 * made.cell_m
    a, b, c = (surface.vertices.double()[surface.faces[:, i]] for i in range(3))
    volume = (a * torch.linalg.cross(b, c)).sum().item() / 6
    assert volume == pytest.approx(4 / 3 * math.pi * 0.6**3, rel=0.06)


def test_matter_at_the_border_still_gives_a_closed_surface() -> None:
    surface = ball(5.0, n=16).surface(15)
    edges = torch.cat([surface.faces[:, [i, (i + 1) % 3]] for i in range(3)])
    counts = torch.unique(edges.sort(-1).values, dim=0, return_counts=True)[1]
    assert (counts == 2).all()


def test_an_empty_scene_has_no_surface() -> None:
    made = scene()
    made.base.fill_(-9.0)
    with pytest.raises(ExportError, match="empty"):
        made.surface(24)


def test_material_shows_the_colour_of_the_matter_and_not_of_the_air() -> None:
    made = ball(0.6)
    points = F.normalize(STREAM.fork("p").normal(400, 3), dim=-1)
    points = points[points[:, 0].abs() > 0.15] * 0.6
    material = made.material(points)
    red = points[:, 0] > 0
    expected = torch.where(red[:, None], torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0]))
    error = (material.base_color - expected).abs()
    plain = (_lookup(made.grid().detach(), points, 1.05)[:, 1:] - expected).abs()
    assert error.max() < 0.15
    assert error.mean() < 0.5 * plain.mean()
    assert material.metallic.abs().max() == 0
    torch.testing.assert_close(material.roughness, torch.full((len(points), 1), 0.6))
    assert made.material(points[:0]).base_color.shape == (0, 3)


def test_an_oracle_carves_a_ball_of_another_size_and_place() -> None:
    """Fitting ground-truth renders from eight views reproduces views that were not fitted."""
    truth, made = ball(0.4, n=24, center=(0.3, 0.2, 0.0)).eval(), scene()
    fitted, unseen = (
        cameras([0.0, 45.0, 90.0, 135.0, 180.0, 225.0, 270.0, 315.0], px=24),
        cameras([20.0, 200.0], 40.0),
    )
    adam = torch.optim.Adam(made.parameters(), lr=0.05, betas=(0.9, 0.99))
    for step in range(60):
        background = STREAM.fork("bg").at(step).uniform(8, 3)
        target = truth.render(fitted, Shading(background=background), STREAM).rgb.detach()
        view = made.render(fitted, Shading(background=background), STREAM.at(step))
        adam.zero_grad()
        ((view.rgb - target) ** 2).sum().div(8).backward()
        adam.step()
    made.eval()
    shading = Shading(background=torch.ones(2, 3))
    error = (
        (made.render(unseen, shading, STREAM).rgb - truth.render(unseen, shading, STREAM).rgb).square().mean()
    )
    assert -10 * math.log10(error.item()) > 25


def hard_ball(hardness: float) -> VoxelScene:
    """The ball that a scene starts as, of radius 0.5, hardened."""
    made = scene(VoxelScene.Config(resolutions=(32,), hardness=hardness, blob_radius_m=0.5))
    return made.eval()


def test_hardness_grows_during_its_part_of_the_run_and_multiplies_the_logits_alone() -> None:
    made = scene(VoxelScene.Config(resolutions=(8,), hardness=16.0, harden_frac=(0.25, 0.75)))
    assert [made.hardness(p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx([1, 1, 4, 16, 16])
    soft, hard = made.grid(progress=0.0), made.grid()
    torch.testing.assert_close(hard[..., 0], 16 * soft[..., 0])
    assert torch.equal(hard[..., 1:], soft[..., 1:])
    early = made.penalties(made.render(cameras([0.0]), Shading(), STREAM, progress=0.0))
    late = made.penalties(made.render(cameras([0.0]), Shading(), STREAM))
    torch.testing.assert_close(late["tv_density"], early["tv_density"])


def test_a_hard_field_looks_like_its_surface_and_a_soft_one_does_not() -> None:
    differences = []
    for hardness in (1.0, 30.0):
        made = hard_ball(hardness)
        view = turntable_cameras(1, 96)
        seen = see(made, view)
        differences.append(
            float((see_surface(made, fitted_surface(made, 64, [view]), view) - seen).square().mean())
        )
    assert differences[1] < 0.1 * differences[0]


def test_the_surface_lies_between_voxels_where_the_logit_crosses() -> None:
    """Densities on both sides differ by orders of magnitude: a straight line between them would miss the radius."""
    distance = hard_ball(30.0).surface(64).vertices.norm(dim=1)
    assert float((distance - 0.5).abs().max()) < 0.2 * hard_ball(30.0).cell_m


def test_bad_hardening_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"scene\.harden_frac: got \[0\.5, 0\.5\]"):
        scene(VoxelScene.Config(harden_frac=(0.5, 0.5)))
