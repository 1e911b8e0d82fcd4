"""What an engine is: something that takes orders and gives results."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sds3d.batch.order import Order, Result
from sds3d.batch.storage import STOP, Storage, last_beat

STALL_S = 180.0  # a worker that has not beaten for so long is taken for dead


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands; `beat` changes as long as its worker lives, and is None where there is no heartbeat."""

    step: int = 0
    steps: int = 0
    phase: str = ""
    worker: str = ""
    beat: int | None = None


class Engine(Protocol):
    """Does orders, each to one result; `slots` is how many it should be given at a time (back-pressure)."""

    @property
    def slots(self) -> int:
        """Orders that may be out at once; may change while machines come and go."""

    def submit(self, order: Order) -> None:
        """Take an order; returns at once."""

    def poll(self, timeout_s: float) -> list[Result]:
        """Results that have come in, waiting up to `timeout_s` for one."""

    def progress(self, job: str) -> Progress:
        """Where the run of an order stands."""

    def cancel(self, job: str) -> None:
        """Give up on an order whose worker no longer answers; its result is "died"."""

    def stop(self) -> None:
        """Ask all runs to end after their step, with a checkpoint."""

    def close(self) -> None:
        """End all workers, whatever they do."""


def dead(order: Order, why: str) -> Result:
    """The result of an order whose worker went away."""
    return Result(job=order.job.id, attempt=order.attempt, status="died", error=why, exit_code=1)


def beaten(storage: Storage, order: Order) -> Progress:
    """Progress from the heartbeat of a worker that this process cannot see; nothing from earlier attempts."""
    facts: Mapping[str, Any] = last_beat(storage, order.job.id)
    if facts.get("attempt") != order.attempt:
        return Progress()
    known = {name: facts[name] for name in ("step", "steps", "phase", "worker", "beat") if name in facts}
    return Progress(**known)


class Heartbeats:
    """What workers told last about the jobs in hand, read from storage at most every `every_s` seconds per job."""

    def __init__(self, storage: Storage, every_s: float) -> None:
        self.storage, self.every_s = storage, every_s
        self._read: dict[str, tuple[float, Progress]] = {}

    def of(self, order: Order | None) -> Progress:
        """Where an order stands; nothing is known of no order."""
        if order is None:
            return Progress()
        now, (told, known) = time.monotonic(), self._read.get(order.job.id, (-self.every_s, Progress()))
        if now - told >= self.every_s:
            known = beaten(self.storage, order)
            self._read[order.job.id] = (now, known)
        return known

    def forget(self, order: Order) -> None:
        """The order is over."""
        self._read.pop(order.job.id, None)


def ask_stop(storage: Storage, session: str) -> None:
    """Workers that serve the batch process `session` hear it at their next heartbeat."""
    storage.write(STOP, session.encode())


def cpu_count() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def default_workers() -> int:
    """One per GPU, or one per two processors where there is none."""
    return torch.cuda.device_count() or max(1, cpu_count() // 2)
