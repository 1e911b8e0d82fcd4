"""Texturing a given mesh: placed before the cameras, and given back as it was."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import trimesh

from sds3d.asset import AssetConfig, make_asset
from sds3d.cli import main
from sds3d.config.load import override_layers
from sds3d.convert import StartConfig, converted
from sds3d.errors import ConfigError, InputError
from sds3d.events.bus import CheckpointSaved, Event, Warned
from sds3d.given import START_FILE, encode_given, read_given, scene_from
from sds3d.interfaces import Surface
from sds3d.mathx.pose import Pose, fitting, upright
from sds3d.mesh.files import export_mesh, load_mesh
from sds3d.mesh.read import load_geometry
from sds3d.mesh.textured import TexturedMesh
from sds3d.mesh.unwrap import fault_of_uvs, unwrap
from sds3d.ops.hashgrid import HashGridConfig
from sds3d.rng import Stream
from sds3d.run import Stop, export, generate, resume
from sds3d.scenes import MeshScene, build_scene
from sds3d.scenes.texture import TextureConfig
from sds3d.staged import generate_stages, load_stages

TINY = MeshScene.Config(texture=TextureConfig(encoding=HashGridConfig(levels=2, log2_rows=8), hidden=4))
SMALL = AssetConfig(texture_px=128, compare_views=2, compare_px=64)
UPS = ("x", "y", "z", "-x", "-y", "-z")


@pytest.fixture
def horn(tmp_path: Path) -> Path:
    """A cone in millimetres that points up along z, far from the origin: an STL as CAD programs write them."""
    cone = trimesh.creation.cone(radius=20.0, height=60.0, sections=16)
    cone.apply_translation([100.0, -50.0, 7.0])
    cone.export(tmp_path / "horn.stl")
    return tmp_path / "horn.stl"


def triangles(mesh: TexturedMesh) -> torch.Tensor:
    return mesh.vertices[mesh.faces]


def scene_of(path: Path, **options: object) -> MeshScene:
    mesh, _ = read_given(path, max_faces=10_000, keep_uvs=bool(options.pop("keep_uvs", False)))
    return scene_from(mesh, TINY, Stream(0, "test"), **options)


# -- poses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("up", UPS)
def test_upright_turns_the_named_axis_up_and_keeps_handedness(up: str) -> None:
    turn = upright(up)
    axis = torch.zeros(3, dtype=torch.float64)
    axis["xyz".index(up[-1])] = -1.0 if up[0] == "-" else 1.0
    assert torch.allclose(turn @ axis, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    assert torch.allclose(turn @ turn.T, torch.eye(3, dtype=torch.float64), atol=1e-12)
    assert float(torch.linalg.det(turn)) == pytest.approx(1.0)


def test_the_front_of_modelling_programs_faces_plus_z_and_may_be_elsewhere() -> None:
    ahead = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    minus_y = torch.tensor([0.0, -1.0, 0.0], dtype=torch.float64)
    plus_x = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    assert torch.allclose(upright("z") @ minus_y, ahead)
    assert torch.allclose(upright("z", 90.0) @ plus_x, ahead, atol=1e-12)
    assert torch.allclose(upright("y", 90.0) @ plus_x, ahead, atol=1e-12)


def test_poses_invert_and_follow_each_other() -> None:
    points = Stream(0, "points").normal(20, 3).double()
    first = fitting(points, upright("z", 30.0), 0.5)
    second = Pose(
        scale=3.0, turn=upright("-x", 10.0), shift=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    )
    assert torch.allclose(first.inverse().points(first.points(points)), points)
    assert torch.allclose(first.then(second).points(points), second.points(first.points(points)))
    assert float(first.points(points).norm(dim=1).max()) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="all points are at one place"):
        fitting(torch.ones(4, 3), upright("y"), 1.0)


# -- scene and asset --------------------------------------------------------------------------------------------------


def test_the_object_stands_before_the_cameras_and_returns_to_its_file(horn: Path, tmp_path: Path) -> None:
    scene = scene_of(horn, up="z")
    points = scene.vertices()
    assert float(points.norm(dim=1).max()) == pytest.approx(0.94, abs=1e-5)
    tip = points[points[:, 1].argmax()]
    assert float(tip[[0, 2]].abs().max()) < 1e-5
    assert len(points) == len(trimesh.load(horn).vertices)  # joined, whatever the file parts
    report = make_asset(scene, tmp_path, replace(SMALL, formats=("glb", "obj", "stl")))
    given = load_geometry(horn)
    for kind in ("glb", "obj", "stl"):
        assert torch.equal(triangles(load_mesh(report.files[kind])), triangles(given))
    back = load_mesh(report.files["glb"])
    # Hard edges stay hard: the base looks down in the file's own axes.
    base = back.vertices[:, 2] < 7.5
    assert bool(((back.normals[base] - torch.tensor([0.0, 0.0, -1.0])).norm(dim=1) < 1e-5).any())
    assert report.fidelity is not None
    assert report.fidelity.psnr_db > 30
    assert report.mesh.watertight


def test_size_and_pivot_may_be_asked_for_on_top(horn: Path, tmp_path: Path) -> None:
    report = make_asset(scene_of(horn, up="z"), tmp_path, replace(SMALL, size_m=0.12, pivot="center"))
    mesh, given = load_mesh(report.files["glb"]), load_geometry(horn)
    middle = (given.vertices.amin(0) + given.vertices.amax(0)) / 2
    assert torch.allclose(triangles(mesh), (triangles(given) - middle) * 0.002, atol=1e-6)
    assert report.fidelity is not None
    assert report.fidelity.psnr_db > 30  # what is compared stands in the scene again


def test_a_checkpoint_brings_the_file_back(horn: Path, tmp_path: Path) -> None:
    scene = scene_of(horn, up="z", front_deg=20.0)
    again = build_scene("mesh", TINY, Stream(1, "other"))
    again.load_state_dict(scene.state_dict())
    one, two = (
        make_asset(each, tmp_path / name, SMALL).files["glb"] for each, name in ((scene, "a"), (again, "b"))
    )
    assert one.read_bytes() == two.read_bytes()
    plain = MeshScene(TINY, Surface(vertices=scene.given, faces=scene.faces), Stream(0, "plain"))
    assert not [name for name in plain.state_dict() if name.startswith("file")]


def test_own_texture_coordinates_are_kept_where_they_can_be(tmp_path: Path) -> None:
    ball = trimesh.creation.icosphere(subdivisions=2)
    surface = Surface(
        vertices=torch.tensor(ball.vertices, dtype=torch.float32), faces=torch.tensor(ball.faces)
    )
    atlas = unwrap(surface, texture_px=256, padding_px=2)
    mesh = TexturedMesh(
        vertices=surface.vertices[atlas.source],
        faces=atlas.faces,
        normals=surface.vertices[atlas.source],
        uvs=atlas.uvs,
        texture=torch.zeros(8, 8, 3, dtype=torch.uint8),
    )
    path = export_mesh(mesh, tmp_path, "ball", ("glb",))["glb"]
    report = make_asset(scene_of(path, keep_uvs=True), tmp_path / "kept", SMALL)
    back = load_mesh(report.files["glb"])
    assert torch.equal(back.faces, mesh.faces)
    assert torch.equal(back.vertices, mesh.vertices)
    assert torch.allclose(back.uvs, mesh.uvs, atol=1e-6)
    assert report.charts == atlas.charts
    assert report.fidelity is not None
    assert report.fidelity.psnr_db > 30


def test_texture_coordinates_that_no_texture_fits_are_refused(horn: Path, tmp_path: Path) -> None:
    square = torch.tensor([[0.1, 0.1], [0.9, 0.1], [0.1, 0.9], [0.9, 0.9]])
    apart = torch.tensor([[0, 1, 2], [1, 3, 2]])
    assert fault_of_uvs(square, apart) is None
    assert "overlap: 100 %" in str(fault_of_uvs(square, torch.tensor([[0, 1, 2], [0, 1, 2]])))
    assert "outside the unit square" in str(fault_of_uvs(square * 3, apart))
    assert "cover nothing" in str(fault_of_uvs(square * 0, apart))
    with pytest.raises(
        InputError, match=r"horn\.stl: its texture coordinates are missing; leave out keep_uvs"
    ):
        read_given(horn, max_faces=1000, keep_uvs=True)


def test_a_mesh_beyond_the_limit_is_simplified_and_says_so(tmp_path: Path) -> None:
    ball = trimesh.creation.icosphere(subdivisions=3)
    ball.export(tmp_path / "ball.ply")
    mesh, note = read_given(tmp_path / "ball.ply", max_faces=400, keep_uvs=False)
    assert 300 < len(mesh.faces) <= 400
    assert note is not None
    assert note.startswith("ball.ply: simplified from 1280 to ")
    (tmp_path / START_FILE).write_bytes(encode_given(mesh))
    again, nothing = read_given(tmp_path / START_FILE, max_faces=400, keep_uvs=False)
    assert nothing is None
    assert torch.equal(triangles(again), triangles(mesh))
    assert torch.equal(again.normals, mesh.normals)


def test_other_settings_keep_the_file_and_its_colours(horn: Path, tmp_path: Path) -> None:
    scene = scene_of(horn, up="z")
    with torch.no_grad():
        list(scene.texture.network.parameters())[-1][:3] = torch.tensor([4.0, -4.0, -4.0])
    config = replace(TINY, texture=replace(TINY.texture, hidden=8))
    made = converted(scene, "mesh", config, Stream(0, "convert"), StartConfig(texture_steps=60))
    assert isinstance(made, MeshScene)
    assert converted(scene, "mesh", TINY, Stream(0, "convert"), StartConfig()) is scene
    found = made.material(made.given).base_color.mean(0)
    assert torch.allclose(found, scene.material(scene.given).base_color.mean(0), atol=0.05)
    report = make_asset(made, tmp_path, SMALL)
    assert torch.equal(triangles(load_mesh(report.files["glb"])), triangles(load_geometry(horn)))


# -- runs -------------------------------------------------------------------------------------------------------------

WORDS = [
    "prompt=a red mug",
    "steps=4",
    "camera.batch=2",
    "camera.render_px=32",
    "checkpoint.every_steps=1",
    "preview={turntable_frames: 0, every_s: 1000}",
    "export={texture_px: 128, compare_views: 2, compare_px: 32}",
    "scene.texture={encoding: {levels: 4, log2_rows: 10}}",
]


def job_for(path: Path, *words: str):
    (only,) = load_stages("toybox/texture", override_layers([*WORDS, f"start.mesh={path}", *words]))
    return only.job


def test_a_run_holds_its_mesh_and_goes_on_without_the_file(horn: Path, tmp_path: Path) -> None:
    job = job_for(horn, "start.up=z")
    whole = generate(job, tmp_path / "whole")
    given = load_geometry(horn)
    assert torch.equal(triangles(load_mesh(whole.files["glb"])), triangles(given))
    stop = Stop()

    def listen(event: Event) -> None:
        if isinstance(event, CheckpointSaved):
            stop.ask()

    cut = generate(job, tmp_path / "cut", listeners=[listen], stop=stop)
    assert cut.status == "interrupted"
    horn.unlink()
    (tmp_path / "cut").rename(tmp_path / "moved")
    done = resume(tmp_path / "moved")
    assert done.files["glb"].read_bytes() == whole.files["glb"].read_bytes()
    shutil.rmtree(tmp_path / "moved" / "checkpoints")
    manifest = json.loads((tmp_path / "moved" / "manifest.json").read_text())
    (tmp_path / "moved" / "manifest.json").write_text(json.dumps(manifest | {"status": "interrupted"}))
    begun = resume(tmp_path / "moved")  # from its own copy of the mesh
    assert begun.files["glb"].read_bytes() == whole.files["glb"].read_bytes()
    again = export(tmp_path / "whole", ["ply"])
    assert torch.equal(triangles(load_mesh(again.files["ply"])), triangles(given))


def test_a_simplified_mesh_is_in_the_warnings(tmp_path: Path) -> None:
    trimesh.creation.icosphere(subdivisions=3).export(tmp_path / "ball.obj")
    heard: list[Event] = []
    job = job_for(tmp_path / "ball.obj", "start.mesh_faces=400", "steps=1")
    result = generate(job, tmp_path / "run", listeners=[heard.append])
    assert any("simplified from 1280" in text for text in result.warnings)
    assert any(isinstance(event, Warned) and "simplified" in event.message for event in heard)
    assert len(load_mesh(result.files["glb"]).faces) <= 400


def test_stages_hand_the_mesh_on(horn: Path, tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(
        "extends: toybox/texture\nstages:\n  - {name: rough, steps: 1}\n  - {name: fine, steps: 1, time: {low: 0.2}}\n"
    )
    words = [*WORDS[:1], *WORDS[2:], f"start.mesh={horn}", "start.up=z"]
    result = generate_stages(
        load_stages(str(tmp_path / "two.yaml"), override_layers(words)), tmp_path / "run"
    )
    assert torch.equal(triangles(load_mesh(result.files["glb"])), triangles(load_geometry(horn)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["start.run=elsewhere"], r"start\.run: cannot be combined with start\.mesh"),
        (["particles=2"], r"start\.mesh: cannot be combined with particles"),
    ],
)
def test_starts_that_contradict_each_other_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job_for(Path("x.glb"), *words).validate()


# -- the command line -------------------------------------------------------------------------------------------------

TRIANGLE = "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n"
BAD = {
    "gone.glb": (None, "no such file"),
    "x.fbx": (b"Kaydara", "unknown format; known formats: glb, gltf, obj, ply, stl, off"),
    "empty.stl": (b"", "holds no mesh"),
    "cut.glb": (b"glTF\x02\x00\x00\x00\xff\xff\x00\x00", "cannot be read"),
    "points.obj": (b"v 0 0 0\nv 1 0 0\n", "holds no mesh"),
    "dot.obj": (b"v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n", "all points are at one place"),
    "nan.obj": (TRIANGLE.replace("v 1", "v nan").encode(), "not finite"),
    "evil.obj": (b"mtllib ../../etc/passwd\n" + TRIANGLE.encode(), "outside its own folder"),
    "evil.gltf": (
        b'{"asset":{"version":"2.0"},"buffers":[{"uri":"http://x/y","byteLength":9}]}',
        "no addresses",
    ),
    "huge.gltf": (
        b'{"asset":{"version":"2.0"},"bufferViews":[],"accessors":'
        b'[{"componentType":5126,"type":"VEC3","count":99999999999}]}',
        "declares arrays",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("command", ["texture", "relight"])
def test_bad_meshes_end_with_one_line_and_status_2(
    command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = BAD[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    out = tmp_path / "out"
    out.mkdir()
    words = ["a red mug", "--out", str(out)] if command == "texture" else ["--out", str(out)]
    status = main([command, str(path), *words])
    said = capsys.readouterr().err
    assert status == 2
    assert said.count("error: ") == 1
    message = message if command == "texture" else message.replace("holds no mesh", "holds 0 meshes")
    message = (
        message if command == "texture" else message.replace("all points are at one place", "has no extent")
    )
    assert message in said
    assert not out.exists() or not list(out.iterdir())
    assert sorted(tmp_path.iterdir()) == sorted(p for p in (path, out) if p.exists())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export.texture_px=300"], "expected a power of two from 128 to 4096"),
        (["export.texture_px=65536"], "expected a value from 128 to 4096"),
        (["--formats", "glb,fbx"], "unknown format 'fbx'; known formats: glb, gltf, obj, ply, stl, usdz"),
        (["--up", "w"], "start.up"),
        (["--keep-uvs"], "its texture coordinates are missing"),
        (["start.mesh_faces=5"], "start.mesh_faces"),
        (["--config", "toybox/nothing"], "unknown config"),
    ],
)
def test_bad_settings_leave_everything_as_it_was(
    words: list[str], message: str, horn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["texture", str(horn), "a red mug", "--out", str(tmp_path / "run"), *words]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["horn.stl"]


def test_a_folder_in_use_is_not_touched(
    horn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "asset.glb").write_bytes(b"mine")
    assert main(["texture", str(horn), "a red mug", "--out", str(tmp_path / "run")]) == 2
    assert "holds other files" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["asset.glb"]
    assert (tmp_path / "run" / "asset.glb").read_bytes() == b"mine"


def test_a_scene_without_faces_is_bad_input_and_its_old_files_stay(
    horn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = generate(job_for(horn, "steps=1"), tmp_path / "run").folder
    before = {path: path.read_bytes() for path in run.glob("asset*")}
    nothing = Surface(vertices=torch.zeros(3, 3), faces=torch.zeros(0, 3, dtype=torch.int64))
    empty = MeshScene(TINY, nothing, Stream(0, "empty"))
    monkeypatch.setattr("sds3d.run.restored_scene", lambda job, saved: empty)
    assert main(["export", str(run), "--format", "glb,obj"]) == 2
    said = capsys.readouterr().err
    assert "error: the scene is empty: its mesh has no faces" in said
    assert {path: path.read_bytes() for path in run.glob("asset*")} == before
