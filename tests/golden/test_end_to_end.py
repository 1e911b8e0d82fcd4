"""The main job, as a user runs it: prompt in, judged asset out; interrupted and resumed on the way."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sds3d.cameras.orbit import turntable_cameras
from sds3d.mesh.files import load_glb
from sds3d.mesh.textured import render_textured
from sds3d.toybox.judge import load_judge, majority

pytestmark = pytest.mark.slow


def sds3d(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sds3d", *words], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "tree"
    done = sds3d("generate", "a green tree", "--config", "fast", "--out", str(folder), "--formats", "glb,obj")
    assert done.returncode == 0, done.stderr
    return folder


def test_the_judge_recognises_the_exported_asset(run_folder: Path) -> None:
    mesh, metadata = load_glb(run_folder / "asset.glb")
    views = render_textured(mesh, turntable_cameras(8, 64), torch.ones(8, 3))[0]
    assert majority(load_judge()(views)) == ("tree", "green")
    assert metadata["prompt"] == "a green tree"


def test_the_run_folder_is_complete(run_folder: Path) -> None:
    manifest = json.loads((run_folder / "manifest.json").read_text())
    assert manifest["status"] == "done"
    assert manifest["nonfinite_steps"] == 0
    assert manifest["mesh"]["watertight"] is True
    assert manifest["fidelity"]["psnr_db"] > 18.0
    for name in (
        "asset.glb",
        "asset.obj",
        "preview.png",
        "turntable.mp4",
        "contact_sheet.png",
        "config.yaml",
    ):
        assert (run_folder / name).stat().st_size > 0, name
    steps = [json.loads(line)["step"] for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == manifest["steps"]


def test_export_again_in_other_formats(run_folder: Path) -> None:
    done = sds3d("export", str(run_folder), "--format", "stl,ply")
    assert done.returncode == 0, done.stderr
    assert (run_folder / "asset.stl").stat().st_size > 0
    assert (run_folder / "asset.ply").stat().st_size > 0


def test_an_occupied_folder_is_refused_and_left_alone(run_folder: Path) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in run_folder.iterdir())
    done = sds3d("generate", "a blue car", "--out", str(run_folder))
    assert done.returncode == 2
    assert str(run_folder) in done.stderr
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in run_folder.iterdir())
