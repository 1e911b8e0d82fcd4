"""10,000 prompts on 64 GPUs: the real plan, ledger and loop against simulated machines.

    python benchmarks/scheduler.py --out benchmarks/results/scheduler.md

Measured here: reading and checking the plan, the driver's time per order (loop, ledger with its flush to disk, heart-
beats read), the report, the bytes of a run folder. Assumed: seconds per run and per prior load on a GPU, how fast the
storage is, how often machines fail. The simulation moves its own clock, so a day takes seconds.
"""

import argparse
import heapq
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from sds3d.batch.drive import Board, Terms, drive
from sds3d.batch.engine import Progress
from sds3d.batch.entries import read_batch
from sds3d.batch.files import root_folders
from sds3d.batch.ledger import Ledger
from sds3d.batch.order import Job, Order, Result
from sds3d.batch.plan import Rules, make_jobs
from sds3d.batch.report import write_report
from sds3d.batch.storage import SharedFolder

DAY_S = 86400.0


@dataclass(frozen=True, kw_only=True)
class World:
    """What a cluster is taken to be: all of it is assumed but `driver_s`."""

    gpus: int = 64
    run_s: float = 1800.0  # one asset with a full-size prior on one GPU
    spread: float = 0.15  # standard deviation of that, as a share
    load_gb: float = 5.0  # weights that one prior load reads
    load_s: float = 25.0  # and what it takes beside reading
    storage_gb_s: float = 1.0  # all machines together
    result_mb: float = 12.0
    checkpoint_mb: float = 60.0
    checkpoint_every_s: float = 120.0
    lost_per_gpu_day: float = 0.05  # workers that die
    load_per_run: bool = False  # as a program that is started for every prompt does
    driver_s: float = 0.002  # per order; replaced by what is measured


@dataclass
class Spent:
    """Seconds of GPU time by what they went into."""

    run: float = 0.0
    load: float = 0.0
    lost: float = 0.0
    written_gb: float = 0.0
    read_gb: float = 0.0
    deaths: int = 0
    end: float = 0.0
    driver: float = 0.0


@dataclass
class Simulated:
    """An engine whose workers live in simulated time.

    Every run passes the events given, load, run, store; events happen in the order of their time. The storage
    serves one request after another, at the rate that the checkpoints of running jobs leave; so does the driver.
    """

    world: World
    seed: int = 0
    now: float = 0.0
    storage_free: float = 0.0
    driver_free: float = 0.0
    running: int = 0
    loaded: set[int] = field(default_factory=set)
    share_done: dict[str, float] = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.idle = list(range(self.world.gpus))
        self.events: list[tuple[float, int, Callable[[], Result | None]]] = []
        self.count = 0

    @property
    def slots(self) -> int:
        return self.world.gpus

    def submit(self, order: Order) -> None:
        self.driver_free = max(self.driver_free, self.now) + self.world.driver_s
        self.spent.driver += self.world.driver_s
        self._at(self.driver_free, partial(self._load, order, self.idle.pop()))

    def poll(self, timeout_s: float) -> list[Result]:
        while self.events:
            self.now, _, happens = heapq.heappop(self.events)
            result = happens()
            if result is not None:
                self.spent.end = self.now
                return [result]
        return []

    def _at(self, when: float, happens: "Callable[[], Result | None]") -> None:
        self.count += 1
        heapq.heappush(self.events, (when, self.count, happens))

    def _moved(self, gb: float) -> float:
        """When the storage has served a request of now."""
        world = self.world
        taken = self.running * world.checkpoint_mb / 1000 / world.checkpoint_every_s
        rate = max(world.storage_gb_s - taken, 0.05 * world.storage_gb_s)
        self.storage_free = max(self.storage_free, self.now) + gb / rate
        return self.storage_free

    def _load(self, order: Order, gpu: int) -> None:
        world, until = self.world, self.now
        if gpu not in self.loaded or world.load_per_run:
            until = self._moved(world.load_gb) + world.load_s
            self.spent.load += until - self.now
            self.spent.read_gb += world.load_gb
            self.loaded.add(gpu)
        self._at(until, partial(self._run, order, gpu))

    def _run(self, order: Order, gpu: int) -> None:
        world, job = self.world, order.job.id
        whole = max(world.run_s * self.draw.gauss(1.0, world.spread), world.run_s * 0.3)
        left = whole * (1.0 - self.share_done.get(job, 0.0))
        died = self.draw.random() < world.lost_per_gpu_day * left / DAY_S
        ran = left * self.draw.random() if died else left
        self.running += 1
        self.spent.run += ran
        self.spent.written_gb += ran / world.checkpoint_every_s * world.checkpoint_mb / 1000
        if died:
            kept = ran - ran % world.checkpoint_every_s
            self.share_done[job] = self.share_done.get(job, 0.0) + kept / whole
            self.spent.lost += ran - kept
            self.spent.deaths += 1
            self.loaded.discard(gpu)
        self._at(self.now + ran, partial(self._store, order, gpu, died))

    def _store(self, order: Order, gpu: int, died: bool) -> None:
        self.running -= 1
        self.spent.written_gb += 0.0 if died else self.world.result_mb / 1000
        until = self.now if died else self._moved(self.world.result_mb / 1000)
        self._at(until, partial(self._end, order, gpu, died))

    def _end(self, order: Order, gpu: int, died: bool) -> Result:
        self.idle.append(gpu)
        return Result(job=order.job.id, attempt=order.attempt, status="died" if died else "done")

    def progress(self, job: str) -> Progress:
        return Progress(beat=self.count)

    def cancel(self, job: str) -> None:
        raise AssertionError("nothing stalls here")

    def stop(self) -> None: ...

    def close(self) -> None: ...


