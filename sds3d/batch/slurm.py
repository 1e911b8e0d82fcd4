"""The Slurm engine: submitit starts workers, which take their orders from boxes in the shared folder.

A worker is one Slurm job that serves many orders, so the queue is waited in once and the prior loaded once. The
driver alone gives out orders: no two workers can take the same one.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sds3d.batch.attempt import Runner, here, serve_order
from sds3d.batch.engine import Heartbeats, Progress, ask_stop, dead
from sds3d.batch.order import Order, Result
from sds3d.batch.storage import SharedFolder, Storage
from sds3d.errors import ConfigError
from sds3d.paths import write_atomic

MISSING = "the Slurm engine needs submitit, which is not installed here; pip install 'sds3d[slurm]'"
READY, ORDER, RESULT, CLOSE = "ready", "order.json", "result.json", "close"
LOOK_S = 0.3
IDLE_S = 900.0  # a worker that gets no order for so long leaves: its driver is gone
_PROGRESS_S = 2.0
_STATE_S = 2.0


def import_submitit() -> Any:
    """submitit; raises ConfigError where it is missing."""
    try:
        import submitit
    except ImportError as error:
        raise ConfigError(MISSING) from error
    return submitit


def serve_box(box: Path, run: Runner = here) -> int:
    """Do the orders that are put into a box, one after another; returns how many."""
    count, idle = 0, time.monotonic()
    write_atomic(box / READY, b"", durable=False)
    while time.monotonic() - idle < IDLE_S:
        order = box / ORDER
        if order.exists():
            text = order.read_text(encoding="utf-8")
            order.unlink()
            write_atomic(box / RESULT, serve_order(text, run).encode(), durable=False)
            count, idle = count + 1, time.monotonic()
        elif (box / CLOSE).exists():
            break
        time.sleep(LOOK_S)
    return count


@dataclass
class _Worker:
    box: Path
    job: Any  # of submitit
    order: Order | None = None
    looked: float = 0.0
    gone: bool = False

    def ready(self) -> bool:
        return not self.gone and (self.box / READY).exists()


class SlurmEngine:
    """`workers` Slurm jobs; one that ends early, by time limit or failure, is submitted again."""

    def __init__(
        self,
        storage: Storage,
        session: str,
        *,
        workers: int,
        cpus: int = 1,
        gpus: int = 0,
        options: Mapping[str, Any] | None = None,
        cluster: str | None = None,
        runner: Runner = here,
    ) -> None:
        if not isinstance(storage, SharedFolder):
            raise ConfigError(
                "--storage: the Slurm engine needs a folder that all nodes see, not an object store"
            )
        submitit = import_submitit()
        self.storage, self.session, self.workers, self.runner = storage, session, workers, runner
        self.mail = storage.root / "mail" / session
        self.mail.mkdir(parents=True, exist_ok=True)
        try:
            self.executor = submitit.AutoExecutor(folder=str(storage.root / "slurm"), cluster=cluster)
            known = {"name": "sds3d", "timeout_min": 24 * 60, "cpus_per_task": max(1, cpus)}
            known |= {"gpus_per_node": gpus} if gpus else {}
            self.executor.update_parameters(**known | dict(options or {}))
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            raise ConfigError(f"--engine slurm: {error}") from error
        self._count = 0
        self._beats = Heartbeats(self.storage, _PROGRESS_S)
        self._lost: list[Result] = []
        self._crew = [self._hired() for _ in range(workers)]

    def _hired(self) -> _Worker:
        box = self.mail / f"{self._count:05d}"
        self._count += 1
        box.mkdir()
        return _Worker(box, self.executor.submit(serve_box, box, self.runner))

    @property
    def slots(self) -> int:
        """As many as workers have left the queue and wait or work."""
        return sum(worker.order is not None or worker.ready() for worker in self._crew)

    def submit(self, order: Order) -> None:
        """Put an order into the box of a free worker."""
        for worker in self._crew:
            if worker.order is None and worker.ready():
                worker.order = order
                write_atomic(worker.box / ORDER, order.to_json().encode(), durable=False)
                return
        self._lost.append(dead(order, "no worker was free"))

    def poll(self, timeout_s: float) -> list[Result]:
        """Results that lie in the boxes, and the word that a worker is gone."""
        found, self._lost = self._lost, []
        give_up = time.monotonic() + timeout_s
        while True:
            for index, worker in enumerate(self._crew):
                result = self._looked(worker)
                if result is not None:
                    found.append(result)
                if worker.order is None and self._gone(worker):
                    self._crew[index] = self._hired()
            if found or time.monotonic() >= give_up:
                return found
            time.sleep(0.05)

    def _looked(self, worker: _Worker) -> Result | None:
        path, order = worker.box / RESULT, worker.order
        if order is None:
            return None
        gone = not path.exists() and self._gone(worker)
        if not path.exists() and not gone:
            return None
        worker.order = None
        self._beats.forget(order)
        if not path.exists():
            return dead(order, f"the Slurm job {worker.job.job_id} ended ({worker.job.state})")
        result = Result.from_json(path.read_text(encoding="utf-8"))
        path.unlink()
        return result

    def _gone(self, worker: _Worker) -> bool:
        now = time.monotonic()
        if not worker.gone and now - worker.looked >= _STATE_S:
            worker.looked, worker.gone = now, bool(worker.job.done())
        return worker.gone

    def progress(self, job: str) -> Progress:
        """Where a run stands, as its worker told last."""
        return self._beats.of(
            next((w.order for w in self._crew if w.order is not None and w.order.job.id == job), None)
        )

    def cancel(self, job: str) -> None:
        """End the Slurm job that has an order."""
        for index, worker in enumerate(self._crew):
            if worker.order is not None and worker.order.job.id == job:
                worker.job.cancel()
                self._lost.append(dead(worker.order, "the worker stopped answering"))
                self._crew[index] = self._hired()

    def stop(self) -> None:
        """Ask runs to end, and workers to leave after that."""
        ask_stop(self.storage, self.session)
        self._dismiss()

    def close(self) -> None:
        """Let idle workers leave; end the Slurm jobs that still work."""
        self._dismiss()
        for worker in self._crew:
            if worker.order is not None or not worker.ready():
                worker.job.cancel()

    def _dismiss(self) -> None:
        for worker in self._crew:
            write_atomic(worker.box / CLOSE, b"", durable=False)
