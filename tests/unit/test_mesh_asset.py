"""The whole export of an analytic mug: hollow, one handle, three colours."""

import json
from dataclasses import replace

import pytest
import torch

from sds3d.asset import AssetConfig, make_asset
from sds3d.cameras.orbit import turntable_cameras
from sds3d.errors import ConfigError, ExportError
from sds3d.interfaces import Surface
from sds3d.mesh.clean import measure
from sds3d.mesh.fidelity import albedo_difference, compare
from sds3d.mesh.file_facts import facts_of
from sds3d.mesh.files import load_glb, load_mesh, welded
from sds3d.mesh.textured import render_textured
from sds3d.rng import Stream
from tests.toys import RED, WHITE, Mug


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


def test_the_report_says_all_that_is_known_of_the_file(made):
    report, folder, config = made
    block = report.as_dict()["fidelity"]
    assert list(block) == [
        *["psnr_db", "ssim", "silhouette_iou", "worst_view_psnr_db", "albedo_difference", "views", "size_px"],
        *[
            "file",
            "faces",
            "components",
            "boundary_edges",
            "non_manifold_edges",
            "texels_per_m2",
            "file_bytes",
        ],
    ]
    assert (block["file"], block["views"], block["size_px"]) == ("glb", config.compare_views, 64)
    assert (block["components"], block["boundary_edges"], block["non_manifold_edges"]) == (1, 0, 0)
    assert block["faces"] == report.mesh.faces
    assert block["file_bytes"] == {name: (folder / f"asset.{name}").stat().st_size for name in ("glb", "stl")}
    assert block["albedo_difference"] < 0.02


def test_texel_density_is_that_of_the_texture(made):
    report, _, config = made
    density = report.facts.texels_per_m2
    assert density.low <= density.median <= density.high
    # No more texels than the texture has, and charts fill a good part of it.
    filled = density.median * report.mesh.area / config.texture_px**2
    assert 0.35 < filled < 1.0


def test_wrong_colours_raise_the_albedo_difference_and_wrong_seams_show_as_edges(made):
    mesh = load_mesh(made[0].files["glb"])
    darker = replace(mesh, texture=(mesh.texture * 0.5).to(torch.uint8))
    mean = float(
        albedo_difference(Mug(), replace(mesh, texture=torch.zeros_like(mesh.texture)), Stream(0, "t"))
    )
    found = albedo_difference(Mug(), darker, Stream(0, "t"))
    assert found == pytest.approx(mean / 2, rel=0.05)  # half of each colour is missing
    holed = facts_of(replace(mesh, faces=mesh.faces[1:]), "glb", {})
    assert (holed.boundary_edges, holed.non_manifold_edges) == (3, 0)
    doubled = facts_of(replace(mesh, faces=torch.cat([mesh.faces, mesh.faces[:1]])), "glb", {})
    assert doubled.non_manifold_edges == 3


def test_formats_without_colours_are_counted_too(tmp_path):
    config = AssetConfig(cells_per_side=32, max_faces=1000, texture_px=128)
    for kind, file in (("stl", "stl"), ("usdz", None)):
        block = make_asset(Mug(), tmp_path, replace(config, formats=(kind,))).as_dict()["fidelity"]
        assert (block["psnr_db"], block["file"], block["components"]) == (None, file, 1)
        assert block["boundary_edges"] == 0
        assert list(block["file_bytes"]) == [kind]
