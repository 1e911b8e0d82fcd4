"""The parent's side of a worker: starts the process, hands it tasks, and survives its death."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import IO, Any

from sds3d.workers.task import Outcome, Task

OnEvent = Callable[[Mapping[str, Any]], None]
_LAST_WORDS = 2000  # characters of a dead worker's log that go into the message
_POLL_S = 0.2


class WorkerProcess:
    """One process that performs tasks one after another; it is started on the first task and again after a death.

    Not for use by several threads at once.
    """

    def __init__(self, *, env: Mapping[str, str] | None = None) -> None:
        self.env = dict(env or {})
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process id while there is a process."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process now, so that the first task need not wait for it."""
        self._started()

    def run(self, task: Task, on_event: OnEvent, stop: threading.Event | None = None) -> Outcome:
        """Perform a task; blocks. `stop` asks the run to end after its current step, with a checkpoint and an asset.

        `on_event` is called in this thread with events as `event_as_dict` makes them.
        """
        began = time.monotonic()
        process = self._started()
        over = threading.Event()
        if stop is not None:
            threading.Thread(target=self._watch, args=(process, stop, over), daemon=True).start()
        try:
            self._tell(process, '{"task": ' + task.to_json() + "}")
            assert process.stdout is not None
            for line in process.stdout:
                message = json.loads(line)
                if "outcome" in message:
                    raw = message["outcome"]
                    return Outcome(**{**raw, "warnings": tuple(raw["warnings"])})
                if "event" in message:
                    on_event(message)
        finally:
            over.set()
        return self._obituary(process, task, time.monotonic() - began)

    def close(self, *, patience_s: float = 30.0) -> None:
        """End the process: a task in hand is checkpointed first, for at most `patience_s`."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(OSError):
                if process.stdin is not None:
                    process.stdin.close()
            try:
                process.wait(patience_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if self._log is not None:
            self._log.close()
            self._log = None

    def _started(self) -> "subprocess.Popen[str]":
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close(patience_s=0.0)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sds3d.workers.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | self.env,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C in a terminal is the parent's to hear
        )
        return self._process

    @staticmethod
    def _tell(process: "subprocess.Popen[str]", line: str) -> None:
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # a dead worker shows at its stdout
            process.stdin.write(line + "\n")
            process.stdin.flush()

    def _watch(self, process: "subprocess.Popen[str]", stop: threading.Event, over: threading.Event) -> None:
        while not over.is_set():
            if stop.wait(_POLL_S):
                if not over.is_set():
                    self._tell(process, '{"stop": true}')
                return

    def _obituary(self, process: "subprocess.Popen[str]", task: Task, seconds: float) -> Outcome:
        code = process.wait()
        words = ""
        if self._log is not None:
            self._log.seek(0, os.SEEK_END)
            self._log.seek(max(0, self._log.tell() - _LAST_WORDS))
            words = self._log.read().decode("utf-8", "replace").strip()
        how = f"was killed by signal {-code}" if code < 0 else f"left with status {code}"
        last = f"; its last words: {words.splitlines()[-1]}" if words else ""
        return Outcome(
            status="died",
            folder=task.folder,
            error=f"the worker process {how}{last}",
            exit_code=1,
            seconds=seconds,
        )
