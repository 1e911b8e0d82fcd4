"""The Ray engine: one task per attempt, wherever the cluster has room."""

import os
import time
from contextlib import suppress
from typing import Any

from sds3d.batch.attempt import Runner, here, serve_order
from sds3d.batch.engine import Heartbeats, Progress, ask_stop, beaten, dead
from sds3d.batch.order import Order, Result
from sds3d.batch.storage import Storage
from sds3d.errors import ConfigError

MISSING = "the Ray engine needs Ray, which is not installed here; pip install 'sds3d[cluster]'"
_PROGRESS_S = 1.0  # how often a heartbeat is read
_SIZE_S = 5.0  # how often the cluster is asked for its size


def import_ray() -> Any:
    """Ray, quiet and without usage statistics. Raises ConfigError where it is missing."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Of a cluster that is started here: at Ray's own 15, workers starve on a machine that does anything else.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        import ray
    except ImportError as error:
        raise ConfigError(MISSING) from error
    return ray


def _hush() -> None:
    """Ray prints every death of a worker to stdout, for which it has no setting; our ledger and table tell of them."""
    with suppress(ImportError):
        import ray._private.worker as inner

        if hasattr(inner, "print_to_stdstream"):
            inner.print_to_stdstream = lambda *args, **kwargs: None


class RayEngine:
    """Orders as Ray tasks. Retries are the driver's, not Ray's, so that every attempt is written down.

    Ray keeps the process of a finished task for the next one with the same needs; the prior stays loaded in it.
    """

    def __init__(
        self,
        storage: Storage,
        session: str,
        *,
        workers: int | None = None,
        cpus: float = 1.0,
        gpus: float = 0.0,
        address: str | None = None,
        runner: Runner = here,
    ) -> None:
        self.storage, self.session, self.limit = storage, session, workers
        self.cpus, self.gpus, self.runner = cpus, gpus, runner
        self._ray = import_ray()
        self._owner = not self._ray.is_initialized()
        if self._owner:
            self._connect(address)
        # max_calls=0: by default a process that used a GPU ends with its task, and the prior with it.
        self._task = self._ray.remote(max_retries=0, max_calls=0)(serve_order)
        self._out: dict[Any, Order] = {}
        self._given_up: set[Any] = set()
        self._beats = Heartbeats(self.storage, _PROGRESS_S)
        self._size = (-_SIZE_S, 0)

    def _connect(self, address: str | None) -> None:
        try:
            options = {"address": address} if address else {"include_dashboard": False}
            self._ray.init(log_to_driver=False, logging_level="ERROR", **options)
            _hush()
        except Exception as error:  # Ray has no common base for what can go wrong here
            raise ConfigError(f"--address: no Ray cluster at {address or 'this machine'}: {error}") from error

    @property
    def slots(self) -> int:
        """What the cluster has room for now, and one in ten more, so that no machine waits for the driver."""
        now = time.monotonic()
        if now - self._size[0] >= _SIZE_S:
            self._size = (now, self._room())
        return self._size[1] + max(1, self._size[1] // 10)

    def _room(self) -> int:
        try:
            total = self._ray.cluster_resources()
        except self._ray.exceptions.RayError:
            return self._size[1]
        room = int(total.get("CPU", 0.0) / self.cpus) if self.cpus else self.limit or 1
        if self.gpus:
            room = min(room, int(total.get("GPU", 0.0) / self.gpus))
        return min(room, self.limit) if self.limit else room

    def check_room(self) -> None:
        """Raises ConfigError where no machine of the cluster could ever take a job."""
        if self._room() < 1:
            raise ConfigError(
                f"--engine ray: the cluster has no room for a job of {self.cpus:g} CPUs and {self.gpus:g} GPUs; "
                "lower --cpus-per-job or --gpus-per-job, or add machines"
            )

    def submit(self, order: Order) -> None:
        """Give an order to the cluster."""
        task = self._task.options(num_cpus=self.cpus, num_gpus=self.gpus, scheduling_strategy="SPREAD")
        self._out[task.remote(order.to_json(), self.runner)] = order

    def poll(self, timeout_s: float) -> list[Result]:
        """Results that have come in."""
        if not self._out:
            time.sleep(timeout_s)
            return []
        refs = list(self._out)
        ready, _ = self._ray.wait(refs, num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
        return [self._result(ref) for ref in ready]

    def _result(self, ref: Any) -> Result:
        order = self._out.pop(ref)
        self._beats.forget(order)
        given_up = ref in self._given_up
        self._given_up.discard(ref)
        try:
            return Result.from_json(self._ray.get(ref))
        except self._ray.exceptions.RayError as error:
            why = str(error).strip().splitlines()
            reason = "it stopped answering" if given_up else (why[0] if why else type(error).__name__)
            return dead(order, f"the worker was lost: {reason[:300]}")

    def progress(self, job: str) -> Progress:
        """Where a run stands, as its worker told last."""
        return self._beats.of(next((order for order in self._out.values() if order.job.id == job), None))

    def cancel(self, job: str) -> None:
        """Kill the task of an order."""
        for ref, order in self._out.items():
            if order.job.id == job and ref not in self._given_up:
                self._given_up.add(ref)
                with suppress(self._ray.exceptions.RayError):
                    self._ray.cancel(ref, force=True)

    def stop(self) -> None:
        """Ask runs to end through the storage; tasks that wait for room are withdrawn."""
        ask_stop(self.storage, self.session)
        for ref, order in self._out.items():
            if beaten(self.storage, order).beat is None:
                with suppress(self._ray.exceptions.RayError):
                    self._ray.cancel(ref)

    def close(self) -> None:
        """Kill what is still out, and leave the cluster."""
        for ref in self._out:
            with suppress(self._ray.exceptions.RayError):
                self._ray.cancel(ref, force=True)
        if self._owner:
            self._ray.shutdown()
