"""The tetrahedral and the fixed mesh scene, their materials and regularisers, and conversions into them."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import trimesh

from sds3d.cameras.orbit import turntable_cameras
from sds3d.convert import mesh_from, tetmesh_from
from sds3d.errors import ConfigError, ExportError
from sds3d.interfaces import Material, Render, Scene, Shading, Surface
from sds3d.mesh.clean import measure
from sds3d.ops.hashgrid import HashGridConfig
from sds3d.penalties import PenaltyConfig
from sds3d.rng import Stream
from sds3d.scenes import SCENES, MeshScene, TetMeshScene, VoxelScene, build_scene
from sds3d.scenes.surface_view import vertex_normals
from sds3d.scenes.tetmesh import ellipsoid_distance
from sds3d.scenes.texture import TextureConfig

STREAM = Stream(11, "mesh scene")
SMALL_TEXTURE = TextureConfig(encoding=HashGridConfig(levels=4, log2_rows=12, finest_cells=32))
SMALL = TetMeshScene.Config(cells=16, coarse=(5, 9), texture=SMALL_TEXTURE)


def tetmesh(config: TetMeshScene.Config = SMALL) -> TetMeshScene:
    return TetMeshScene(config, STREAM.fork("init"))


def ball_surface(subdivisions: int = 3, radius: float = 0.5) -> Surface:
    shape = trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius)
    return Surface(
        vertices=torch.tensor(shape.vertices, dtype=torch.float32), faces=torch.tensor(shape.faces)
    )


def mesh(lr_vertices: float = 0.05) -> MeshScene:
    config = MeshScene.Config(texture=SMALL_TEXTURE, lr_vertices=lr_vertices)
    return MeshScene(config, ball_surface(), STREAM.fork("init"))


SCENE_MAKERS = pytest.mark.parametrize("make", [tetmesh, mesh])


@SCENE_MAKERS
def test_the_start_is_a_grey_ball(make) -> None:  # type: ignore[no-untyped-def]
    scene = make()
    cameras = turntable_cameras(2, 33, elevation_deg=0.0)
    view = scene.render(cameras, Shading(background=torch.ones(2, 3)), STREAM)
    radius = 0.45 if make is tetmesh else 0.5
    torch.testing.assert_close(view.rgb[:, :, 16, 16], torch.full((2, 3), 0.5), atol=0.1, rtol=0)
    torch.testing.assert_close(view.rgb[:, :, 0, 0], torch.ones(2, 3))
    assert view.depth[0, 0, 16, 16].item() == pytest.approx(3.3 - radius, abs=0.02)
    torch.testing.assert_close(view.normal[0, :, 16, 16], torch.tensor([0.0, 0.0, 1.0]), atol=0.1, rtol=0)
    focal = float(cameras.intrinsics[0, 0, 0])
    area = math.pi * focal**2 * radius**2 / (3.3**2 - radius**2)
    assert float(view.alpha[0].detach().sum()) == pytest.approx(area, rel=0.03)
    inside = view.alpha[:, 0] > 0
    torch.testing.assert_close(view.normal.norm(dim=1)[inside], torch.ones(int(inside.sum())))
    assert torch.equal(
        view.rgb, scene.render(cameras, Shading(background=torch.ones(2, 3)), STREAM.at(1)).rgb
    )


@SCENE_MAKERS
def test_light_teaches_shape_and_colour_teaches_texture(make) -> None:  # type: ignore[no-untyped-def]
    scene, cameras = make(), turntable_cameras(2, 24)
    light = F.normalize(torch.tensor([[0.5, 0.6, 0.7], [-0.5, 0.6, 0.1]]), dim=1)
    for mode in ("albedo", "textureless", "lambertian"):
        scene.zero_grad()
        shading = Shading(mode=mode, light=light, ambient=0.2)  # type: ignore[arg-type]
        view = scene.render(cameras, shading, STREAM)
        (view.rgb * STREAM.fork(mode).normal(*view.rgb.shape)).sum().backward()
        shape = [p for g in scene.groups() for p in g.params if not g.name.startswith("texture")]
        assert shape
        assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in shape), mode
        colored = scene.texture.encoding.table.grad
        assert (colored is not None and colored.abs().max() > 0) == (mode != "textureless")
    white = replace(shading, mode="textureless", ambient=1.0)
    assert scene.render(cameras, white, STREAM).rgb[:, :, 12, 12].min() > 0.99
    with pytest.raises(ValueError, match="light"):
        scene.render(cameras, Shading(mode="lambertian"), STREAM)
    assert {id(p) for g in scene.groups() for p in g.params} == {id(p) for p in scene.parameters()}


@SCENE_MAKERS
def test_state_round_trips_into_another_scene(make) -> None:  # type: ignore[no-untyped-def]
    scene, cameras = make(), turntable_cameras(1, 24)
    with torch.no_grad():
        for index, value in enumerate(scene.parameters()):
            value.add_(0.05 * STREAM.fork("s").at(index).normal(*value.shape))
    other = make()
    if make is mesh:
        other = MeshScene(scene.config, ball_surface(1), STREAM)
    other.load_state_dict(scene.state_dict())
    shown, loaded = (s.render(cameras, Shading(), STREAM).rgb for s in (scene, other))
    assert torch.equal(shown, loaded)


@SCENE_MAKERS
def test_penalties_are_known_lazy_and_differentiable(make) -> None:  # type: ignore[no-untyped-def]
    scene = make()
    with torch.no_grad():
        for index, value in enumerate(scene.parameters()):
            value.add_(0.1 * STREAM.fork("p").at(index).normal(*value.shape))
    view = scene.render(turntable_cameras(2, 24), Shading(), STREAM)
    values = scene.penalties(view)
    assert tuple(values) == scene.penalty_names
    assert set(scene.penalty_names) <= set(vars(PenaltyConfig()))
    for name in scene.penalty_names:
        params = [p for p in scene.parameters() if p.requires_grad]
        grads = torch.autograd.grad(values[name], params, retain_graph=True, allow_unused=True)
        assert values[name].isfinite()
        assert any(g is not None and g.abs().max() > 0 for g in grads), name
        assert all(g is None or g.isfinite().all() for g in grads), name
    assert values["opacity"] is values["opacity"]
    flat = torch.zeros(1, 3, 2, 2)
    with pytest.raises(TypeError, match="this scene"):
        scene.penalties(Render(rgb=flat, alpha=flat[:, :1], depth=flat[:, :1]))


@SCENE_MAKERS
def test_material_has_three_outputs_and_starts_constant(make) -> None:  # type: ignore[no-untyped-def]
    scene = make()
    points = STREAM.fork("m").uniform(20, 3) - 0.5
    material = scene.material(points)
    torch.testing.assert_close(material.metallic, torch.full((20, 1), 0.01))
    torch.testing.assert_close(material.roughness, torch.full((20, 1), 0.6))
    assert (material.base_color - 0.5).abs().max() < 0.1
    attributes = scene.surface_attributes(points)
    assert torch.equal(attributes.base_color.detach(), material.base_color)
    (attributes.metallic.sum() + attributes.roughness.sum()).backward()
    assert list(scene.texture.network.parameters())[-1].grad[3:].abs().min() > 0
    assert scene.material(points[:0]).base_color.shape == (0, 3)


def test_tetmesh_stays_closed_whatever_the_parameters() -> None:
    scene = tetmesh()
    with torch.no_grad():
        for value in (scene.fine, scene.offset, *scene.coarse):
            value.copy_(3 * STREAM.fork("wild").normal(*value.shape))
    found = measure(scene.surface(16))
    assert found.watertight
    assert found.border_edges == 0


def test_tetmesh_without_matter_shows_the_background_and_has_no_surface() -> None:
    scene = tetmesh()
    with torch.no_grad():
        scene.fine.fill_(100.0)
    view = scene.render(turntable_cameras(1, 8), Shading(background=torch.full((1, 3), 0.3)), STREAM)
    torch.testing.assert_close(view.rgb, torch.full((1, 3, 8, 8), 0.3))
    assert view.alpha.max() == 0
    (view.rgb.sum() + sum(scene.penalties(view).values())).backward()
    with pytest.raises(ExportError, match="empty"):
        scene.surface(16)


def test_tetmesh_refuses_a_start_that_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"scene\.radii_m"):
        tetmesh(replace(SMALL, radii_m=(0.4, 1.0, 0.4)))


def test_ellipsoid_start_and_its_distance() -> None:
    points = STREAM.fork("e").normal(200, 3)
    radii = torch.tensor([0.3, 0.6, 0.4])
    on = F.normalize(points, dim=1) * radii
    torch.testing.assert_close(ellipsoid_distance(on, radii), torch.zeros(200), atol=1e-6, rtol=0)
    torch.testing.assert_close(ellipsoid_distance(points, torch.full((3,), 0.5)), points.norm(dim=1) - 0.5)
    assert ellipsoid_distance(torch.zeros(1, 3), radii).item() == pytest.approx(-0.3)
    scene = tetmesh(replace(SMALL, radii_m=(0.3, 0.6, 0.4)))
    torch.testing.assert_close(scene.surface(16).vertices.abs().amax(0), radii, atol=0.03, rtol=0)


def test_tetmesh_starts_from_a_torus() -> None:
    shape = trimesh.creation.torus(0.5, 0.22)
    surface = Surface(
        vertices=torch.tensor(shape.vertices, dtype=torch.float32), faces=torch.tensor(shape.faces)
    )
    scene = tetmesh(replace(SMALL, cells=24))
    scene.start_from(surface)
    found = measure(scene.surface(24))
    assert found.watertight
    assert found.euler == 0
    assert found.volume == pytest.approx(measure(surface).volume, rel=0.05)


def test_mesh_scene_keeps_its_faces_and_its_vertices_where_they_must_not_learn() -> None:
    fixed = mesh(lr_vertices=0.0)
    assert [g.name for g in fixed.groups()] == ["texture", "texture_network"]
    fixed.render(turntable_cameras(1, 16), Shading(), STREAM).rgb.sum().backward()
    assert fixed.offset.grad is None
    moved = mesh()
    with torch.no_grad():
        moved.offset[:, 1] += 1.0
    given = ball_surface()
    assert torch.equal(moved.surface(8).faces, given.faces)
    edge = moved.topology()[1]
    torch.testing.assert_close(
        moved.surface(8).vertices - given.vertices,
        torch.tensor([0.0, edge, 0.0]).expand(len(given.vertices), 3),
    )


def test_both_sides_of_an_open_mesh_are_lit() -> None:
    square = Surface(
        vertices=torch.tensor([[-0.5, -0.5, 0.0], [0.5, -0.5, 0.0], [0.5, 0.5, 0.0], [-0.5, 0.5, 0.0]]),
        faces=torch.tensor([[0, 1, 2], [0, 2, 3]]),
    )
    scene = MeshScene(MeshScene.Config(texture=SMALL_TEXTURE), square, STREAM)
    light = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])
    cameras = turntable_cameras(2, 16, elevation_deg=0.0)
    view = scene.render(cameras, Shading(mode="textureless", light=light, ambient=0.0), STREAM)
    torch.testing.assert_close(view.rgb[:, :, 8, 8], torch.ones(2, 3))


def test_vertex_normals_point_outward() -> None:
    surface = ball_surface()
    torch.testing.assert_close(
        vertex_normals(surface.vertices, surface.faces),
        F.normalize(surface.vertices, dim=1),
        atol=0.02,
        rtol=0,
    )


@pytest.mark.parametrize("make", [tetmesh, mesh])
def test_an_oracle_shapes_a_ball_into_an_ellipsoid(make) -> None:  # type: ignore[no-untyped-def]
    """Fitting pictures of a red ellipsoid from six views also fits views that were not shown."""
    truth = tetmesh(replace(SMALL, cells=24, radii_m=(0.35, 0.6, 0.45)))
    red = torch.tensor([0.9, 0.2, 0.1])
    truth.surface_attributes = lambda points: Material(  # type: ignore[method-assign]
        base_color=red.expand(len(points), 3),
        metallic=torch.zeros(len(points), 1),
        roughness=torch.ones(len(points), 1),
    )
    scene = make()
    cameras, unseen = (
        turntable_cameras(6, 32, elevation_deg=10.0),
        turntable_cameras(3, 32, elevation_deg=40.0),
    )
    adam = torch.optim.Adam(
        [{"params": list(g.params), "lr": g.lr * 4} for g in scene.groups()], betas=(0.9, 0.99)
    )
    for step in range(40):
        shading = Shading(background=STREAM.fork("bg").at(step).uniform(6, 3))
        with torch.no_grad():
            target = truth.render(cameras, shading, STREAM).rgb
        view = scene.render(cameras, shading, STREAM)
        loss = (view.rgb - target).square().sum() / 6
        loss = loss + 5 * scene.penalties(view)["laplacian"]
        adam.zero_grad()
        loss.backward()
        adam.step()
    shading = Shading(background=torch.ones(3, 3))
    with torch.no_grad():
        assert psnr(scene, truth, unseen, shading) > 25


def psnr(scene: Scene, other: Scene, cameras, shading: Shading) -> float:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        difference = scene.render(cameras, shading, STREAM).rgb - other.render(cameras, shading, STREAM).rgb
    return -10 * math.log10(float(difference.square().mean()))


def voxel_blob() -> VoxelScene:
    """Two joined balls of smoothly changing colour."""
    scene = VoxelScene(VoxelScene.Config(resolutions=(12, 32)), STREAM)
    z, y, x = torch.meshgrid(*[torch.linspace(-1.05, 1.05, 32)] * 3, indexing="ij")
    away = torch.minimum(
        (x**2 + (y + 0.2) ** 2 + z**2).sqrt() - 0.45, (x**2 + (y - 0.35) ** 2 + z**2).sqrt() - 0.3
    )
    scene.base.copy_((-150 * away).clamp(-9, 9))
    with torch.no_grad():
        scene.levels[-1][0, 1:] = 1.5 * torch.stack([x, y, z]).sign() * torch.stack([x, y, z]).abs().sqrt()
    return scene.eval()


@pytest.mark.parametrize("kind", ["tetmesh", "mesh"])
def test_a_converted_voxel_scene_looks_alike(kind: str) -> None:
    source = voxel_blob()
    if kind == "tetmesh":
        made: Scene = tetmesh_from(
            source, 32, config=replace(SMALL, texture=TextureConfig()), texture_steps=150
        )
    else:
        made = mesh_from(source, 48, max_faces=4000, texture_steps=150)
    cameras, shading = turntable_cameras(4, 64), Shading(background=torch.ones(4, 3))
    assert psnr(made, source, cameras, shading) > 25
    surface = made.surface(32)
    assert measure(surface).watertight
    points = surface.vertices[::7]
    difference = made.material(points).base_color - source.material(points).base_color
    assert difference.abs().mean() < 0.05


def test_a_conversion_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="half_extent_m"):
        mesh_from(mesh(), config=MeshScene.Config(half_extent_m=0.3))


def test_the_tetrahedral_scene_is_built_from_a_config_alone() -> None:
    scene = build_scene("tetmesh", SMALL, STREAM)
    assert isinstance(scene, TetMeshScene)
    assert SCENES["tetmesh"] is TetMeshScene
