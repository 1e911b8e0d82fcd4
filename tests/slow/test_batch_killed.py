"""`sds3d batch` killed with SIGKILL in the middle: the same command ends it, from the last checkpoints.

python -m pytest tests/slow/test_batch_killed.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_batch import assets

pytestmark = pytest.mark.slow
JOBS = """config: fast
settings:
  steps: 60
  checkpoint.every_steps: 5
  preview: {turntable_frames: 0, turntable_px: 64, size_px: 64, every_s: 1.0e+6}
  export: {texture_px: 128, formats: [glb]}
jobs: [a red mug, a yellow duck, a blue car]
"""


def test_the_same_command_goes_on_after_a_kill(tmp_path: Path) -> None:
    file = tmp_path / "jobs.yaml"
    file.write_text(JOBS)

    def words(out: str) -> list[str]:
        command = [sys.executable, "-m", "sds3d", "batch", str(file), "--out", str(tmp_path / out)]
        return [*command, "--workers", "2"]

    env = os.environ | {"SDS3D_THREADS": "1", "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(words("out"), env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    give_up = time.monotonic() + 300
    while not list(tmp_path.glob("out/jobs/*/checkpoints/*")) and time.monotonic() < give_up:
        assert first.poll() is None
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    # At once, while the orphaned workers are still leaving.
    again = subprocess.run(words("out"), env=env, capture_output=True, text=True, timeout=600, check=False)
    assert again.returncode == 0, again.stderr
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["done"], summary["failed"]) == (3, 0)
    assert max(row["attempts"] for row in summary["rows"]) == 2
    undisturbed = subprocess.run(words("whole"), env=env, capture_output=True, timeout=600, check=False)
    assert undisturbed.returncode == 0
    assert assets(tmp_path / "out") == assets(tmp_path / "whole")
    third = subprocess.run(words("out"), env=env, capture_output=True, text=True, timeout=600, check=False)
    assert "3 of them done before" in third.stderr
