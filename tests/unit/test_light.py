"""Image-based light while a scene is optimised: the law, the renders, what they teach, and what they leave behind."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trimesh
from PIL import Image
from torch import Tensor

from sds3d.cameras.light import ShadingConfig, ShadingLaw
from sds3d.cameras.orbit import orbit_cameras, turntable_cameras
from sds3d.config.load import override_layers
from sds3d.config.ramp import Ramp
from sds3d.errors import ConfigError
from sds3d.interfaces import Cameras, Material, Render, Scene, Shading, Surface
from sds3d.job import JobConfig, load_job
from sds3d.mathx.color import to_linear
from sds3d.moment import Moment
from sds3d.ops.environment import Environment, shade_pbr
from sds3d.ops.hashgrid import HashGridConfig
from sds3d.ops.mesh_edges import mesh_edges
from sds3d.ops.skies import environment_on, sky
from sds3d.rng import Stream
from sds3d.scenes import SCENES, MeshScene, TetMeshScene, build_scene
from sds3d.scenes.surface_view import render_surface
from sds3d.scenes.texture import TextureConfig, TextureField
from sds3d.slices import Slice
from sds3d.staged import load_stages
from sds3d.toybox.colors import COLORS
from sds3d.toybox.solid import toy_colors, toy_distance, toy_surface
from sds3d.toybox.world import compose, make_views, render_layers, sample_toy

STREAM = Stream(5, "light")
CPU = torch.device("cpu")
ENCODING = HashGridConfig(levels=4, log2_rows=12, finest_cells=32)
TEXTURE = TextureConfig(encoding=ENCODING, metallic=0.3, normal_detail=0.5)
LIT = ShadingConfig(lit=Ramp.constant(1.0), textureless_frac=0.0, light="environment")


def ball(subdivisions: int = 3) -> Surface:
    shape = trimesh.creation.icosphere(subdivisions=subdivisions, radius=0.8)
    return Surface(
        vertices=torch.tensor(shape.vertices, dtype=torch.float32), faces=torch.tensor(shape.faces)
    )


def mesh_scene(texture: TextureConfig = TEXTURE, lr_vertices: float = 0.01) -> MeshScene:
    return MeshScene(MeshScene.Config(texture=texture, lr_vertices=lr_vertices), ball(), STREAM.fork("mesh"))


def tetmesh_scene() -> TetMeshScene:
    return TetMeshScene(TetMeshScene.Config(cells=12, coarse=(5,), texture=TEXTURE), STREAM.fork("tetmesh"))


def pbr(count: int, environment: str = "studio", turn: float | None = None, **settings: object) -> Shading:
    turn_deg = None if turn is None else torch.full((count,), turn)
    return Shading(
        mode="pbr", background=torch.ones(count, 3), environment=environment, turn_deg=turn_deg, **settings
    )


def shaded(surface: Surface, material, cameras: Cameras, shading: Shading) -> Render:  # type: ignore[no-untyped-def]
    edges = mesh_edges(surface.faces, len(surface.vertices))
    return render_surface(surface.vertices, surface.faces, edges, material, cameras, shading).render


def constant(color: Tensor, metallic: float, roughness: float):  # type: ignore[no-untyped-def]
    def material(points: Tensor) -> Material:
        ones = torch.ones(len(points), 1)
        return Material(base_color=color * ones, metallic=metallic * ones, roughness=roughness * ones)

    return material


# The law.


def test_the_law_draws_environments_turns_and_shares() -> None:
    config = replace(LIT, lit=Ramp.constant(0.75), textureless_frac=0.2, environments=("studio", "noon"))
    law, cameras = ShadingLaw(config), turntable_cameras(3, 8)
    drawn = [law.sample(Moment(i, 400), cameras, STREAM.at(i)) for i in range(400)]
    share = {mode: sum(s.mode == mode for s in drawn) / 400 for mode in ("albedo", "textureless", "pbr")}
    assert share["albedo"] == pytest.approx(0.25, abs=0.06)
    assert share["textureless"] == pytest.approx(0.15, abs=0.06)
    lit = [s for s in drawn if s.mode == "pbr"]
    assert {s.environment for s in lit} == {"studio", "noon"}
    turns = torch.stack([s.turn_deg for s in lit])
    assert (turns.amin(1) < turns.amax(1)).all()
    assert turns.abs().max() <= 180.0
    assert turns.std() == pytest.approx(360.0 / math.sqrt(12.0), rel=0.1)
    again = law.sample(Moment(7, 400), cameras, STREAM.at(7))
    assert all(torch.equal(a, b) for a, b in zip(vars(again).values(), vars(drawn[7]).values(), strict=True)
               if isinstance(a, Tensor))  # fmt: skip


def test_a_light_turns_per_step_or_goes_with_the_camera() -> None:
    cameras = turntable_cameras(4, 8)
    still = ShadingLaw(replace(LIT, turning="step", turn_deg=(-20.0, 50.0)))
    for step in range(20):
        turn = still.sample(Moment(step, 20), cameras, STREAM.at(step)).turn_deg
        assert torch.equal(turn, turn[:1].expand(4))
        assert -20.0 <= float(turn[0]) <= 50.0
    with_camera = ShadingLaw(replace(LIT, anchor="camera", turn_deg=(10.0, 10.0)))
    shading = with_camera.sample(Moment(0, 1), cameras, STREAM)
    torch.testing.assert_close(shading.turn_deg, cameras.azimuth_deg + 10.0)
    part = Slice(1, 3, 4).of(shading)
    torch.testing.assert_close(part.turn_deg, cameras.azimuth_deg[1:3] + 10.0)
    assert part.environment == "studio"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["scene.kind=voxel"], "a 'voxel' scene has no metallic .* one of these scenes: tetmesh, mesh"),
        (["scene.kind=gaussians"], "a 'gaussians' scene"),
        (["shading.environments=[nowhere]"], "shading.environments: environment 'nowhere' is unknown; known"),
        (["shading.environments=[]"], "shading.environments: empty"),
        (["shading.turn_deg=[9,3]"], r"shading.turn_deg: got \[9"),
        (
            ["shading.textureless_frac=0.5", "prior.controls=[{path: x, kind: dreammat}]"],
            r"prior.controls\[0\]: kind dreammat shows the light of every step",
        ),
        (
            ["shading.lit=0", "guidance={kind: mix, terms: [{rule: {kind: sds}, sees: shaded}]}"],
            "one sees shaded, but no step is lit",
        ),
    ],
)
def test_light_that_cannot_work_is_refused_before_anything_loads(settings: list[str], message: str) -> None:
    assert job(settings[:0]).validate() is None
    with pytest.raises(ConfigError, match=message):
        job(settings).validate()


@pytest.mark.parametrize("name", ["fantasia3d", "toybox/pbr"])
def test_presets_end_with_a_material_under_turning_light(name: str) -> None:
    stages = load_stages(name, override_layers(['prompt="a red mug"']))
    for stage in stages:
        start = replace(stage.job.start, run=None if stage is stages[0] else "before")
        replace(stage.job, start=start).validate()
        assert stage.job.shading.uses_environment == (stage is stages[-1])
    assert stages[-1].job.shading.always_environment
    first = stages[0].job.guidance
    if name == "fantasia3d":
        assert [term.sees for term in first.config.terms] == ["normal_latent", "normal"]


def job(settings: list[str]) -> JobConfig:
    common = [
        'prompt="a red mug"',
        "scene.kind=tetmesh",
        "penalties={opacity: 0, entropy: 0, tv_density: 0, tv_color: 0}",
        "shading={lit: 1, textureless_frac: 0, light: environment}",
    ]
    return load_job("default", override_layers([*common, *settings])).config


# Renders.


def test_white_furnace(tmp_path: Path) -> None:
    """Under a white sky a white matte body is a flat patch of the sky's colour, and a metal is never brighter."""
    Image.fromarray(np.full((8, 16, 3), 128, np.uint8)).save(tmp_path / "even.png")
    even = str(tmp_path / "even.png")
    cameras = turntable_cameras(2, 32)
    for metallic, roughness in ((0.0, 0.2), (0.0, 1.0), (1.0, 0.04), (1.0, 0.6)):
        view = shaded(
            ball(), constant(torch.ones(3), metallic, roughness), cameras, pbr(2, even, intensity=0.75)
        )
        seen = to_linear(view.rgb.movedim(1, -1)[view.alpha[:, 0] == 1.0])
        assert seen.max() <= 0.6 + 1e-3  # 0.75 times the common scale of 0.8
        if metallic == 0.0 or roughness < 0.1:
            assert seen.min() > 0.56
    colored = shaded(ball(), constant(torch.tensor([0.5, 0.2, 0.8]), 0.0, 1.0), cameras,
                     pbr(2, even, intensity=1.25, specular=0.0))  # fmt: skip
    # Compression begins at 0.8 linear, which no channel of this colour reaches under a sky of 1.
    found = colored.rgb.movedim(1, -1)[colored.alpha[:, 0] == 1.0]
    torch.testing.assert_close(found, torch.tensor([0.5, 0.2, 0.8]).expand_as(found), rtol=0, atol=2e-3)


