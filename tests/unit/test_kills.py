"""A run that is killed again and again ends as if nothing had happened; fifty times in `tests/slow/test_kills.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sds3d.run import generate
from tests.kill_run import job_of

ROOT = Path(__file__).parents[2]


def kill_run(out: Path, kills: int, seed: int) -> Any:
    """What `tests.kill_run` says."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "SDS3D_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.kill_run", str(out), str(kills), str(seed)]
    told = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert told.returncode == 0, told.stderr[-2000:]
    return json.loads(told.stdout.splitlines()[-1])


def check_kills(folder: Path, kills: int, seed: int) -> Any:
    """Kill a run, and compare it with one that was left alone."""
    told = kill_run(folder / "killed", kills, seed)
    calm = generate(job_of(kills), folder / "calm")
    assert (calm.status, calm.steps_done) == ("done", told["steps"])
    assert told["ends"] == [-9] * kills  # every life was ended from outside, none by an error
    assert told["last"] == 0
    assert told["begins"] == sorted(told["begins"])  # nothing that was done is lost again
    assert told["begins"][-1] > told["steps"] / 4  # the kills are spread over the run
    states = [
        sorted((folder / name / "checkpoints").iterdir())[-1].read_bytes() for name in ("calm", "killed")
    ]
    assert states[0] == states[1]
    assets = [(folder / name / "asset.glb").read_bytes() for name in ("calm", "killed")]
    assert assets[0] == assets[1]
    manifest = json.loads((folder / "killed" / "manifest.json").read_text())
    assert (manifest["status"], manifest["steps_done"]) == ("done", told["steps"])
    rows = [
        json.loads(line)["step"] for line in (folder / "killed" / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows == sorted(set(rows))
    # A kill inside a write leaves its temporary file; nothing else may lie about.
    names = {path.name for path in (folder / "killed").iterdir() if not path.name.startswith(".")}
    assert names == {path.name for path in (folder / "calm").iterdir() if not path.name.startswith(".")}
    return told


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_is_killed_six_times_ends_the_same(tmp_path: Path) -> None:
    check_kills(tmp_path, 6, seed=1)
