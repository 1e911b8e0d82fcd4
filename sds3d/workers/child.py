"""The worker itself: reads tasks from stdin, one JSON line each, and answers with events and an outcome.

    {"task": {...}}   do this        {"event": "StepDone", ...}     while it goes on
    {"stop": true}    end this one   {"outcome": {"status": ...}}   at its end

When stdin ends, the parent is gone: the task in hand is checkpointed and the worker leaves.
"""

import gc
import io
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sds3d.errors import Sds3dError, explained
from sds3d.events.bus import Event
from sds3d.priors.shelf import keeping_priors
from sds3d.run import RunResult, Stop
from sds3d.staged import export_any, generate_stages, load_stages, resume_any
from sds3d.workers.task import Outcome, Task, event_as_dict, layers_of

Say = Callable[[Mapping[str, Any]], None]


def perform(task: Task, on_event: Callable[[Event], None], stop: Stop) -> RunResult:
    """Do a task here and now. Raises Sds3dError with a message for the user."""
    folder = Path(task.folder)
    if task.kind == "generate":
        stages = load_stages(task.config, layers_of(task.settings))
        return generate_stages(
            stages, folder, config_name=task.config_name or task.config, listeners=[on_event], stop=stop
        )
    if task.kind == "resume":
        return resume_any(folder, listeners=[on_event], stop=stop)
    return export_any(folder, task.formats, listeners=[on_event], layers=layers_of(task.settings))


def answer(task: Task, say: Say, stop: Stop) -> Outcome:
    """Do a task, tell what happens, and never raise."""
    began = time.monotonic()
    try:
        result = perform(task, lambda event: say(event_as_dict(event)), stop)
    except Exception as error:  # noqa: BLE001 - a worker outlives what goes wrong in a task
        known = explained(error)
        if known is None:
            traceback.print_exc()  # into the worker's log: a defect, not a mistake of the user
        message, code = known or (f"internal error: {type(error).__name__}: {error}", 1)
        return Outcome(
            status="failed",
            folder=task.folder,
            error=message,
            exit_code=code,
            seconds=time.monotonic() - began,
        )
    return Outcome(
        status="interrupted" if result.status == "interrupted" else "done",
        folder=str(result.folder),
        files={name: str(path) for name, path in result.files.items()},
        seconds=time.monotonic() - began,
        steps_done=result.steps_done,
        warnings=result.warnings,
    )


class Inbox:
    """Tasks in the order they came, and the stop of the one in hand. Filled by a thread of its own."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self.stop = Stop()
        self._lines = lines
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def leave(self) -> None:
        """End the task in hand, and take no other."""
        self.stop.ask()
        self.tasks.put(None)

    def _read(self) -> None:
        for line in self._lines:
            try:
                message = json.loads(line)
                if message.get("stop"):
                    self.stop.ask()
                else:
                    self.tasks.put(Task.from_json(json.dumps(message["task"])))
            except (ValueError, KeyError, AttributeError, Sds3dError) as error:
                sys.stderr.write(f"worker: not understood: {line[:200]!r} ({error})\n")
        self.leave()


def serve(lines: Iterable[str], out: io.TextIOBase) -> None:
    """Answer tasks until `lines` end."""

    def say(message: Mapping[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    inbox = Inbox(lines)
    signal.signal(signal.SIGTERM, lambda number, frame: inbox.leave())
    with keeping_priors():
        say({"ready": os.getpid()})
        while (task := inbox.tasks.get()) is not None:
            # A stop that came between two tasks was meant for the one before.
            inbox.stop = Stop()
            outcome = answer(task, say, inbox.stop)
            say({"outcome": asdict(outcome)})
            gc.collect()


def main() -> int:
    """Entry of `python -m sds3d.workers.child`."""
    # What libraries print must not get between the lines of the protocol.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    os.dup2(2, 1)
    try:
        serve(sys.stdin, out)
    except BrokenPipeError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