def test_turning_the_light_is_turning_object_and_camera_the_other_way() -> None:
    angle = 73.0
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    turn = torch.tensor([[cos, 0.0, sin], [0.0, 1.0, 0.0], [-sin, 0.0, cos]])  # about +y, +z towards +x
    body = ball()
    body = replace(body, vertices=body.vertices * torch.tensor([1.0, 0.6, 0.8]))
    turned = replace(body, vertices=body.vertices @ turn.T)

    def material(points: Tensor) -> Material:
        ones = torch.ones(len(points), 1)
        return Material(
            base_color=0.5 + 0.4 * torch.sin(5.0 * points), metallic=0.3 * ones, roughness=0.4 * ones
        )

    def cameras_at(azimuth: float) -> Cameras:
        one = torch.ones(1)
        return orbit_cameras(azimuth * one, 20.0 * one, 3.0 * one, 40.0 * one, 48)

    lit = shaded(body, material, cameras_at(10.0), pbr(1, "sunset", -angle)).rgb
    moved = shaded(turned, lambda p: material(p @ turn), cameras_at(10.0 + angle), pbr(1, "sunset")).rgb
    unturned = shaded(body, material, cameras_at(10.0), pbr(1, "sunset")).rgb
    assert (lit - moved).abs().mean() < 1e-3
    assert (lit - unturned).abs().mean() > 0.01


