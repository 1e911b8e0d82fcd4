"""Runs in stages: settings, handing over, resuming, refusing."""

import json
from pathlib import Path

import pytest
import torch

from sds3d import checkpoint
from sds3d.config.load import override_layers
from sds3d.errors import ConfigError, InputError
from sds3d.events.bus import Event, Finished, PhaseStarted, StepDone
from sds3d.mesh.files import load_mesh
from sds3d.run import Stop
from sds3d.staged import Stage, export_any, generate_stages, load_stages, resume_any

YAML = """
extends: default
prompt: a red mug
camera: {batch: 2, render_px: 32, hold_steps: 1}
guidance: {kind: sds, cfg_scale: 3, target_steps: 1}
preview: {turntable_frames: 0, every_s: 1000}
export: {cells_per_side: 24, max_faces: 600, texture_px: 128, compare_views: 2, compare_px: 32}
penalties: {opacity: 0, entropy: 0, tv_density: 0, tv_color: 0}
scene: {kind: voxel}
stages:
  - {name: coarse, steps: 3}
  - name: geometry
    steps: 2
    scene: {kind: tetmesh, cells: 12, coarse: [6], texture: {encoding: {levels: 4, log2_rows: 10}}}
    start: {texture_steps: 20}
  - name: texture
    steps: 2
    scene: {kind: mesh, texture: {encoding: {levels: 4, log2_rows: 10}}}
    start: {cells: 24, max_faces: 500, texture_steps: 20}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "stages.yaml").write_text(YAML)
    return str(tmp_path / "stages.yaml")


def test_every_stage_has_its_settings_on_top_of_the_common_ones(config: str) -> None:
    stages = load_stages(config, override_layers(["seed=7", "stages.geometry.steps=9"]))
    assert [stage.name for stage in stages] == ["coarse", "geometry", "texture"]
    assert [stage.job.steps for stage in stages] == [3, 9, 2]
    assert [stage.job.scene.kind for stage in stages] == ["voxel", "tetmesh", "mesh"]
    assert {stage.job.seed for stage in stages} == {7}
    assert stages[1].resolved.origin("steps") == "command line"


def test_a_config_without_stages_is_one(tmp_path: Path) -> None:
    (only,) = load_stages("default", override_layers(["prompt=a red mug"]))
    assert (only.name, only.job.prompt) == ("run", "a red mug")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("name: geometry|name: coarse", "two stages are named 'coarse'"),
        ("name: geometry|name: ../x", "every stage needs a name"),
        ("- {name: coarse, steps: 3}|- {steps: 3}", "every stage needs a name"),
        ("steps: 2|step: 2", "step"),
    ],
)
def test_faults_of_stages_name_the_line(tmp_path: Path, change: str, message: str) -> None:
    old, new = change.split("|")
    (tmp_path / "bad.yaml").write_text(YAML.replace(old, new, 1))
    with pytest.raises(ConfigError, match=r"bad\.yaml:\d+.*" + message):
        load_stages(str(tmp_path / "bad.yaml"))


def test_an_override_for_an_unknown_stage_names_the_known_ones(config: str) -> None:
    with pytest.raises(ConfigError, match="no such stage; known: coarse, geometry, texture"):
        load_stages(config, override_layers(["stages.paint.steps=2"]))
    with pytest.raises(ConfigError, match="known: none"):
        load_stages("default", override_layers(["stages.paint.steps=2"]))


def test_three_stages_hand_the_scene_on_and_end_in_one_asset(config: str, tmp_path: Path) -> None:
    heard: list[Event] = []
    result = generate_stages(load_stages(config), tmp_path / "run", listeners=[heard.append])
    assert (result.status, result.steps_done, result.folder) == ("done", 7, tmp_path / "run")
    assert result.files["glb"] == tmp_path / "run" / "asset.glb"
    phases = [
        event.name for event in heard if isinstance(event, PhaseStarted) and event.name.startswith("stage")
    ]
    assert phases == ["stage 1 of 3: coarse", "stage 2 of 3: geometry", "stage 3 of 3: texture"]
    assert [type(event) for event in heard].count(Finished) == 1
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert [entry["status"] for entry in manifest["stages"]] == ["done"] * 3
    assert manifest["fidelity"]["psnr_db"] > 10
    # The last stage keeps the faces that it was given.
    saved = checkpoint.load(sorted((tmp_path / "run/stages/3-texture/checkpoints").iterdir())[-1])
    assert torch.equal(saved.tensors["scene.offset"], torch.zeros_like(saved.tensors["scene.offset"]))
    assert len(load_mesh(result.files["glb"]).faces) == len(saved.tensors["scene.faces"])
    again = export_any(tmp_path / "run", ["stl"])
    assert again.files["stl"] == tmp_path / "run" / "asset.stl"
    assert resume_any(tmp_path / "run").status == "done"


def stopped_after(steps: int, stages: list[Stage], out: Path) -> Path:
    stop, taken = Stop(), []

    def listen(event: Event) -> None:
        if isinstance(event, StepDone):
            taken.append(event.step)
            if len(taken) == steps:
                stop.ask()

    result = generate_stages(stages, out, listeners=[listen], stop=stop)
    assert result.status == "interrupted"
    return out


def test_a_stopped_run_goes_on_inside_its_stage_and_ends_the_same(config: str, tmp_path: Path) -> None:
    every = override_layers(["checkpoint.every_steps=1"])
    whole = generate_stages(load_stages(config, every), tmp_path / "whole")
    for index, steps in enumerate((1, 2)):
        folder = stopped_after(steps, load_stages(config, every), tmp_path / f"cut{index}")
        result = resume_any(folder)
        assert result.status == "done"
        assert result.files["glb"].read_bytes() == whole.files["glb"].read_bytes()


def test_a_moved_run_goes_on(config: str, tmp_path: Path) -> None:
    """Stages know their predecessor by its place beside them."""
    folder = stopped_after(1, load_stages(config), tmp_path / "here")
    folder.rename(tmp_path / "there")
    assert resume_any(tmp_path / "there").status == "done"


def test_nothing_is_left_of_a_run_that_cannot_begin(config: str, tmp_path: Path) -> None:
    bad = load_stages(config, override_layers(["stages.texture.guidance.kind=dds"]))
    with pytest.raises(ConfigError, match=r"stage texture: .*edit\.run"):
        generate_stages(bad, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_mesh_without_a_start_is_refused() -> None:
    words = ["prompt=x", "scene={kind: mesh}", "penalties.entropy=0", "penalties.tv_density=0"]
    (only,) = load_stages("default", override_layers(words))
    with pytest.raises(ConfigError, match=r"a 'mesh' scene starts from another run; set start\.run"):
        only.job.validate()


def test_an_export_needs_a_checkpoint(config: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    manifest = {"kind": "stages", "stages": [{"name": "a", "folder": "stages/1-a", "status": "waiting"}]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="no checkpoint to export"):
        export_any(folder)
