"""What the page and the API can do: submit, watch, stop, resume, export, delete. Knows nothing of web pages.

Every run id that comes in is looked up below the root; every recipe is checked before it gets a place in the queue.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sds3d.asset import AssetConfig
from sds3d.config.load import resolve
from sds3d.errors import ConfigError, InputError, Sds3dError
from sds3d.paths import claim_run_folder, write_atomic
from sds3d.ui.jobs import Job, JobQueue
from sds3d.ui.recipe import Recipe
from sds3d.ui.roots import Root
from sds3d.ui.store import RunRecord, RunStore
from sds3d.workers.task import Task, layers_of

WAITING_FILE = ".waiting.json"  # below the root: jobs that had no turn before the server ended
STOPPED = ("interrupted", "failed", "died")


@dataclass(frozen=True, kw_only=True)
class View:
    """A run as people see it: what is on disk, and what the queue knows of it."""

    run_id: str
    record: RunRecord | None  # None until its worker has written something
    job: Job | None
    ahead: int = 0  # jobs that are served before it

    @property
    def status(self) -> str:
        """The word for it: waiting, running, done, interrupted, failed, died, cancelled or unfinished.

        Unfinished: its folder says that it is running, but it is no job of this server.
        """
        if self.job is not None and (self.job.active or self.record is None):
            return self.job.status
        if self.record is None:
            return "cancelled"
        if self.record.status == "running":
            return "interrupted" if self.job is not None else "unfinished"
        return self.record.status

    @property
    def prompt(self) -> str:
        """What it is to become."""
        return (
            self.record.prompt if self.record is not None else self.job.prompt if self.job is not None else ""
        )

    @property
    def active(self) -> bool:
        """Whether it waits or is being made here; a new export of what is finished does not count."""
        return self.job is not None and self.job.active and self.job.task.kind != "export"

    @property
    def exporting(self) -> bool:
        """Whether its files are about to be written again."""
        return self.job is not None and self.job.active and self.job.task.kind == "export"

    @property
    def can_stop(self) -> bool:
        """Whether there is something to stop; an export that has begun runs through."""
        job = self.job
        if job is None or not job.active or job.stop.is_set():
            return False
        return job.status == "waiting" or job.task.kind != "export"

    @property
    def can_resume(self) -> bool:
        """Whether it ended early and can go on."""
        return self.record is not None and self.status in (*STOPPED, "unfinished")

    @property
    def stamp(self) -> str:
        """Changes whenever the results of the run may have changed."""
        ended = self.job.ended if self.job is not None else None
        return f"{self.run_id}|{self.status}|{ended or 0:.3f}"


class Desk:
    """One root, one queue."""

    def __init__(self, root: Root, queue: JobQueue) -> None:
        self.root, self.queue, self.store = root, queue, RunStore(root)
        self._take_up()

    def submit(self, recipe: Recipe) -> str:
        """Queue a new run; returns its id. Raises Sds3dError with what is wrong."""
        prompt = str(recipe.settings.get("prompt", ""))
        recipe.jobs(self.root)  # wrong settings leave nothing behind
        folder = claim_run_folder(recipe.config, prompt, self.root.path)
        try:
            run_id = self.root.id_of(folder)
            self.queue.submit(run_id, recipe.task(self.root, folder), prompt=prompt)
        except Sds3dError:
            self._withdraw(folder)
            raise
        self._note_waiting()
        return run_id

    def resume(self, run_id: str) -> str:
        """Queue the rest of a run that ended early."""
        view = self.view(run_id)
        if view.record is None or not view.can_resume:
            raise InputError(f"this run is {view.status}; there is nothing to resume")
        task = Task(kind="resume", folder=str(view.record.folder))
        self.queue.submit(run_id, task, prompt=view.prompt)
        self._note_waiting()
        return run_id

    def export(
        self, run_id: str, formats: Sequence[str] = (), settings: Mapping[str, Any] | None = None
    ) -> str:
        """Queue an export of a run's last checkpoint with other formats or `export.` settings."""
        record = self.store.record(run_id)
        settings = dict(settings or {})
        allowed = {"export.max_faces", "export.texture_px", "export.cells_per_side"}
        refused = sorted(set(settings) - allowed)
        if refused:
            raise ConfigError(f"{refused[0]}: expected one of {', '.join(sorted(allowed))}")
        own = {key.removeprefix("export."): value for key, value in settings.items()}
        if formats:
            own["formats"] = list(formats)
        resolve(AssetConfig, layers_of(own, "export")) if own else None
        task = Task(kind="export", folder=str(record.folder), settings=settings, formats=tuple(formats))
        self.queue.submit(run_id, task, prompt=record.prompt)
        return run_id

    def stop(self, run_id: str) -> bool:
        """End a run after its current step with what it has, or take it out of the queue; False if it is over."""
        job = self.queue.find(run_id)
        waited = job is not None and job.status == "waiting"
        stopped = self.queue.stop(run_id)
        if stopped and waited:
            self._note_waiting()
            if job is not None and job.task.kind == "generate":
                self._withdraw(self.root.run(run_id))
        return stopped

    def delete(self, run_id: str) -> None:
        """Remove a run from disk; refuses one that waits or runs."""
        job = self.queue.find(run_id)
        if job is not None and job.active:
            raise InputError(f"this run is {job.status}; stop it first")
        self.store.delete(run_id)

    def view(self, run_id: str) -> View:
        """A run; raises InputError where neither disk nor queue know it."""
        job = self.queue.find(run_id)
        try:
            record = self.store.record(run_id)
        except InputError:
            if job is None:
                raise
            record = None
        return View(run_id=run_id, record=record, job=job, ahead=self.ahead(run_id))

    def ahead(self, run_id: str) -> int:
        """Jobs that are served before this one, running ones included; 0 for one that does not wait."""
        job = self.queue.find(run_id)
        if job is None or job.status != "waiting":
            return 0
        return self.queue.position(run_id) + sum(other.status == "running" for other in self.queue.active())

    def status(self, run_id: str) -> dict[str, Any]:
        """A run in plain JSON values, for programs."""
        view = self.view(run_id)
        job, record = view.job, view.record
        live = job is not None and job.status == "running"
        return {
            "run": run_id,
            "status": view.status,
            "prompt": view.prompt,
            "ahead": view.ahead,
            "phase": job.phase if job is not None and live else "",
            "step": job.step if job is not None and live else record.steps_done if record is not None else 0,
            "steps": job.steps if job is not None and live else record.steps if record is not None else 0,
            "seconds_left": job.left_s if job is not None and live else None,
            "error": (job.error if job is not None else None)
            or (record.error if record is not None else None),
            "warnings": list(record.warnings) if record is not None else [],
        }

    def result(self, run_id: str) -> dict[str, Any]:
        """Files and figures of a run: what `manifest.json` says, with files by name."""
        record = self.store.record(run_id)
        return {
            "run": run_id,
            "status": self.view(run_id).status,
            "files": {
                name: path.relative_to(record.folder).as_posix() for name, path in record.files.items()
            },
            "mesh": dict(record.mesh),
            "fidelity": dict(record.fidelity),
            "prompt": record.prompt,
            "seed": record.seed,
        }

    def close(self) -> None:
        """End the server's work: running jobs save their state, waiting ones are written down for the next start."""
        self._note_waiting()
        self.queue.close()

    def _withdraw(self, folder: Path) -> None:
        """Give back a folder that was claimed; only where it is still empty."""
        with suppress(OSError):
            folder.rmdir()

    def _note_waiting(self) -> None:
        """Write the waiting jobs down, so that a restart of the server does not lose them."""
        waiting = [job for job in self.queue.active() if job.status == "waiting"]
        rows = [
            {"run": job.run_id, "prompt": job.prompt, "task": json.loads(job.task.to_json())}
            for job in waiting
        ]
        path = self.root.path / WAITING_FILE
        with suppress(InputError):  # a full disk must not end the server
            if rows:
                write_atomic(path, json.dumps(rows, indent=1).encode("utf-8"), durable=False)
            elif path.exists():
                os.unlink(path)

    def _take_up(self) -> None:
        """Queue what waited when the server ended last."""
        path = self.root.path / WAITING_FILE
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        for row in rows if isinstance(rows, list) else []:
            with suppress(Sds3dError, KeyError, TypeError):
                task = Task.from_json(json.dumps(row["task"]))
                if self.root.run(str(row["run"])) == Path(task.folder):
                    self.queue.submit(str(row["run"]), task, prompt=str(row.get("prompt", "")))