def test_slopes_of_the_split_sum_are_true() -> None:
    light = Environment(**{name: value.double() for name, value in vars(sky("studio")).items()})
    normal = F.normalize(STREAM.fork("n").normal(6, 3).double(), dim=1)
    eye = F.normalize(normal + 0.4 * STREAM.fork("e").normal(6, 3).double(), dim=1)
    parts = [
        (0.2 + 0.6 * STREAM.fork("c").uniform(6, 3)).double(),
        STREAM.fork("m").uniform(6, 1).double(),
        (0.1 + 0.8 * STREAM.fork("r").uniform(6, 1)).double(),
        normal,
    ]
    turn = 360.0 * STREAM.fork("t").uniform(6).double()
    for part in parts:
        part.requires_grad_()
    torch.autograd.gradcheck(
        lambda *p: shade_pbr(light, *p, eye, turn_deg=turn, intensity=0.7, specular=0.5),
        parts,
        eps=1e-7,
        atol=1e-4,
    )
    up = torch.tensor([[0.0, 1.0, 0.0], [0.0, -1.0, 0.0]], requires_grad=True)
    ones = torch.ones(2, 1)
    shade_pbr(sky("noon"), torch.ones(2, 3), 0.5 * ones, 0.5 * ones, up, up.detach()).sum().backward()
    assert up.grad.isfinite().all()


@pytest.mark.parametrize("make", [mesh_scene, tetmesh_scene])
def test_light_teaches_shape_and_every_part_of_the_material(make) -> None:  # type: ignore[no-untyped-def]
    scene, cameras = make(), turntable_cameras(2, 32)
    view = scene.render(cameras, pbr(2, "studio", 40.0), STREAM)
    (view.rgb * STREAM.fork("push").normal(*view.rgb.shape)).sum().backward()
    for group in scene.groups():
        for parameter in group.params:
            assert parameter.grad.isfinite().all(), group.name
            assert parameter.grad.abs().max() > 0, group.name
    assert (
        scene.texture.network[-1].weight.grad.abs().amax(1) > 0
    ).all()  # colour, metallic, roughness, bump
    assert view.albedo is None
    assert view.light is None
    with torch.no_grad():
        dark = scene.render(cameras, pbr(2, "studio", 40.0, intensity=0.0), STREAM)
    assert dark.rgb[:, :, 16, 16].max() == 0.0


