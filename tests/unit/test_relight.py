"""Relighting a finished asset: files, framing, what turns, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import trimesh

from sds3d.cameras.orbit import turntable_cameras
from sds3d.cli import main
from sds3d.errors import InputError
from sds3d.interfaces import Surface
from sds3d.mesh.clean import vertex_normals
from sds3d.mesh.files import export_mesh
from sds3d.mesh.lit import render_lit
from sds3d.mesh.textured import TexturedMesh
from sds3d.mesh.unwrap import unwrap
from sds3d.ops.environment import make_environment
from sds3d.ops.skies import sky
from sds3d.relight import RelightConfig, centred, frames, relight


@pytest.fixture(scope="module")
def ball() -> TexturedMesh:
    shape = trimesh.creation.icosphere(subdivisions=3)
    surface = Surface(
        vertices=torch.tensor(shape.vertices, dtype=torch.float32), faces=torch.tensor(shape.faces)
    )
    atlas = unwrap(surface, texture_px=64, padding_px=2)
    return TexturedMesh(
        vertices=surface.vertices[atlas.source],
        faces=atlas.faces,
        normals=vertex_normals(surface)[atlas.source],
        uvs=atlas.uvs,
        texture=torch.full((64, 64, 3), 180, dtype=torch.uint8),
    )


def test_under_a_white_sky_a_matte_ball_has_its_own_colour_everywhere(ball: TexturedMesh) -> None:
    light = make_environment(torch.ones(32, 64, 3) * 0.7, white=None)
    cameras = turntable_cameras(2, 48)
    rgb, alpha, _ = render_lit(replace(ball, metallic=0.0, roughness=1.0), cameras, torch.zeros(2, 3), light)
    inside = rgb.permute(0, 2, 3, 1)[alpha[:, 0] == 1.0]
    assert inside.std(0).max() < 0.02


def test_a_turned_light_before_a_turned_camera_shows_a_ball_the_same(ball: TexturedMesh) -> None:
    """An object that turns under a fixed light: for a plain ball nothing changes."""
    few = list(frames(ball, sky("studio"), RelightConfig(frames=4, size_px=32)))
    for frame in few[1:]:
        assert (frame - few[0]).square().mean().sqrt() < 0.02
    lit = list(frames(ball, sky("studio"), RelightConfig(frames=4, size_px=32, turning="light")))
    assert max(float((frame - lit[0]).abs().max()) for frame in lit[1:]) > 0.1


def test_a_normal_texture_bends_the_light(ball: TexturedMesh) -> None:
    flat = torch.tensor([128, 128, 255], dtype=torch.uint8).expand(64, 64, 3).contiguous()
    tilted = torch.tensor([208, 128, 227], dtype=torch.uint8).expand(64, 64, 3).contiguous()
    from sds3d.mesh.tangents import vertex_tangents

    tangents = vertex_tangents(ball)
    cameras, ground = turntable_cameras(1, 48), torch.zeros(1, 3)
    plain, same, bent = (
        render_lit(mesh, cameras, ground, sky("studio"))[0]
        for mesh in (
            ball,
            replace(ball, normal_texture=flat, tangents=tangents),
            replace(ball, normal_texture=tilted, tangents=tangents),
        )
    )
    assert (plain - same).abs().max() < 0.03
    assert (plain - bent).abs().max() > 0.1


def test_any_size_and_place_is_framed(ball: TexturedMesh) -> None:
    moved = replace(ball, vertices=ball.vertices * 0.02 + torch.tensor([5.0, 1.0, -3.0]))
    torch.testing.assert_close(centred(moved).vertices, centred(ball).vertices, rtol=0, atol=1e-3)
    with pytest.raises(InputError, match="no extent"):
        centred(replace(ball, vertices=torch.zeros_like(ball.vertices)))


def test_the_command_writes_a_video_and_a_sheet(ball: TexturedMesh, tmp_path: Path) -> None:
    path = export_mesh(ball, tmp_path, "ball", ("glb",))["glb"]
    words = [
        "relight",
        str(path),
        "--env",
        "sunset",
        "--frames",
        "3",
        "--size",
        "32",
        "--out",
        str(tmp_path / "lit"),
    ]
    assert main(words) == 0
    assert sorted(file.name for file in (tmp_path / "lit").iterdir()) == ["relit.mp4", "relit.png"]


def test_bad_input_is_refused_before_anything_is_written(ball: TexturedMesh, tmp_path: Path) -> None:
    path = export_mesh(ball, tmp_path, "ball", ("glb",))["glb"]
    with pytest.raises(InputError, match="known: studio"):
        relight(path, tmp_path / "lit", RelightConfig(environment="moon"))
    with pytest.raises(InputError, match="cannot be read"):
        relight(tmp_path / "none.glb", tmp_path / "lit", RelightConfig())
    with pytest.raises(InputError, match="even number"):
        RelightConfig(size_px=33)
    assert not (tmp_path / "lit").exists()
    assert main(["relight", str(path), "--turning", "up"]) == 2
