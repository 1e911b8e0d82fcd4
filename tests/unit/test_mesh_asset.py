"""The whole export of an analytic mug: hollow, one handle, three colours."""

import json
from dataclasses import replace

import pytest
import torch
from skimage.measure import marching_cubes

from sds3d.asset import AssetConfig, make_asset
from sds3d.cameras.orbit import turntable_cameras
from sds3d.errors import ConfigError, ExportError
from sds3d.interfaces import Material, Render, Scene, Surface
from sds3d.mesh.clean import measure, to_surface
from sds3d.mesh.fidelity import compare
from sds3d.mesh.files import load_glb, load_mesh, welded
from sds3d.mesh.textured import render_textured
from sds3d.rng import Stream

RED, GREEN, WHITE = (0.8, 0.15, 0.1), (0.1, 0.6, 0.2), (0.95, 0.95, 0.9)


class Mug(Scene):
    """A signed distance field: cup minus hollow plus ring; colours by region; sphere-traced renders."""

    def __init__(self, *, shiny_handle: bool = False) -> None:
        super().__init__()
        self.shiny_handle = shiny_handle

    def distance(self, p):
        radial = p[:, [0, 2]].norm(dim=1)
        cup = torch.maximum(radial - 0.5, p[:, 1].abs() - 0.6)
        hollow = torch.maximum(radial - 0.38, (p[:, 1] - 0.2).abs() - 0.65)
        ring = (
            torch.stack([(p[:, [0, 1]] - torch.tensor([0.55, 0.0])).norm(dim=1) - 0.3, p[:, 2]], 1).norm(
                dim=1
            )
            - 0.09
        )
        return torch.maximum(torch.minimum(cup, ring), -hollow)

    def normal(self, p):
        steps = 1e-3 * torch.eye(3)
        return torch.stack([self.distance(p + s) - self.distance(p - s) for s in steps], dim=1)

    def color(self, p):
        radial = p[:, [0, 2]].norm(dim=1, keepdim=True)
        outside = torch.where(p[:, 2:] > 0, torch.tensor(RED), torch.tensor(GREEN))
        return torch.where(radial < 0.44, torch.tensor(WHITE), outside)

    def material(self, points):
        metallic = torch.zeros(len(points), 1)
        if self.shiny_handle:
            metallic = (points[:, :1] > 0.55).float()
        return Material(
            base_color=self.color(points), metallic=metallic, roughness=torch.full_like(metallic, 0.7)
        )

    def surface(self, cells_per_side, *, iso_factor=1.0):
        axis = torch.linspace(-1, 1, cells_per_side + 1)
        grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).reshape(-1, 3)
        field = self.distance(grid).reshape([cells_per_side + 1] * 3).numpy()
        vertices, faces, _, _ = marching_cubes(field, 0.0, gradient_direction="ascent")
        return to_surface(vertices * 2.0 / cells_per_side - 1.0, faces)

    def render(self, cameras, shading, rng, *, progress=1.0):
        fine = cameras.resized(2 * cameras.width_px)
        size = fine.width_px
        v, u = torch.meshgrid(*[torch.arange(size) + 0.5] * 2, indexing="ij")
        rgb, alpha = [], []
        for c2w, k in zip(fine.c2w, fine.intrinsics, strict=True):
            local = torch.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], torch.ones_like(u)], -1)
            rays = torch.nn.functional.normalize(local.reshape(-1, 3) @ c2w[:3, :3].T, dim=1)
            t = torch.full((len(rays),), 2.0)
            for _ in range(60):
                t += self.distance(c2w[:3, 3] + t[:, None] * rays)
            points = c2w[:3, 3] + t[:, None] * rays
            hit = (self.distance(points).abs() < 3e-3) & (t < 6)
            alpha.append(hit.float().reshape(1, size, size))
            rgb.append((self.color(points) * hit[:, None]).T.reshape(3, size, size))
        alpha, rgb = (torch.nn.functional.avg_pool2d(torch.stack(x), 2) for x in (alpha, rgb))
        rgb = rgb + (1 - alpha) * shading.background[:, :, None, None]
        return Render(rgb=rgb, alpha=alpha, depth=torch.zeros_like(alpha))

    def groups(self):
        return []


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mug")
    config = AssetConfig(
        cells_per_side=64, max_faces=4000, texture_px=256, compare_px=64, formats=("glb", "stl")
    )
    return (
        make_asset(Mug(), folder, config, {"prompt": "a mug", "seed": 3, "config_hash": "abc"}),
        folder,
        config,
    )


def test_report_is_of_a_closed_mug_with_one_handle(made):
    report, _, config = made
    assert report.mesh.watertight
    assert report.mesh.components == 1
    assert report.mesh.euler == 0  # a torus: hollow and handle survive, no other tunnel
    assert report.mesh.volume > 0
    assert report.mesh.faces <= config.max_faces
    assert list(report.seconds) == ["surface", "clean", "unwrap", "bake", "write", "compare"]
    json.dumps(report.as_dict(), allow_nan=False)


def test_exported_file_looks_like_the_scene(made):
    fidelity = made[0].fidelity
    assert fidelity.psnr_db > 28
    assert fidelity.ssim > 0.95
    assert fidelity.silhouette_iou > 0.98