def test_what_stays_has_no_slope_and_matte_hides_roughness() -> None:
    fixed = replace(TEXTURE, metallic_range=(0.0, 0.0), base_color_range=(0.1, 0.6))
    scene = mesh_scene(fixed)
    scene.render(turntable_cameras(1, 24), pbr(1, specular=0.0), STREAM).rgb.sum().backward()
    slope = scene.texture.network[-1].weight.grad.abs().amax(1)
    assert slope[:3].min() > 0
    assert slope[3:5].max() == 0
    with torch.no_grad():
        scene.texture.network[-1].bias[:3] = torch.tensor([50.0, -50.0, 0.0])
    made = scene.material(torch.zeros(1, 3))
    torch.testing.assert_close(made.base_color[0, :2], torch.tensor([0.6, 0.1]))
    assert float(made.metallic) == 0.0
    field = TextureField(replace(TEXTURE, roughness=0.6, roughness_range=(0.5, 0.9)), 1.0, STREAM)
    assert float(field(torch.zeros(1, 3)).roughness.detach()) == pytest.approx(0.6)
    with pytest.raises(ConfigError, match=r"texture\.roughness_range"):
        TextureConfig(roughness_range=(0.9, 0.5))


@pytest.mark.parametrize("kind", sorted(SCENES))
def test_albedo_and_normals_on_request_in_every_scene(kind: str) -> None:
    scene = build_scene(kind, SCENES[kind].Config(), STREAM.fork(kind)).eval()
    cameras = turntable_cameras(2, 24)
    background = STREAM.fork("back").uniform(2, 3)
    plain = Shading(background=background)
    light = F.normalize(torch.tensor([[0.5, 0.6, 0.7], [-0.5, 0.6, 0.1]]), dim=1)
    lamp = Shading(mode="lambertian", background=background, light=light, ambient=0.2, also=("albedo",))
    with torch.no_grad():
        unlit = scene.render(cameras, plain, STREAM)
        lit = scene.render(cameras, lamp, STREAM)
        scene.train()
        normal = scene.render(cameras, replace(plain, also=("normal",)), STREAM).normal
    torch.testing.assert_close(unlit.albedo, unlit.rgb)
    torch.testing.assert_close(lit.albedo, unlit.rgb, rtol=0, atol=1e-5)
    assert (lit.rgb - lit.albedo).abs().max() > 0.02
    assert normal is not None
    scene.eval()
    if type(scene).takes_environment:
        known = ((0.0, 1.0), (1.0, 0.0))
        told = scene.render(cameras, replace(pbr(2), also=("albedo",), known_materials=known), STREAM)
        white = shaded_like(scene, cameras, pbr(2))
        assert told.light.shape == (2, 6, 24, 24)
        assert not told.light.requires_grad
        inside = told.alpha.expand(-1, 3, -1, -1) == 1.0
        torch.testing.assert_close(told.light[:, :3][inside], white.rgb[inside])
        assert (told.light[:, :3] - told.light[:, 3:]).abs().max() > 0.05
        assert told.light[:, :, 0, 0].max() == 0.0
    else:
        with pytest.raises((ValueError, ConfigError), match="pbr"):
            scene.render(cameras, pbr(2), STREAM)


def shaded_like(scene: Scene, cameras: Cameras, shading: Shading) -> Render:
    """The scene's surface as a white matte body."""
    return shaded(scene.surface(0), constant(torch.ones(3), 0.0, 1.0), cameras, shading)


# What is learned.


def two_colors(points: Tensor) -> Material:
    ones = torch.ones(len(points), 1)
    color = torch.where(points[:, :1] > 0, torch.tensor([0.8, 0.3, 0.2]), torch.tensor([0.2, 0.4, 0.7]))
    return Material(base_color=color, metallic=0.0 * ones, roughness=ones)


def learned(shading_of, steps: int = 50) -> float:  # type: ignore[no-untyped-def]
    """Mean error of the base colour after regression to pictures under a rotating sunset."""
    texture = TextureConfig(encoding=ENCODING, metallic_range=(0.0, 0.0), roughness=0.999)
    scene, truth = mesh_scene(texture, 0.0), ball()
    adam = torch.optim.Adam(scene.texture.parameters(), lr=0.02, betas=(0.9, 0.99))
    law = ShadingLaw(replace(LIT, environments=("sunset",), turning="step", background="white"))
    for step in range(steps):
        cameras = turntable_cameras(3, 24, 40.0 * math.sin(step))
        light = law.sample(Moment(step, steps), cameras, STREAM.fork("oracle").at(step))
        target = shaded(truth, two_colors, cameras, light).rgb
        adam.zero_grad()
        (scene.render(cameras, shading_of(light), STREAM).rgb - target).square().sum().backward()
        adam.step()
    points = truth.vertices[truth.vertices[:, 0].abs() > 0.1]
    return float((scene.material(points).base_color - two_colors(points).base_color).abs().mean())


