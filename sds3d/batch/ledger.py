"""What happened to every job, on disk: one line per event, so that a killed batch loses nothing that was said.

`ledger.jsonl` is only ever appended to, each line in one write and flushed; a line that a crash cut short is
ignored. One process at a time may write.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from sds3d.batch.order import Result
from sds3d.errors import InputError

State = Literal["waiting", "running", "done", "failed", "interrupted"]
LEDGER, MARK = "ledger.jsonl", "batch.json"


@dataclass
class Record:
    """What the ledger knows about one job."""

    state: State = "waiting"
    attempts: int = 0
    finished: int = 0  # how many attempts ran to completion; more than one would be work done twice
    seconds: float = 0.0
    result: Result | None = None


class Ledger:
    """The events of a batch folder; use it inside `sds3d.paths.locked(folder)`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER
        self.records: dict[str, Record] = {}
        self._file = -1
        try:
            whole = self._read()
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise InputError(f"{self.path}: cannot write: {error.strerror or error}") from error
        if not whole:
            self._write("\n")

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def of(self, job: str) -> Record:
        """The record of a job, new where there is none."""
        return self.records.setdefault(job, Record())

    def started(self, job: str, attempt: int) -> None:
        """Note that an attempt was handed out."""
        self._note({"event": "started", "job": job, "attempt": attempt})

    def ended(self, result: Result, state: State) -> None:
        """Note how an attempt ended, and in what state that leaves its job; flushed to disk."""
        self._note({"event": "ended", "job": result.job, "state": state, "result": asdict(result)})
        os.fsync(self._file)

    def _note(self, event: dict[str, Any]) -> None:
        event["at"] = datetime.now().astimezone().isoformat(timespec="seconds")
        self._write(json.dumps(event) + "\n")
        self._take(event)

    def _write(self, text: str) -> None:
        try:
            data = text.encode()
            if os.write(self._file, data) != len(data):
                raise OSError("the disk is full")
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot write: {error.strerror or error}. Free space, then run the same command again."
            ) from error

    def _read(self) -> bool:
        """Take in all whole lines; False where the last one was cut short."""
        if not self.path.exists():
            return True
        text = self.path.read_text(encoding="utf-8", errors="replace")
        for line in text.split("\n"):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # cut short by a crash, or an empty line
        return not text or text.endswith("\n")

    def _take(self, event: Mapping[str, Any]) -> None:
        record = self.of(str(event["job"]))
        if event["event"] == "started":
            record.attempts = max(record.attempts, int(event["attempt"]))
            record.state = "running"
            return
        raw = event["result"]
        record.result = Result(**{**raw, "warnings": tuple(raw["warnings"])})
        record.state = event["state"]
        record.seconds += record.result.seconds
        record.finished += record.result.status == "done"