def test_fidelity_notices_a_wrong_texture(made):
    """Guards the measure itself: a mirrored texture on the same shape must score far worse."""
    report, _, _ = made
    mesh = load_mesh(report.files["glb"])
    cameras = turntable_cameras(4, 64)
    good = compare(Mug(), mesh, cameras, Stream(0, "t"))
    bad = compare(Mug(), replace(mesh, texture=mesh.texture.flip(0)), cameras, Stream(0, "t"))
    assert bad.psnr_db < good.psnr_db - 6
    assert bad.silhouette_iou == good.silhouette_iou


def test_fidelity_notices_a_wrong_shape_of_whatever_grey(made):
    """A ball of the background's own grey would hide before that background; here no grey hides."""
    mesh = load_mesh(made[0].files["glb"])
    for grey in (0.0, 0.5, 1.0):

        class Grey(Mug):
            def color(self, p, grey=grey):
                return torch.full_like(p, grey)

        plain = replace(mesh, texture=torch.full_like(mesh.texture, round(grey * 255)))
        cameras = turntable_cameras(2, 64)
        right = compare(Grey(), plain, cameras, Stream(0, "t"))
        wrong = compare(Grey(), replace(plain, vertices=plain.vertices * 0.7), cameras, Stream(0, "t"))
        assert wrong.psnr_db < min(right.psnr_db - 6, 20)


def test_front_of_the_file_is_red_and_the_inside_white(made):
    mesh = load_mesh(made[0].files["glb"])
    front = turntable_cameras(1, 65, elevation_deg=0.0)
    above = turntable_cameras(1, 65, elevation_deg=89.0)
    for cameras, expected in ((front, RED), (above, WHITE)):
        rgb, alpha, _ = render_textured(mesh, cameras, torch.zeros(1, 3))
        assert alpha[0, 0, 32, 32] == 1
        assert torch.allclose(rgb[0, :, 32, 32], torch.tensor(expected), atol=0.01)


def test_metadata_travels_in_the_file(made):
    _, notes = load_glb(made[0].files["glb"])
    assert notes["prompt"] == "a mug"
    assert notes["seed"] == 3
    assert notes["config_hash"] == "abc"
    assert notes["sds3d_version"]


def test_only_asked_files_are_written(made):
    assert sorted(path.name for path in made[1].iterdir()) == ["asset.glb", "asset.stl"]


def test_normals_agree_across_seams_and_point_outwards(made):
    mesh = load_mesh(made[0].files["glb"])
    _, group = welded(mesh)
    mean = torch.zeros(int(group.max()) + 1, 3).index_add_(0, torch.from_numpy(group), mesh.normals)
    count = torch.bincount(torch.from_numpy(group))[:, None]
    assert count.max() > 1  # there are seams
    assert torch.allclose((mean / count)[group], mesh.normals, atol=1e-5)
    away = (Mug().normal(mesh.vertices) * mesh.normals).sum(1)
    assert (away > 0).float().mean() > 0.98


def test_same_scene_gives_the_same_bytes(tmp_path):
    config = AssetConfig(cells_per_side=32, max_faces=1000, texture_px=128, compare_views=0)
    one, two = (make_asset(Mug(), tmp_path / name, config).files["glb"].read_bytes() for name in "ab")
    assert one == two


def test_varying_metalness_becomes_a_texture(tmp_path):
    config = AssetConfig(cells_per_side=32, max_faces=1000, texture_px=128, compare_views=0)
    plain = load_mesh(make_asset(Mug(), tmp_path / "a", config).files["glb"])
    shiny = load_mesh(make_asset(Mug(shiny_handle=True), tmp_path / "b", config).files["glb"])
    assert plain.metallic_roughness is None
    assert (plain.metallic, plain.roughness) == (0.0, pytest.approx(0.7))
    assert set(shiny.metallic_roughness[..., 2].unique().tolist()) == {0, 255}
    assert shiny.metallic_roughness[..., 1].unique().tolist() == [round(0.7 * 255)]
    assert (shiny.metallic, shiny.roughness) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("texture_px", 500),
        ("texture_px", 64),
        ("texture_px", 8192),
        ("formats", ()),
        ("formats", ("glb", "fbx")),
        ("cells_per_side", 0),
        ("max_faces", 3),
        ("min_piece_frac", 1.5),
        ("bake_depths_m", ()),
        ("compare_views", -1),
    ],
)
def test_bad_config_names_the_field(field, value):
    with pytest.raises(ConfigError, match=field if field != "formats" else "glb, gltf, obj, ply, stl"):
        AssetConfig(**{field: value})


def test_empty_scene_is_an_export_error(tmp_path):
    class Empty(Mug):
        def surface(self, cells_per_side, *, iso_factor=1.0):
            return Surface(vertices=torch.zeros(0, 3), faces=torch.zeros(0, 3, dtype=torch.int64))

    with pytest.raises(ExportError, match="no faces"):
        make_asset(Empty(), tmp_path, AssetConfig())
    assert list(tmp_path.iterdir()) == []


def test_measure_of_the_raw_mug_agrees_with_the_exported_one(made):
    raw = measure(Mug().surface(64))
    assert made[0].mesh.volume == pytest.approx(abs(raw.volume), rel=0.02)
    assert made[0].mesh.euler == raw.euler