def test_known_light_gives_the_true_colours_and_no_light_bakes_the_shading() -> None:
    aware = learned(lambda light: light)
    unlit = learned(lambda light: Shading(background=light.background))
    other = learned(lambda light: replace(light, environment="overcast"))
    assert aware < 0.02
    assert unlit > 3.0 * aware
    assert other > 2.0 * aware


def test_bumps_bend_the_light_and_not_the_normal_picture() -> None:
    cameras = turntable_cameras(1, 32)
    flat, tilted = constant(torch.full((3,), 0.7), 0.0, 0.5), constant(torch.full((3,), 0.7), 0.0, 0.5)

    def bumped(points: Tensor) -> Material:
        return replace(tilted(points), bump=torch.tensor([0.0, 0.5, 0.0]).expand(len(points), 3))

    views = [shaded(ball(), material, cameras, pbr(1, "noon")) for material in (flat, bumped)]
    assert torch.equal(views[0].normal, views[1].normal)
    middle = [float(view.rgb[0, :, 16, 16].mean()) for view in views]
    assert middle[1] > middle[0] + 0.03  # the surface leans up, into the sun

    def along(points: Tensor) -> Material:
        return replace(tilted(points), bump=0.5 * F.normalize(points, dim=1))

    torch.testing.assert_close(
        shaded(ball(), along, cameras, pbr(1, "noon")).rgb, views[0].rgb, rtol=0, atol=0.02
    )


# The toybox: known colours under a known light.


@pytest.fixture(scope="module", params=["mug", "duck"])
def toy(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    return sample_toy(np.random.Generator(np.random.PCG64(3)), request.param)


def test_a_toys_surface_is_where_its_distance_is_zero(toy) -> None:  # type: ignore[no-untyped-def]
    surface = toy_surface(toy, 64)
    distance, owner = toy_distance(toy, surface.vertices.double().numpy())
    assert np.abs(distance).max() < 0.02
    assert np.abs(distance).mean() < 1e-3
    assert set(owner) <= set(range(len(toy.shape)))
    assert float(surface.vertices.norm(dim=1).max()) == pytest.approx(toy.radius, abs=0.03)


def test_the_toybox_sky_lights_as_the_toy_world_does(toy) -> None:  # type: ignore[no-untyped-def]
    """Our renders of true colours under that sky, against the world's own pictures under its mean lights."""
    surface, size = toy_surface(toy, 64), 48
    main, second = np.array(COLORS["red"]), np.array(COLORS["yellow"])
    cameras = turntable_cameras(4, size)
    views = make_views([0, 90, 180, 270], 15.0)
    worlds = [
        compose(
            render_layers([toy] * 4, views, size, np.random.Generator(np.random.PCG64(i))),
            np.tile(main, (4, 1)), np.tile(second, (4, 1)), np.ones((4, 3)),
        )
        for i in range(6)
    ]  # fmt: skip

    def material(points: Tensor) -> Material:
        ones = torch.ones(len(points), 1)
        return Material(base_color=toy_colors(toy, points, main, second), metallic=0 * ones, roughness=ones)

    light = replace(pbr(4, "toybox", intensity=0.53, specular=0.0), turn_deg=cameras.azimuth_deg)
    view = shaded(surface, material, cameras, light)
    unlit = shaded(surface, material, cameras, Shading(background=torch.ones(4, 3)))
    inside = view.alpha[:, 0] > 0.99
    target = torch.from_numpy(np.mean(worlds, axis=0))[inside]
    ours, plain = ((v.rgb.movedim(1, -1)[inside] - target).abs().mean() for v in (view, unlit))
    assert ours < 0.03
    assert plain > 2.5 * ours


def test_a_file_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "sky.png"
    Image.fromarray(np.full((4, 8, 3), 90, np.uint8)).save(path)
    first = environment_on(str(path), CPU)
    path.unlink()
    assert environment_on(str(path), CPU) is first
