"""Numbers of a run: `metrics.jsonl` line by line, and the tally that the manifest reports."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sds3d.errors import InputError
from sds3d.events.bus import Event, StepDone, Warned

ALPHA_EMPTY = 0.003  # mean alpha below this: nothing is left to see
ALPHA_OPAQUE = 0.97  # mean alpha above this: the scene hides everything, background included


class MetricsLog:
    """Appends one JSON line per step; a resumed run first drops the lines of steps that are done again."""

    def __init__(self, path: Path, *, after_step: int = 0) -> None:
        self.path = path
        self._keep(after_step)

    def _keep(self, last_step: int) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step_of(line) <= last_step]
        self._write("".join(f"{line}\n" for line in kept), "w")

    def _write(self, text: str, mode: str) -> None:
        try:
            with open(self.path, mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(
                f"{self.path}: cannot write: {reason}. Free space, then resume the run."
            ) from error

    def __call__(self, event: Event) -> None:
        """Log one step."""
        if isinstance(event, StepDone):
            row = {"step": event.step, "seconds": event.seconds, "grad_norm": event.grad_norm}
            row |= {"nonfinite": event.nonfinite, **event.log}
            # NaN is not JSON: a value that is not finite is written as null.
            safe = {key: value if math.isfinite(value) else None for key, value in row.items()}
            self._write(json.dumps(safe) + "\n", "a")


def _step_of(line: str) -> float:
    """The step of a metrics line; a line cut short by a crash counts as later than any step."""
    try:
        row: Any = json.loads(line)
        return float(row["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class Tally:
    """What the manifest says about the way to the result: warnings, non-finite steps, collapse.

    `collapse` holds a message, given to `warn` once, while the mean alpha of the views has stayed below
    ALPHA_EMPTY or above ALPHA_OPAQUE for `window_steps` steps.
    """

    def __init__(self, warn: Callable[[str], None], *, window_steps: int = 50) -> None:
        self.warn, self.window_steps = warn, window_steps
        self.warnings: list[str] = []
        self.nonfinite = 0
        self.collapse: str | None = None
        self._out_since: int | None = None

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        if isinstance(event, Warned) and event.message not in self.warnings:
            self.warnings.append(event.message)
        if isinstance(event, StepDone):
            self.nonfinite = event.nonfinite
            if "alpha_mean" in event.log:
                self._watch(event.step, event.log["alpha_mean"])

    def _watch(self, step: int, alpha: float) -> None:
        if ALPHA_EMPTY <= alpha <= ALPHA_OPAQUE:
            self._out_since, self.collapse = None, None
            return
        if self._out_since is None:
            self._out_since = step
        if self.collapse is None and step - self._out_since >= self.window_steps:
            state = "empty" if alpha < ALPHA_EMPTY else "fully opaque"
            self.collapse = (
                f"the scene has been {state} since step {self._out_since} (mean alpha {alpha:.4f}); "
                "try another seed, a lower learning rate, or other penalties"
            )
            if self.collapse not in self.warnings:
                self.warn(self.collapse)
