"""Real runs on a simulated Ray cluster of four machines, against the same runs one after another.

    python -m pytest tests/slow/test_batch_cluster.py -s

24 short jobs, one worker killed, one machine removed, one job that always fails: 23 assets, one reported failure,
no job run twice to completion, and the assets are those of a serial run, byte for byte.
"""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from toy_batch import assets, driven

from sds3d.batch.attempt import attempt, here
from sds3d.batch.drive import Board
from sds3d.batch.engine import cpu_count
from sds3d.batch.entries import read_batch
from sds3d.batch.files import root_folders
from sds3d.batch.order import Job, Order
from sds3d.batch.plan import Rules, make_jobs
from sds3d.batch.ray_engine import RayEngine, import_ray
from sds3d.batch.report import write_report
from sds3d.batch.storage import SharedFolder

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'sds3d[cluster]'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
KINDS = ("mug", "duck", "chair", "car", "house", "tree")
COLORS = ("red", "blue", "green", "yellow")
LONG = (2, 6, 7, 9)  # jobs with enough steps to be hit in the middle
SETTINGS = """config: fast
settings:
  steps: 12
  checkpoint.every_steps: 4
  preview: {turntable_frames: 0, turntable_px: 64, size_px: 64, every_s: 1.0e+6}
  export: {texture_px: 128, formats: [glb]}
jobs:
"""


def planned(folder: Path) -> list[Job]:
    """23 prompts and one job whose prior cannot be loaded."""
    (folder / "broken").mkdir()
    (folder / "broken" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    lines = []
    for index in range(24):
        steps = ", steps: 80" if index in LONG else ""
        prior = ", prior.name: broken" if index == 5 else ""
        prompt = f"a {COLORS[index % 4]} {KINDS[index // 4]}"
        lines.append(f"  - {{prompt: {prompt}{steps}{prior}}}\n")
    path = folder / "jobs.yaml"
    path.write_text(SETTINGS + "".join(lines))
    return make_jobs(read_batch(path), Rules(scorer="none"), folder, root_folders(path, folder, []))


class Trouble:
    """Kills a worker in the middle of its run, then takes away a machine together with the run on it."""

    def __init__(self, cluster: Any, spare: list[Any]) -> None:
        self.cluster, self.spare, self.killed, self.removed = cluster, spare, "", ""

    def __call__(self, board: Board) -> None:
        for job, flight in board.flights.items():
            if self.removed or flight.progress.step < 5 or job == self.killed:
                continue
            pid = int(flight.progress.worker.rpartition(":")[2])
            if not self.killed:
                os.kill(pid, signal.SIGKILL)
                self.killed = job
            elif any(result.status == "died" for result in board.ended):
                parent = psutil.Process(pid).ppid()
                for node in self.spare:
                    if parent == node.all_processes["raylet"][0].process.pid:
                        self.cluster.remove_node(node)
                        self.removed = job


def test_real_runs_on_a_troubled_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = str(Path(__file__).resolve().parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("SDS3D_THREADS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out"
    out.mkdir()
    jobs = planned(tmp_path)
    import_ray()
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    spare = [cluster.add_node(num_cpus=1) for _ in range(3)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        trouble, began = Trouble(cluster, spare), time.monotonic()
        board = driven(jobs, RayEngine(SharedFolder(out), "test"), out, on_change=trouble, retries=2)
        cluster_s = time.monotonic() - began
        summary = write_report(out, board, SharedFolder(out), engine="ray", wall_s=cluster_s)
    finally:
        ray.shutdown()
        cluster.shutdown()

    assert trouble.killed
    assert trouble.removed
    assert (summary["done"], summary["failed"]) == (23, 1)
    assert [row["prompt"] for row in summary["rows"] if row["error"]] == [jobs[5].prompt]
    finished = {job.id: board.ledger.of(job.id).finished for job in jobs}
    assert [count for name, count in finished.items() if name != jobs[5].id] == [1] * 23
    for job in jobs:
        if job.id != jobs[5].id:
            manifest = json.loads((out / "jobs" / job.id / "manifest.json").read_text())
            assert (manifest["status"], manifest["steps_done"]) == ("done", job.steps)

    serial, began = SharedFolder(tmp_path / "serial"), time.monotonic()
    for job in jobs:
        order = Order(job=job, attempt=1, storage=serial.url)
        attempt(order, here, lambda event: None, threading.Event(), serial)
    serial_s = time.monotonic() - began
    made = assets(out)
    assert len(made) == 23
    assert made == assets(serial.root)
    done = [result for result in board.ended if result.status == "done"]
    died = [result for result in board.ended if result.status == "died"]
    print(  # noqa: T201 - the figures of docs/reliability.md
        f"\n{len(made)} assets equal to a serial run; {len(died)} attempts lost; prior loads: "
        f"{len({result.worker for result in done})} worker processes for {len(done)} runs; "
        f"cluster {cluster_s:.0f} s, serial {serial_s:.0f} s, {cpu_count()} cores"
    )
