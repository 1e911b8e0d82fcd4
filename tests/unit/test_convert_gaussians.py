"""Surface -> Gaussians -> surface: discs that lie flat, depth that is the surface's, fusion that is closed."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh
from scipy.spatial import cKDTree

from sds3d.cameras.orbit import turntable_cameras
from sds3d.config.load import config_names, override_layers
from sds3d.convert import StartConfig, cloud_of, converted, gaussians_from
from sds3d.errors import ConfigError, ExportError
from sds3d.interfaces import Shading, Surface
from sds3d.mesh.clean import measure, to_surface
from sds3d.ops.splat_depth import median_depth
from sds3d.ops.splat_reference import rotation_matrices
from sds3d.ops.tsdf import fuse_depths
from sds3d.rng import Stream
from sds3d.scenes import SCENES, GaussianScene, MeshScene
from sds3d.scenes.gaussian_start import FLATNESS, WIDTH, facing, spacing
from sds3d.scenes.gaussians import PARAMETERS
from sds3d.staged import load_stages
from sds3d.surfaces import sample_surface, surface_of
from tests.toys import gaussians_at, shell

STREAM = Stream(5, "convert gaussians")
CELLS = 36


def mesh_scene(mesh: trimesh.Trimesh) -> MeshScene:
    surface = to_surface(np.asarray(mesh.vertices), np.asarray(mesh.faces))
    return MeshScene(MeshScene.Config(), surface, STREAM.fork("mesh"))


def gap_m(surface: Surface, mesh: trimesh.Trimesh) -> float:
    """Symmetric Chamfer distance in metres."""
    ours = sample_surface(surface, 4000, STREAM.fork("ours"))[0].numpy()
    theirs = mesh.sample(4000, seed=0)
    return float(cKDTree(ours).query(theirs)[0].mean() + cKDTree(theirs).query(ours)[0].mean()) / 2


# ------------------------------------------------------------------------------------------ surface -> Gaussians


def test_a_disc_faces_along_its_normal() -> None:
    normals = torch.nn.functional.normalize(STREAM.fork("normals").normal(200, 3), dim=-1)
    normals[0], normals[1] = torch.tensor([0.0, 0, -1]), torch.tensor([0.0, 0, 1])
    turned = rotation_matrices(facing(normals))[:, :, 2]
    torch.testing.assert_close(turned, normals, atol=1e-5, rtol=0)


def test_discs_lie_on_the_surface_in_its_colours() -> None:
    source = mesh_scene(trimesh.creation.box((1.0, 0.6, 0.8)))
    made = gaussians_from(source, GaussianScene.Config(count=500, cap=500), STREAM, StartConfig())
    inside = made.means.detach().abs() - torch.tensor([0.5, 0.3, 0.4])
    assert inside.amax(1).abs().max() < 1e-5, "every mean lies on a side of the box"
    thinnest = made.scales.argmin(1)
    assert (thinnest == 2).all()
    torch.testing.assert_close(made.scales[:, 2], FLATNESS * made.scales[:, 0])
    torch.testing.assert_close(made.scales[:, 0], WIDTH * spacing(made.means))
    normal = rotation_matrices(made.quats.detach())[:, :, 2]
    assert (normal.abs().amax(1) > 1 - 1e-5).all(), "normals of a box lie along the axes"
    torch.testing.assert_close(made.opacity, torch.full((500,), 0.9))
    torch.testing.assert_close(made.color, source.material(made.means).base_color, atol=1e-5, rtol=0)


def test_scatter_and_noise_are_bounded_as_asked() -> None:
    source = mesh_scene(trimesh.creation.icosphere(3, 0.5))
    config = GaussianScene.Config(count=400, cap=400)
    plain = gaussians_from(source, config, STREAM, StartConfig())
    noisy = gaussians_from(source, config, STREAM, StartConfig(scatter_m=0.05, color_noise=0.2, opacity=0.1))
    off = (noisy.means - plain.means).norm(dim=1)
    assert 0.02 < off.mean() < off.max() <= 0.05 + 1e-6
    more = noisy.color - plain.color
    assert more.min() > -1e-5
    assert 0.07 < more.mean() < 0.13
    assert more.max() <= 0.2 + 1e-5
    torch.testing.assert_close(noisy.opacity, torch.full((400,), 0.1))


def test_the_picture_of_the_discs_is_that_of_the_mesh() -> None:
    source = mesh_scene(trimesh.creation.torus(0.5, 0.2))
    made = gaussians_from(source, GaussianScene.Config(count=4000, cap=4000), STREAM, StartConfig())
    cameras = turntable_cameras(3, 128)
    white = Shading(background=torch.ones(3, 3))
    with torch.no_grad():
        mesh, splats = (scene.render(cameras, white, STREAM) for scene in (source, made))
    both = ((mesh.alpha > 0.5) & (splats.alpha > 0.5)).sum()
    # The rasteriser widens every splat by half a pixel, and with it the outline.
    assert both / ((mesh.alpha > 0.5) | (splats.alpha > 0.5)).sum() > 0.87
    solid = (mesh.alpha > 0.99).expand_as(mesh.rgb)
    assert (mesh.rgb - splats.rgb)[solid].square().mean() < 10 ** (-35 / 10)
    assert splats.alpha[mesh.alpha > 0.99].min() > 0.7, "no gaps"


def test_gaussians_with_other_settings_are_taken_over() -> None:
    source = gaussians_at(shell(250))
    made = gaussians_from(source, GaussianScene.Config(count=8, cap=900, lr_means=0.1), STREAM)
    for name in PARAMETERS:
        assert torch.equal(getattr(made, name), getattr(source, name))
        assert getattr(made, name) is not getattr(source, name)
    assert {group.name: group.lr for group in made.groups()}["means"] == 0.1


# ------------------------------------------------------------------------------------------ Gaussians -> surface


def test_median_depth_is_where_the_ray_is_half_opaque() -> None:
    """Of three sheets with alpha 0.4 the second makes it half opaque; the mean lies between all three."""
    grid = torch.linspace(-0.5, 0.5, 41)
    sheets = [
        torch.stack([*torch.meshgrid(grid, grid, indexing="ij"), torch.full((41, 41), z)], -1).view(-1, 3)
        for z in (0.6, 0.0, -0.6)
    ]
    made = gaussians_at(torch.cat(sheets), scale=0.02, opacity=0.09)
    camera = turntable_cameras(1, 64, elevation_deg=0.0)
    parts = (made.means, made.quats, made.scales, made.opacity)
    depth, alpha = median_depth(*parts, camera)
    middle = (0, 0, slice(28, 36), slice(28, 36))
    with torch.no_grad():
        view = made.render(camera, Shading(), STREAM)
    torch.testing.assert_close(alpha, view.alpha)
    front = gaussians_at(sheets[0], scale=0.02, opacity=0.09)
    _, one = median_depth(front.means, front.quats, front.scales, front.opacity, camera)
    assert 0.3 < one[middle].mean() < 0.5
    torch.testing.assert_close(depth[middle], torch.full((8, 8), 3.3), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("shape", "euler"),
    [
        (trimesh.creation.torus(0.55, 0.22), 0),
        (trimesh.creation.box((1.0, 0.6, 0.8)), 2),
    ],
    ids=["torus", "box"],
)
def test_fusion_gives_back_the_shape_closed(shape: trimesh.Trimesh, euler: int) -> None:
    config = GaussianScene.Config(count=2500, cap=2500)
    splats = gaussians_from(mesh_scene(shape), config, STREAM, StartConfig())
    surface = surface_of(splats, CELLS, way="tsdf")
    stats = measure(surface)
    assert (stats.watertight, stats.components, stats.euler) == (True, 1, euler)
    # The outline is half opaque about a standard deviation outside of the discs' middles; 0.035 m is 0.8 cells.
    assert gap_m(surface, shape) < 0.035
    assert 0.97 < stats.volume / shape.volume < 1.2


def test_fusion_closes_what_no_view_saw_and_what_is_torn() -> None:
    """A ball without its bottom, and with gaps that a view or two look through: still one closed ball."""
    points = shell(3000)
    kept = (points[:, 1] > -0.45) & ~((points - torch.tensor([0.6, 0.0, 0.0])).norm(dim=1) < 0.06)
    scene = gaussians_at(points[kept], scale=0.025)
    surface = surface_of(scene, CELLS, way="tsdf")
    stats = measure(surface)
    assert (stats.watertight, stats.components) == (True, 1)
    assert stats.volume > 0.85 * 4 / 3 * math.pi * 0.6**3
    assert surface.vertices[:, 1].min() < -0.45


def test_exact_depths_of_a_ball_give_its_distance() -> None:
    """Closed form: rays of a pinhole camera meet a ball at a known depth."""
    from sds3d.ops.volume import camera_rays

    radius, cameras = 0.5, turntable_cameras(6, 96, 20.0)
    origins, directions, _ = camera_rays(cameras.c2w, cameras.intrinsics, 96, 96)
    along = (origins * directions).sum(-1)
    inside = along.square() - origins.square().sum(-1) + radius**2
    hit = (inside > 0)[:, None]
    distance = -along - inside.clamp_min(0).sqrt()
    forward = cameras.c2w[:, None, None, :3, 2]
    depth = (distance * (directions * forward).sum(-1))[:, None]
    fused = fuse_depths(
        torch.where(hit, depth, 0.0), hit.float(), cameras, half_extent=0.8, cells=32, trunc_m=0.15
    )
    axis = torch.linspace(-0.8, 0.8, 33)
    at = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).norm(dim=-1)
    assert (fused[at < radius - 0.1] < 0).all()
    assert (fused[at > radius + 0.12] > 0).float().mean() > 0.99
    assert fused.min() >= -1
    assert fused.max() <= 1


# ------------------------------------------------------------------------------------------------------ refusals


def test_what_has_no_way_is_refused_with_the_ways_there_are() -> None:
    for kind in ("voxel", "nerf"):
        with pytest.raises(ConfigError, match="become a tetmesh, a mesh or gaussians"):
            converted(gaussians_at(shell(50)), kind, SCENES[kind].Config(), STREAM, StartConfig())


def test_a_scene_without_a_surface_is_refused() -> None:
    faint = gaussians_at(shell(200), opacity=0.005)
    for way in ("tsdf", "density"):
        with pytest.raises(ExportError, match="the scene is empty"):
            converted(faint, "mesh", MeshScene.Config(), STREAM, StartConfig(surface=way, cells=16))


def test_the_cloud_of_a_scene_is_what_it_renders() -> None:
    scene = gaussians_at(shell(40), scale=0.04, opacity=0.7)
    cloud = cloud_of(scene)
    torch.testing.assert_close(cloud.opacity, torch.full((40,), 0.7))
    torch.testing.assert_close(cloud.scales, torch.full((40, 3), 0.04))
    assert not cloud.means.requires_grad


# ------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("dreamgaussian", ["gaussians", "mesh"]),
        ("gaussiandreamer", ["nerf", "gaussians"]),
        ("prolificdreamer", ["nerf", "tetmesh", "mesh"]),
        ("magic3d", ["nerf", "tetmesh"]),
        ("toybox/dreamgaussian", ["gaussians", "mesh"]),
        ("toybox/gaussiandreamer", ["voxel", "gaussians", "mesh"]),
        ("toybox/prolificdreamer", ["voxel", "tetmesh", "mesh"]),
        ("toybox/magic3d", ["voxel", "tetmesh"]),
    ],
)
def test_the_stages_of_a_preset_can_follow_each_other(name: str, kinds: list[str]) -> None:
    """Every stage is valid as the stage that it is; the list of shipped configs names the preset."""
    assert name in config_names()
    stages = load_stages(name, override_layers(["prompt=a red mug"]))
    assert [stage.job.scene.kind for stage in stages] == kinds
    for index, stage in enumerate(stages):
        start = replace(stage.job.start, run="../before" if index else None)
        replace(stage.job, start=start).validate()