def simulate(world: World, jobs: list[Job]) -> tuple[Simulated, Board, float]:
    """(engine at the end, board, wall seconds of the driver) of a batch in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        ledger, engine = Ledger(Path(folder)), Simulated(world)
        board, began = Board(jobs, ledger), time.perf_counter()
        terms = Terms(storage=folder, session="simulated", retries=20)
        drive(board, engine, terms, stopped=lambda: False, on_change=lambda board: None)
        wall = time.perf_counter() - began
        ledger.close()
    counts = board.counts()
    assert counts["done"] == len(jobs), counts
    assert all(ledger.of(job.id).finished == 1 for job in jobs)
    return engine, board, wall


def measured(count: int) -> tuple[list[Job], dict[str, float]]:
    """The jobs of `count` prompts and what the driver's parts cost on this machine."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "prompts.txt"
        path.write_text("".join(f"a red mug number {index}\n" for index in range(count)))
        began = time.perf_counter()
        jobs = make_jobs(read_batch(path), Rules(config="full"), folder, root_folders(path, folder, []))
        plan_s = time.perf_counter() - began
        world = World(run_s=10.0, lost_per_gpu_day=0.0, load_gb=0.0)
        began = time.perf_counter()
        drive_s = simulate(world, jobs)[2]
        ledger = Ledger(folder)
        for job in jobs:
            ledger.started(job.id, 1)
        again = Board(jobs, ledger)
        began = time.perf_counter()
        write_report(folder, again, SharedFolder(folder), engine="ray", wall_s=0.0)
        report_s = time.perf_counter() - began
        ledger.close()
        began = time.perf_counter()
        Ledger(folder).close()
        reopen_s = time.perf_counter() - began
        storage = SharedFolder(folder)
        data = json.dumps(
            {"attempt": 1, "step": 1, "steps": 2, "phase": "optimising", "worker": "a:1", "beat": 2}
        )
        began = time.perf_counter()
        for index in range(640):
            storage.write(f"beats/{index % 64}.json", data.encode())
            storage.read(f"beats/{index % 64}.json")
        beat_s = (time.perf_counter() - began) / 640
    return jobs, {
        "plan_ms": 1000 * plan_s / count,
        "drive_ms": 1000 * drive_s / count,
        "report_ms": 1000 * report_s / count,
        "reopen_ms": 1000 * reopen_s / count,
        "beat_ms": 1000 * beat_s,
    }


def row(name: str, world: World, jobs: list[Job]) -> str:
    """One line of the table."""
    engine, _, _ = simulate(world, jobs)
    spent, total = engine.spent, engine.spent.end * world.gpus
    other = total - spent.run - spent.load
    share = spent.driver / spent.end
    busy = (spent.written_gb + spent.read_gb) / world.storage_gb_s / spent.end
    cells: list[Any] = [
        name,
        f"{spent.end / 3600:.1f}",
        f"{(spent.run - spent.lost) / total:.1%}",
        f"{spent.load / total:.1%}",
        f"{spent.lost / total:.2%}",
        f"{other / total:.1%}",
        f"{busy:.0%}",
        f"{share:.2%}",
        f"{(spent.written_gb + spent.read_gb) / 1000:.1f}",
        spent.deaths,
    ]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    jobs, costs = measured(given.jobs)
    base = World(driver_s=(costs["drive_ms"] + costs["beat_ms"]) / 1000)
    short = replace(base, run_s=60.0)
    worlds = {
        "30 min per run": base,
        "30 min, weights read for every prompt": replace(base, load_per_run=True),
        "30 min, 0.1 GB/s storage": replace(base, storage_gb_s=0.1),
        "30 min, 0.1 GB/s, read for every prompt": replace(base, storage_gb_s=0.1, load_per_run=True),
        "30 min, workers die 20 times as often": replace(base, lost_per_gpu_day=1.0),
        "60 s per run": short,
        "60 s, weights read for every prompt": replace(short, load_per_run=True),
        "60 s, 0.1 GB/s storage": replace(short, storage_gb_s=0.1),
        "1 s per run": replace(base, run_s=1.0),
        "1 s per run, 1024 GPUs": replace(base, run_s=1.0, gpus=1024, load_gb=0.0),
    }
    lines = [
        f"{given.jobs} jobs. Measured on this machine, per job: plan {costs['plan_ms']:.2f} ms, loop and ledger "
        f"{costs['drive_ms']:.2f} ms, report {costs['report_ms']:.2f} ms, ledger read again "
        f"{costs['reopen_ms']:.3f} ms; one heartbeat written and read {costs['beat_ms']:.2f} ms.",
        "",
        "| cluster of 64 GPUs | hours | useful | loading | repeated | waiting | storage busy | driver busy | "
        "TB moved | deaths |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(row(name, world, jobs) for name, world in worlds.items()),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if given.out is not None:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
