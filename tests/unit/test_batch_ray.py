"""The Ray engine on a simulated cluster of three machines: deaths, a lost machine, a job that always fails."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from toy_batch import FAILS, assets, driven, toy_job, toy_run

from sds3d.batch.attempt import attempt
from sds3d.batch.drive import Board
from sds3d.batch.order import Order
from sds3d.batch.ray_engine import RayEngine, import_ray
from sds3d.batch.storage import SharedFolder

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'sds3d[cluster]'")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Three machines with one processor each; workers find the stand-in runner."""
    here = str(Path(__file__).resolve().parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
    import_ray()
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    found.spare = [found.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
    yield found
    ray.shutdown()
    found.shutdown()


class Trouble:
    """Kills a worker in the middle of its run, and later takes away a machine together with the run on it."""

    def __init__(self, cluster: Any) -> None:
        self.cluster, self.killed, self.removed = cluster, "", ""

    def __call__(self, board: Board) -> None:
        for job, flight in board.flights.items():
            if self.removed or flight.progress.step < 6 or job == self.killed:
                continue
            pid = int(flight.progress.worker.rpartition(":")[2])
            machine = self.machine_of(pid)
            if not self.killed:
                os.kill(pid, signal.SIGKILL)
                self.killed = job
            elif machine is not None and any(result.status == "died" for result in board.ended):
                self.cluster.remove_node(machine)
                self.removed = job

    def machine_of(self, pid: int) -> Any:
        """The machine that may go and runs this worker, if any."""
        parent = psutil.Process(pid).ppid()
        for node in self.cluster.spare:
            if parent == node.all_processes["raylet"][0].process.pid:
                return node
        return None


def test_nothing_is_lost_and_nothing_done_twice(cluster: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    long = (2, 6, 7, 8)  # enough to be hit in the middle
    prompts = {5: FAILS}
    jobs = [toy_job(i, prompts.get(i, "a toy"), steps=150 if i in long else 15) for i in range(24)]
    engine = RayEngine(SharedFolder(out), "test", runner=toy_run)
    trouble = Trouble(cluster)
    board = driven(jobs, engine, out, on_change=trouble, retries=2)

    assert trouble.killed
    assert trouble.removed not in ("", trouble.killed)
    records = {job.id: board.ledger.of(job.id) for job in jobs}
    assert [name for name, record in records.items() if record.state == "failed"] == ["toy-05"]
    assert sum(record.state == "done" for record in records.values()) == 23
    assert records["toy-05"].attempts == 3
    assert {trouble.killed, trouble.removed} <= {r.job for r in board.ended if r.status == "died"}
    assert {result.attempt for result in board.ended if result.job == trouble.removed} == {1, 2}
    for job in jobs:
        if job.id != "toy-05":
            assert (out / "jobs" / job.id / "completed.txt").read_text() == f"{job.steps}\n"
            assert records[job.id].finished == 1
    begun = [path.read_text().split() for path in out.glob("jobs/*/started.txt")]
    assert any(len(steps) > 1 and int(steps[-1]) > 0 for steps in begun), "no run went on from a checkpoint"
    assert assets(out) == serial(jobs, tmp_path / "serial")


def serial(jobs: list[Any], out: Path) -> dict[str, bytes]:
    """The same jobs one after another in this process."""
    storage = SharedFolder(out)
    for job in jobs:
        order = Order(job=job, attempt=1, storage=str(out))
        attempt(order, toy_run, lambda event: None, threading.Event(), storage)
    return assets(out)
