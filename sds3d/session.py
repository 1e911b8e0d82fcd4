"""One run in progress: its job, its folder, who listens, and the manifest that mirrors it on disk."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sds3d.config.dump import dump
from sds3d.events.bus import Emit, Event, Warned, to_all
from sds3d.events.log import Tally
from sds3d.job import JobConfig
from sds3d.parallel import Team
from sds3d.paths import write_atomic


class Stop:
    """A request to end a run after the current step; `signal` is what the exit code is made of."""

    def __init__(self) -> None:
        self.asked = False
        self.signal: int | None = None

    def ask(self, signal: int | None = None) -> None:
        """Ask; may be called from a signal handler or another thread."""
        self.asked, self.signal = True, signal


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended."""

    status: str  # "done" or "interrupted"; a failed run raises
    folder: Path
    files: Mapping[str, Path]
    steps_done: int
    seconds: float
    warnings: tuple[str, ...] = ()
    signal: int | None = None


@dataclass
class Session:
    """The state of one run in progress; `manifest` mirrors manifest.json.

    Of several processes the leading one alone writes and is listened to.
    """

    job: JobConfig
    folder: Path
    stop: Stop
    manifest: dict[str, Any]
    listeners: list[Emit] = field(default_factory=list)
    team: Team = field(default_factory=Team)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.earlier_s = float(self.manifest.get("seconds", 0.0))
        self.faults: list[str] | None = None  # of the last examination; None = none yet
        self.tally = Tally(self.warn)
        self.tally.warnings += self.manifest.get("warnings", [])
        if not self.team.leads:
            self.listeners.clear()

    def emit(self, event: Event) -> None:
        to_all([self.tally, *self.listeners])(event)

    def warn(self, message: str) -> None:
        self.emit(Warned(message=message))

    def begin_again(self, job: JobConfig, **facts: Any) -> None:
        """Another job in the same folder, from its first step."""
        self.job, self.faults, warnings = job, None, self.tally.warnings
        self.tally = Tally(self.warn)
        self.tally.warnings += warnings
        if self.team.leads:
            write_atomic(self.folder / "config.yaml", dump(job).encode("utf-8"))
        self.note(seed=job.seed, config_hash=job.hash(), steps_done=0, **facts)

    def note(self, **facts: Any) -> None:
        """Update manifest.json."""
        self.manifest |= facts
        self.manifest["warnings"] = self.tally.warnings
        self.manifest["nonfinite_steps"] = self.tally.nonfinite
        self.manifest["collapse"] = self.tally.collapse
        self.manifest["seconds"] = round(self.seconds(), 3)
        if not self.team.leads:
            return
        text = json.dumps(self.manifest, indent=2, ensure_ascii=False, default=str)
        write_atomic(self.folder / "manifest.json", text.encode("utf-8", "backslashreplace"))

    def seconds(self) -> float:
        return self.earlier_s + time.monotonic() - self.started
