"""The Slurm engine with submitit's local executor: the same boxes, workers as processes of this machine."""

import os
import signal
from pathlib import Path

import pytest
from toy_batch import FAILS, driven, toy_job, toy_run

from sds3d.batch.drive import Board
from sds3d.batch.slurm import SlurmEngine, import_submitit
from sds3d.batch.storage import RemoteStorage, SharedFolder
from sds3d.errors import ConfigError

pytest.importorskip("submitit", reason="needs submitit: pip install 'sds3d[slurm]'")
pytestmark = pytest.mark.filterwarnings("ignore")


def test_workers_serve_many_orders_and_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = str(Path(__file__).resolve().parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
    jobs = [toy_job(i, FAILS if i == 3 else "a toy", steps=220 if i == 1 else 10) for i in range(8)]
    engine = SlurmEngine(SharedFolder(tmp_path), "test", workers=2, cluster="local", runner=toy_run)
    killed: list[int] = []

    def kill(board: Board) -> None:
        flight = board.flights.get("toy-01")
        if not killed and flight is not None and flight.progress.step >= 6:
            killed.append(int(flight.progress.worker.rpartition(":")[2]))
            os.kill(killed[0], signal.SIGKILL)

    board = driven(jobs, engine, tmp_path, on_change=kill, retries=1)
    assert board.counts() == {"waiting": 0, "running": 0, "done": 7, "failed": 1, "interrupted": 0}
    assert [r.status for r in board.ended if r.job == "toy-01"] == ["died", "done"]
    assert int((tmp_path / "jobs/toy-01/started.txt").read_text().split()[1]) >= 5
    workers = {result.worker for result in board.ended if result.status == "done"}
    assert len(workers) <= 3  # seven jobs, and the prior loaded once in each of these
    assert len(list((tmp_path / "mail" / "test").iterdir())) == 3
    for worker in engine._crew:
        worker.job.wait()


def test_object_stores_are_refused() -> None:
    import_submitit()
    with pytest.raises(ConfigError, match="all nodes see"):
        SlurmEngine(RemoteStorage("s3://a", None, "a"), "test", workers=1)
