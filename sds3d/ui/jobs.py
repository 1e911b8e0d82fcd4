"""The queue of the server: jobs wait in order, workers take them one after another. Knows nothing of web pages."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sds3d.errors import InputError
from sds3d.workers.task import Outcome, Task

LOG_LINES, CURVE_POINTS, KEPT_JOBS = 200, 400, 500
ACTIVE = ("waiting", "running")


class Worker(Protocol):
    """What performs tasks; `workers.process.WorkerProcess` in earnest."""

    def run(
        self, task: Task, on_event: Callable[[Mapping[str, Any]], None], stop: threading.Event | None = None
    ) -> Outcome: ...

    def close(self) -> None: ...


@dataclass
class Job:
    """One task and how far it is. `status`: waiting, running, done, interrupted, failed, died or cancelled."""

    run_id: str
    task: Task
    prompt: str = ""
    status: str = "waiting"
    phase: str = ""
    step: int = 0
    steps: int = 0
    pace_s: float = 0.0  # seconds per step, smoothed
    error: str | None = None
    submitted: float = field(default_factory=time.time)
    started: float | None = None
    ended: float | None = None
    pictures: int = 0  # previews so far
    log: deque[str] = field(default_factory=lambda: deque(maxlen=LOG_LINES))
    curve: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=CURVE_POINTS))
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def active(self) -> bool:
        """Whether it waits or runs."""
        return self.status in ACTIVE

    @property
    def left_s(self) -> float | None:
        """Seconds until the last step, as far as can be told."""
        return self.pace_s * (self.steps - self.step) if self.pace_s and self.steps else None

    def hear(self, event: Mapping[str, Any]) -> None:
        """Take in one event of the worker."""
        kind = event.get("event")
        if kind == "StepDone":
            self._step(event)
        elif kind == "PhaseStarted":
            self.phase = str(event.get("name", ""))
            self.note(self.phase)
        elif kind == "Warned":
            self.note(f"warning: {event.get('message', '')}")
        elif kind == "CheckpointSaved":
            self.note(f"checkpoint at step {event.get('step')}")
        elif kind == "PreviewReady":
            self.pictures += 1
        elif kind == "Finished":
            self.note(f"{event.get('status')} after {float(event.get('seconds') or 0.0):.0f} s")

    def note(self, line: str) -> None:
        """Add a line to the log, with the time since the job began."""
        since = time.time() - (self.started or self.submitted)
        self.log.append(f"{int(since // 60):02d}:{int(since % 60):02d}  {line}")

    def _step(self, event: Mapping[str, Any]) -> None:
        if int(event["step"]) < self.step:
            self.curve.clear()  # the next stage begins
        self.step, self.steps = int(event["step"]), int(event["steps"])
        seconds = float(event.get("seconds") or 0.0)
        self.pace_s = seconds if not self.pace_s else 0.8 * self.pace_s + 0.2 * seconds
        norm = event.get("grad_norm")
        if isinstance(norm, (int, float)):
            self.curve.append((self.step, float(norm)))


class JobQueue:
    """Jobs in the order they came, for a fixed number of workers. All methods may be called from any thread."""

    def __init__(self, make_worker: Callable[[], Worker], *, workers: int = 1, max_waiting: int = 20) -> None:
        self.max_waiting, self._make_worker = max_waiting, make_worker
        self._lock = threading.Condition()
        self._jobs: dict[str, Job] = {}  # by run id: the last job of each run, in order of submission
        self._waiting: deque[Job] = deque()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"ui-worker-{index}", daemon=True)
            for index in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, run_id: str, task: Task, *, prompt: str = "") -> Job:
        """Put a task at the end; raises InputError where the queue is full or the run has a job already."""
        with self._lock:
            known = self._jobs.get(run_id)
            if self._closed:
                raise InputError("the server is shutting down; try again later")
            if known is not None and known.active:
                raise InputError(f"this run is {known.status} already")
            if len(self._waiting) >= self.max_waiting:
                raise InputError(f"the queue is full ({self.max_waiting} jobs wait); try again later")
            job = Job(run_id=run_id, task=task, prompt=prompt)
            self._jobs.pop(run_id, None)
            self._jobs[run_id] = job
            self._waiting.append(job)
            self._forget()
            self._lock.notify()
            return job

    def find(self, run_id: str) -> Job | None:
        """The last job of a run, if this server knows one."""
        with self._lock:
            return self._jobs.get(run_id)

    def position(self, run_id: str) -> int:
        """How many jobs are served before this one: 0 for the next one, and for one that does not wait."""
        with self._lock:
            return next((index for index, job in enumerate(self._waiting) if job.run_id == run_id), 0)

    def active(self) -> list[Job]:
        """Running jobs, then waiting ones in their order."""
        with self._lock:
            return [job for job in self._jobs.values() if job.status == "running"] + list(self._waiting)

    def jobs(self) -> Sequence[Job]:
        """All jobs that are remembered, the newest last."""
        with self._lock:
            return list(self._jobs.values())

    def stop(self, run_id: str) -> bool:
        """Ask a running job to end with what it has, or take a waiting one out; False if it is over."""
        with self._lock:
            job = self._jobs.get(run_id)
            if job is None or not job.active:
                return False
            if job in self._waiting:
                self._waiting.remove(job)
                job.status, job.ended = "cancelled", time.time()
            else:
                job.note("stopping after this step; the result is kept")
            job.stop.set()
            return True

    def close(self, *, patience_s: float = 30.0) -> None:
        """Take no more jobs and stop those that run; waits until they have saved their state."""
        with self._lock:
            self._closed = True
            for job in self._jobs.values():
                job.stop.set()
            self._lock.notify_all()
        deadline = time.monotonic() + patience_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _forget(self) -> None:
        """Let go of the oldest jobs that are over."""
        over = [run_id for run_id, job in self._jobs.items() if not job.active]
        for run_id in over[: max(0, len(self._jobs) - KEPT_JOBS)]:
            del self._jobs[run_id]

    def _work(self) -> None:
        worker = self._make_worker()
        try:
            while (job := self._next()) is not None:
                self._perform(worker, job)
        finally:
            worker.close()

    def _next(self) -> Job | None:
        with self._lock:
            while not self._waiting and not self._closed:
                self._lock.wait()
            if self._closed:
                return None
            job = self._waiting.popleft()
            job.status, job.phase, job.started = "running", "starting", time.time()
            return job

    def _perform(self, worker: Worker, job: Job) -> None:
        try:
            outcome = worker.run(job.task, job.hear, job.stop)
            status, error = outcome.status, outcome.error
        except Exception as fault:  # noqa: BLE001 - one job's fault must not end the queue
            status, error = "died", f"{type(fault).__name__}: {fault}"
        if error:
            job.note(f"error: {error}")
        with self._lock:
            job.error, job.ended, job.phase, job.status = error, time.time(), "", status
