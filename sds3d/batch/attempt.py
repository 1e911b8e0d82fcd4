"""One attempt at one job, the same on every engine: take up what earlier attempts left, run, score, keep the result."""

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import Context, copy_context
from functools import lru_cache
from pathlib import Path
from typing import Any

from sds3d.batch.order import Job, Order, Result
from sds3d.batch.storage import PLANS, STOP, Storage, beat, open_storage
from sds3d.config.dump import dump_plain
from sds3d.errors import InputError, Sds3dError, explained
from sds3d.paths import LOCK_NAME, locked, write_atomic
from sds3d.workers.process import OnEvent
from sds3d.workers.task import Outcome, Task

Runner = Callable[[Task, OnEvent, threading.Event], Outcome]
BUSY = "is working on this run"  # what a run says whose folder another process holds
BUSY_PATIENCE_S = 120.0  # a worker whose parent was killed needs this long at most to leave
BEAT_S = 2.0


def attempt(order: Order, run: Runner, on_event: OnEvent, stop: threading.Event, storage: Storage) -> Result:
    """Do a job, or go on with it, and never raise."""
    began = time.monotonic()
    job = order.job

    def heard(event: Mapping[str, Any]) -> None:
        on_event(event)
        if event.get("event") == "CheckpointSaved":
            storage.save(job.id, order.attempt)

    score = None
    try:
        folder = storage.begin(job.id, order.attempt)
        outcome = _performed(job, folder, run, heard, stop)
        if outcome.status == "done" and job.scorer:
            from sds3d.batch.score import score_of  # heavy, as are all imports inside functions here

            score = score_of(job.scorer, folder, job.prompt)
        if outcome.status != "died":
            storage.save(job.id, order.attempt)
    except Exception as error:  # noqa: BLE001 - one job must not take the others with it
        message, code = explained(error) or (f"internal error: {type(error).__name__}: {error}", 1)
        outcome = Outcome(status="failed", folder=job.id, error=message, exit_code=code)
    return Result(
        job=job.id,
        attempt=order.attempt,
        status=outcome.status,
        error=outcome.error,
        exit_code=outcome.exit_code,
        seconds=round(time.monotonic() - began, 3),
        steps_done=outcome.steps_done,
        files={name: _inside(path, outcome.folder) for name, path in outcome.files.items()},
        warnings=outcome.warnings,
        score=score,
        worker=f"{socket.gethostname()}:{os.getpid()}",
    )


def _performed(job: Job, folder: Path, run: Runner, on_event: OnEvent, stop: threading.Event) -> Outcome:
    plan = folder.parent.parent / PLANS / f"{job.id}.yaml"
    plan.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(plan, dump_plain(job.settings).encode(), durable=False)
    give_up = time.monotonic() + BUSY_PATIENCE_S
    while True:
        try:
            outcome = run(_task(job, folder, plan), on_event, stop)
        except InputError as error:
            outcome = Outcome(status="failed", folder=str(folder), error=str(error), exit_code=2)
        busy = outcome.status == "failed" and BUSY in (outcome.error or "")
        if not busy or time.monotonic() > give_up or stop.wait(1.0):
            return outcome


def _task(job: Job, folder: Path, plan: Path) -> Task:
    """Go on where there is something to go on with, else begin."""
    if _begun(folder):
        return Task(kind="resume", folder=str(folder))
    if folder.is_dir() and not folder.is_symlink():
        with locked(folder):  # ours by its name, and killed before it could be resumed
            for path in folder.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != LOCK_NAME:
                    path.unlink()
    return Task(kind="generate", folder=str(folder), config=str(plan), config_name=job.config)


def _begun(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return "stages" in manifest or (folder / "config.yaml").is_file()


def _inside(path: str, folder: str) -> str:
    with suppress(ValueError):
        return Path(path).relative_to(folder).as_posix()
    return Path(path).name


def here(task: Task, on_event: OnEvent, stop: threading.Event) -> Outcome:
    """A runner in this process, whose prior stays loaded for the next task."""
    from sds3d.run import Stop
    from sds3d.workers.child import answer

    asked, over = Stop(), threading.Event()

    def watch() -> None:
        while not over.is_set():
            if stop.wait(0.2):
                asked.ask()
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        return _shelf()[0].run(answer, task, on_event, asked)
    finally:
        over.set()


@lru_cache(maxsize=1)
def _shelf() -> tuple[Context, AbstractContextManager[None]]:
    """A context of this process in which priors are kept, as long as the block that keeps them is."""
    from sds3d.priors.shelf import keeping_priors

    context, block = copy_context(), keeping_priors()
    context.run(block.__enter__)
    return context, block


def serve_order(text: str, run: Runner = here) -> str:
    """An order in, a result out, as JSON lines: what a worker on another machine does; it beats while it works."""
    order = Order.from_json(text)
    os.environ["SDS3D_THREADS"] = str(order.threads)
    stop = threading.Event()
    try:
        storage = open_storage(order.storage)
    except Sds3dError as error:
        return Result(
            job=order.job.id, attempt=order.attempt, status="failed", error=str(error), exit_code=2
        ).to_json()
    with _beating(order, storage, stop) as on_event:
        return attempt(order, run, on_event, stop, storage).to_json()


@contextmanager
def _beating(order: Order, storage: Storage, stop: threading.Event) -> Iterator[OnEvent]:
    """A thread that tells the driver where the run stands, and hears whether it should stop."""
    facts: dict[str, Any] = {"attempt": order.attempt, "worker": f"{socket.gethostname()}:{os.getpid()}"}
    facts |= {"beat": 0, "step": 0, "steps": order.job.steps, "phase": ""}
    over = threading.Event()

    def go() -> None:
        while True:
            facts["beat"] += 1
            with suppress(OSError, InputError):  # a store that stumbles once is no reason to die
                beat(storage, order.job.id, facts)
                if storage.read(STOP) == order.session.encode():
                    stop.set()
            if over.wait(BEAT_S):
                return

    def heard(event: Mapping[str, Any]) -> None:
        if event.get("event") == "StepDone":
            facts.update(step=event["step"], steps=event["steps"])
        elif event.get("event") == "PhaseStarted":
            facts["phase"] = event["name"]

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    try:
        yield heard
    finally:
        over.set()
        thread.join(timeout=10.0)
