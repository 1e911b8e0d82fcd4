"""The one loop behind every engine: hands out orders, retries what died, writes down what happened."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sds3d.batch.engine import STALL_S, Engine, Progress
from sds3d.batch.ledger import Ledger, State
from sds3d.batch.order import Job, Order, Result

POLL_S = 0.2
OnChange = Callable[["Board"], None]


@dataclass
class Flight:
    """An order that is out."""

    order: Order
    since: float
    progress: Progress = field(default_factory=Progress)
    beaten: float = 0.0  # when its heartbeat last changed


@dataclass
class Board:
    """How a batch stands, for those who show it."""

    jobs: Sequence[Job]
    ledger: Ledger
    flights: dict[str, Flight] = field(default_factory=dict)
    ended: list[Result] = field(default_factory=list)  # attempts since this process began, in order
    began: float = field(default_factory=time.monotonic)

    def counts(self) -> dict[State, int]:
        """How many jobs are in which state."""
        found: dict[State, int] = dict.fromkeys(("waiting", "running", "done", "failed", "interrupted"), 0)
        for job in self.jobs:
            state = self.ledger.of(job.id).state
            # What an earlier session left running waits for this one.
            found["waiting" if state == "running" and job.id not in self.flights else state] += 1
        return found


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How a batch is driven."""

    storage: str
    session: str
    retries: int = 2
    threads: int = 1
    stall_s: float = STALL_S


def drive(
    board: Board, engine: Engine, terms: Terms, *, stopped: Callable[[], bool], on_change: OnChange
) -> None:
    """Bring every job that is not done to an end, or as far as `stopped` allows."""
    waiting = deque(job for job in board.jobs if board.ledger.of(job.id).state != "done")
    left = {job.id: terms.retries for job in waiting}
    asked = False
    while waiting or board.flights:
        if stopped() and not asked:
            asked = True
            waiting.clear()
            engine.stop()
        while waiting and len(board.flights) < engine.slots:
            _hand_out(board, engine, terms, waiting.popleft())
        for result in engine.poll(POLL_S):
            flight = board.flights.get(result.job)
            if flight is None or flight.order.attempt != result.attempt:
                continue  # of a worker that was given up: its successor's word counts
            del board.flights[result.job]
            again = not asked and left[result.job] > 0 and worth_another(result)
            left[result.job] -= 1
            board.ledger.ended(result, _state(result, again, asked))
            board.ended.append(result)
            if again:
                waiting.append(flight.order.job)
        _watch(board, engine, terms)
        on_change(board)


def worth_another(result: Result) -> bool:
    """Whether another attempt can end better: not where the same settings fail in the same way."""
    if result.status == "failed":
        return result.exit_code == 1
    return result.status != "done"


def _state(result: Result, again: bool, asked: bool) -> State:
    if result.status == "done":
        return "done"
    if again:
        return "waiting"
    return "interrupted" if asked and worth_another(result) else "failed"


def _hand_out(board: Board, engine: Engine, terms: Terms, job: Job) -> None:
    attempt = board.ledger.of(job.id).attempts + 1
    order = Order(
        job=job, attempt=attempt, storage=terms.storage, session=terms.session, threads=terms.threads
    )
    board.ledger.started(job.id, attempt)
    board.flights[job.id] = Flight(order, time.monotonic())
    engine.submit(order)


def _watch(board: Board, engine: Engine, terms: Terms) -> None:
    """Take in progress; a worker whose heart has stopped is given up."""
    now = time.monotonic()
    for name, flight in list(board.flights.items()):
        before, flight.progress = flight.progress.beat, engine.progress(name)
        if flight.progress.beat != before:
            flight.beaten = now
        elif flight.progress.beat is not None and now - flight.beaten > terms.stall_s:
            engine.cancel(name)
