"""A live table of a batch for terminals, plain lines elsewhere. Writes to stderr only."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sds3d.batch.drive import Board, Flight
from sds3d.batch.order import Result

ROWS = 20  # running jobs shown at most
_REFRESH_S = 0.5


class BatchTable:
    """Call it with the board whenever something may have changed."""

    def __init__(
        self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console or Console(stderr=True)
        self.clock = clock
        self._live: Live | None = None
        self._due = -float("inf")
        self._told = 0

    def __call__(self, board: Board) -> None:
        """Show how the batch stands."""
        for result in board.ended[self._told :]:
            if not self.console.is_terminal or result.status in ("failed", "died"):
                self.console.print(_line(result, board), highlight=False, soft_wrap=True)
        self._told = len(board.ended)
        if not self.console.is_terminal or self.clock() < self._due:
            return
        self._due = self.clock() + _REFRESH_S
        if self._live is None:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(live_table(board, self.clock()), refresh=True)

    def close(self) -> None:
        """Take the table off the terminal; safe to call twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def live_table(board: Board, now: float) -> Table:
    """Running jobs, one per row, under a line of counts."""
    counts = board.counts()
    table = Table(
        title=_headline(board, now), title_justify="left", title_style="bold", box=None, expand=True
    )
    for name in ("job", "try", "step", "phase", "s", "worker"):
        table.add_column(name, justify="right" if name in ("try", "step", "s") else "left", no_wrap=True)
    for flight in list(board.flights.values())[:ROWS]:
        table.add_row(*_row(flight, now))
    if len(board.flights) > ROWS:
        table.add_row(f"... and {len(board.flights) - ROWS} more")
    if counts["failed"]:
        table.caption = f"{counts['failed']} failed; see the report"
    return table


def _row(flight: Flight, now: float) -> list[Text]:
    progress, order = flight.progress, flight.order
    step = f"{progress.step}/{progress.steps or order.job.steps}"
    cells = (
        order.job.id,
        str(order.attempt),
        step,
        progress.phase,
        f"{now - flight.since:.0f}",
        progress.worker,
    )
    return [Text(cell) for cell in cells]  # Text: a prompt is never read as markup


def _headline(board: Board, now: float) -> str:
    counts = board.counts()
    over = counts["done"] + counts["failed"]
    text = f"{counts['done']} of {len(board.jobs)} done, {counts['running']} running, {counts['waiting']} waiting"
    finished = sum(result.status in ("done", "failed") for result in board.ended)
    if finished and over < len(board.jobs):
        left = (now - board.began) / finished * (len(board.jobs) - over)
        text += f", about {left / 60:.0f} min left" if left >= 90 else f", about {left:.0f} s left"
    return text


def _line(result: Result, board: Board) -> Text:
    counts = board.counts()
    text = f"[{counts['done']}/{len(board.jobs)}] {result.status:<11} {result.job}  {result.seconds:.1f} s"
    if result.score is not None:
        text += f"  score {result.score:.3f}"
    if result.error:
        text += f"  attempt {result.attempt}: {result.error}"
    return Text(text)
