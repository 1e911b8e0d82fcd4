"""Progress for people: a live line on a terminal, plain lines elsewhere. Writes to stderr only."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sds3d.events.bus import CheckpointSaved, Event, Finished, PhaseStarted, StepDone, Warned


class ProgressLine:
    """Shows step, time left, seconds per step and gradient norm."""

    def __init__(
        self,
        console: Console | None = None,
        *,
        plain_every_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or Console(stderr=True)
        self.plain_every_s, self.clock = plain_every_s, clock
        self._bar: Progress | None = None
        self._pace = 0.0  # seconds per step, smoothed
        self._next_line = -float("inf")

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, StepDone):
            self._pace = event.seconds if not self._pace else 0.9 * self._pace + 0.1 * event.seconds
            self._step(event)
        elif isinstance(event, PhaseStarted):
            self.close()
            self.console.print(f"{event.name} ...", style="dim", highlight=False)
        elif isinstance(event, Warned):
            self.console.print(
                f"warning: {escape(event.message)}", style="yellow", highlight=False, soft_wrap=True
            )
        elif isinstance(event, CheckpointSaved) and not self.console.is_terminal:
            self.console.print(f"checkpoint at step {event.step}", highlight=False)
        elif isinstance(event, Finished):
            self.close()

    def _step(self, event: StepDone) -> None:
        note = f"{self._pace:.3f} s/step  gradient {event.grad_norm:.3g}"
        if event.nonfinite:
            note += f"  non-finite steps {event.nonfinite}"
        if self.console.is_terminal:
            if self._bar is None:
                columns = (
                    MofNCompleteColumn(),
                    BarColumn(),
                    TimeRemainingColumn(),
                    TextColumn("{task.description}"),
                )
                self._bar = Progress(*columns, console=self.console, transient=True)
                self._bar.add_task(note, total=event.steps)
                self._bar.start()
            self._bar.update(self._bar.task_ids[0], completed=event.step, description=note)
        elif self.clock() >= self._next_line or event.step == event.steps:
            left = (event.steps - event.step) * self._pace
            self.console.print(f"step {event.step}/{event.steps}  {left:.0f} s left  {note}", highlight=False)
            self._next_line = self.clock() + self.plain_every_s

    def close(self) -> None:
        """Take the live line off the terminal; safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
