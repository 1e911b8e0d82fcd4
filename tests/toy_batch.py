"""A stand-in for runs in batches: a drunkard's walk with the files of a real run, so that engines can be tested fast.

Every step depends on all before it; a run that goes on from a checkpoint ends in the same bytes as one that was
never disturbed, and one that starts over or skips steps does not count its steps right.
"""

import hashlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import yaml

from sds3d.batch.drive import Board, Terms, drive
from sds3d.batch.engine import Engine
from sds3d.batch.ledger import Ledger
from sds3d.batch.order import Job
from sds3d.errors import InputError
from sds3d.paths import locked, write_atomic
from sds3d.workers.process import OnEvent
from sds3d.workers.task import Outcome, Task

STEP_S = 0.03
CHECKPOINT_EVERY = 5
FAILS = "fails"


def toy_job(index: int, prompt: str = "a toy", steps: int = 20) -> Job:
    """A job that `toy_run` understands."""
    name = f"toy-{index:02d}"
    settings = {"prompt": prompt, "seed": index, "steps": steps}
    return Job(id=name, group=name, prompt=prompt, seed=index, config="toy", settings=settings, steps=steps)


def toy_run(task: Task, on_event: OnEvent, stop: threading.Event) -> Outcome:
    """A runner: walks, writes a checkpoint every few steps, and the asset at the end."""
    folder = Path(task.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            return _walk(task, folder, on_event, stop)
    except InputError as error:
        return Outcome(status="failed", folder=task.folder, error=str(error), exit_code=2)


def _walk(task: Task, folder: Path, on_event: OnEvent, stop: threading.Event) -> Outcome:
    if task.kind == "generate":
        write_atomic(folder / "config.yaml", Path(task.config).read_bytes())
        write_atomic(folder / "manifest.json", b"{}")
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    if settings["prompt"] == FAILS:
        return Outcome(status="failed", folder=task.folder, error="always so", exit_code=1)
    state = folder / "state.json"
    step, mark = json.loads(state.read_text()) if state.exists() else (0, str(settings["seed"]))
    _count(folder / "started.txt", step)
    while step < settings["steps"]:
        if stop.is_set():
            return Outcome(status="interrupted", folder=task.folder, steps_done=step)
        step, mark = step + 1, hashlib.sha256(f"{mark} {step}".encode()).hexdigest()
        time.sleep(STEP_S)
        on_event({"event": "StepDone", "step": step, "steps": settings["steps"]})
        if step % CHECKPOINT_EVERY == 0:
            write_atomic(state, json.dumps([step, mark]).encode(), durable=False)
            on_event({"event": "CheckpointSaved", "step": step})
    write_atomic(folder / "asset.glb", mark.encode())
    _count(folder / "completed.txt", step)
    files = {"glb": str(folder / "asset.glb")}
    return Outcome(status="done", folder=task.folder, files=files, steps_done=step)


def _count(path: Path, step: int) -> None:
    with open(path, "a") as file:
        file.write(f"{step}\n")


def driven(
    jobs: list[Job], engine: Engine, out: Path, *, on_change: Any = lambda board: None, **terms: Any
) -> Board:
    """Drive jobs with an engine to the end, with the ledger in `out`."""
    ledger = Ledger(out)
    board = Board(jobs, ledger)
    try:
        drive(
            board,
            engine,
            Terms(storage=terms.pop("storage", str(out)), session="test", **terms),
            stopped=lambda: False,
            on_change=on_change,
        )
    finally:
        engine.close()
        ledger.close()
    return board


def assets(out: Path) -> dict[str, bytes]:
    """The assets of a batch folder by job."""
    return {path.parent.name: path.read_bytes() for path in sorted(out.glob("jobs/*/asset.glb"))}
