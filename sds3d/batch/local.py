"""The local engine: worker processes on this machine, the processors and GPUs divided among them."""

import os
import queue
import signal
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch

from sds3d.batch.attempt import attempt
from sds3d.batch.engine import Progress, cpu_count, dead
from sds3d.batch.order import Order, Result
from sds3d.batch.storage import Storage
from sds3d.workers.process import WorkerProcess


class LocalEngine:
    """`workers` processes, each with its prior loaded once; one that dies is started again."""

    def __init__(self, storage: Storage, workers: int) -> None:
        self.storage, self.workers = storage, workers
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Result] = queue.SimpleQueue()
        self._progress: dict[str, Progress] = {}
        self._stop = threading.Event()
        self._processes = [WorkerProcess(env=share(index, workers)) for index in range(workers)]
        self._threads = [
            threading.Thread(target=self._serve, args=(process,), daemon=True) for process in self._processes
        ]
        for thread in self._threads:
            thread.start()

    @property
    def slots(self) -> int:
        """One order per process."""
        return self.workers

    def submit(self, order: Order) -> None:
        """Give an order to the next free process."""
        self._orders.put(order)

    def poll(self, timeout_s: float) -> list[Result]:
        """Results that have come in."""
        found: list[Result] = []
        with suppress(queue.Empty):
            found.append(self._results.get(timeout=timeout_s))
            while True:
                found.append(self._results.get_nowait())
        return found

    def progress(self, job: str) -> Progress:
        """Where a run stands."""
        return self._progress.get(job, Progress())

    def cancel(self, job: str) -> None:
        """Never needed: a process that dies says so itself."""

    def stop(self) -> None:
        """End all runs after their step."""
        self._stop.set()

    def close(self) -> None:
        """End the processes; what still runs is killed, and can be resumed from its last checkpoint."""
        self._stop.set()
        for process in self._processes:
            self._orders.put(None)
            pid = process.pid
            if pid is not None and self._progress:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        for thread in self._threads:
            thread.join(timeout=10.0)

    def _serve(self, process: WorkerProcess) -> None:
        while (order := self._orders.get()) is not None:
            if self._stop.is_set():
                result = Result(job=order.job.id, attempt=order.attempt, status="interrupted")
            else:
                try:
                    result = self._attempt(order, process)
                except Exception as error:  # noqa: BLE001 - a thread that dies silently would be waited for
                    result = dead(order, f"internal error: {type(error).__name__}: {error}")
            self._progress.pop(order.job.id, None)
            self._results.put(result)
        process.close(patience_s=5.0)

    def _attempt(self, order: Order, process: WorkerProcess) -> Result:
        job = order.job.id
        here = Progress(steps=order.job.steps, phase="starting")
        self._progress[job] = here

        def heard(event: Mapping[str, Any]) -> None:
            nonlocal here
            if event["event"] == "StepDone":
                here = Progress(step=event["step"], steps=event["steps"], phase=here.phase)
            elif event["event"] == "PhaseStarted":
                here = Progress(step=here.step, steps=here.steps, phase=event["name"])
            self._progress[job] = here

        return attempt(order, process.run, heard, self._stop, self.storage)


def share(index: int, workers: int) -> dict[str, str]:
    """The environment of one of several workers: its part of the processors, and a GPU in turn."""
    threads = str(max(1, cpu_count() // workers))
    env = {"SDS3D_THREADS": os.environ.get("SDS3D_THREADS") or threads}
    env["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or env["SDS3D_THREADS"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    devices = [name for name in visible.split(",") if name] if visible else [str(i) for i in range(count)]
    if count and devices:
        env["CUDA_VISIBLE_DEVICES"] = devices[index % len(devices)]
    return env
