"""`sds3d batch` from its words to its report: plan, lock, ledger, engine, loop, summary."""

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sds3d.batch.drive import Board, OnChange, Terms, drive
from sds3d.batch.engine import Engine, cpu_count, default_workers
from sds3d.batch.entries import read_batch, sweep_of
from sds3d.batch.files import root_folders
from sds3d.batch.ledger import MARK, Ledger
from sds3d.batch.local import LocalEngine
from sds3d.batch.order import Job
from sds3d.batch.plan import Rules, check_overrides, make_jobs
from sds3d.batch.ray_engine import RayEngine, import_ray
from sds3d.batch.report import write_report
from sds3d.batch.score import reward_of
from sds3d.batch.slurm import SlurmEngine, import_submitit
from sds3d.batch.storage import STOP, SharedFolder, Storage, open_storage
from sds3d.config.load import override_layers
from sds3d.errors import ConfigError, InputError
from sds3d.paths import LOCK_NAME, locked, safe_slug, write_atomic

# What each engine needs to have installed.
ENGINES: dict[str, Callable[[], object]] = {
    "local": lambda: None,
    "ray": import_ray,
    "slurm": import_submitit,
}


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The words of the command line."""

    file: Path
    out: Path | None = None
    config: str = "default"
    overrides: tuple[str, ...] = ()
    sweep: tuple[str, ...] = ()
    engine: str = "local"
    workers: int | None = None
    best_of: int = 1
    scorer: str = "auto"
    retries: int = 2
    roots: tuple[Path, ...] = ()
    storage: str | None = None
    cpus: float | None = None
    gpus: float | None = None
    address: str | None = None
    slurm: tuple[str, ...] = field(default=())

    def folder(self) -> Path:
        """Where the batch lives: the same for the same file, so that the same command goes on."""
        return self.out or Path("outputs") / "batch" / safe_slug(self.file.stem)


def plan_batch(config: BatchConfig) -> list[Job]:
    """All jobs, checked. Raises ConfigError or InputError with every fault."""
    if config.engine not in ENGINES:
        raise ConfigError(f"--engine: got {config.engine!r}, expected one of {', '.join(ENGINES)}")
    ENGINES[config.engine]()
    slurm_options(config.slurm)
    sweep, overrides = sweep_of(config.sweep), tuple(override_layers(config.overrides))
    check_overrides(overrides, sweep)
    rules = Rules(
        config=config.config, overrides=overrides, sweep=sweep, best_of=config.best_of, scorer=config.scorer
    )
    roots = root_folders(config.file, config.folder(), config.roots)
    jobs = make_jobs(read_batch(config.file), rules, config.file.parent.resolve(), roots)
    for scorer in {job.scorer for job in jobs if job.scorer}:
        reward_of(scorer)  # a missing model should not show after the first run
    return jobs


def run_batch(
    config: BatchConfig,
    *,
    stopped: Callable[[], bool] = lambda: False,
    on_change: OnChange = lambda board: None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Make what is missing, then write summary.json, summary.csv and report.html; returns the summary.

    Raises:
        ConfigError or InputError: before anything is started.
    """
    jobs, out = plan_batch(config), config.folder()
    storage = open_storage(config.storage or str(out))
    _check_storage(config, storage)
    _claim(out)
    session = uuid.uuid4().hex[:12]
    began = time.monotonic()
    with locked(out):
        write_atomic(out / MARK, json.dumps({"schema": 1, "file": str(config.file)}).encode())
        ledger = Ledger(out)
        board = Board(jobs, ledger)
        missing = [job for job in jobs if ledger.of(job.id).state != "done"]
        say(f"{len(jobs)} jobs in {out}, {len(jobs) - len(missing)} of them done before")
        try:
            if missing:
                _drive(config, board, storage, session, len(missing), stopped, on_change)
        finally:
            ledger.close()
        return write_report(out, board, storage, engine=config.engine, wall_s=time.monotonic() - began)


def _drive(
    config: BatchConfig,
    board: Board,
    storage: Storage,
    session: str,
    count: int,
    stopped: Callable[[], bool],
    on_change: OnChange,
) -> None:
    engine = _engine(config, storage, session, count)
    threads = max(1, int(config.cpus or 1))
    terms = Terms(storage=storage.url, session=session, retries=config.retries, threads=threads)
    try:
        drive(board, engine, terms, stopped=stopped, on_change=on_change)
    finally:
        engine.close()
        if isinstance(storage, SharedFolder):
            with suppress(OSError):
                (storage.root / STOP).unlink()


def _engine(config: BatchConfig, storage: Storage, session: str, count: int) -> Engine:
    if config.engine == "local":
        return LocalEngine(storage, min(config.workers or default_workers(), count))
    if config.engine == "ray":
        engine = RayEngine(
            storage,
            session,
            workers=config.workers,
            cpus=1.0 if config.cpus is None else config.cpus,
            gpus=config.gpus or 0.0,
            address=config.address,
        )
        engine.check_room()
        return engine
    return SlurmEngine(
        storage,
        session,
        workers=min(config.workers or 1, count),
        cpus=int(config.cpus or 1),
        gpus=int(config.gpus or 0),
        options=slurm_options(config.slurm),
    )


def slurm_options(words: Sequence[str]) -> Mapping[str, Any]:
    """`partition=gpu` as parameters of submitit; names of Slurm's own options get its prefix."""
    found: dict[str, Any] = {}
    for word in words:
        key, separator, value = word.partition("=")
        if not separator or not key.isidentifier() or not value:
            raise ConfigError(
                f"--slurm: got {word!r}, expected name=value, e.g. partition=gpu or timeout_min=600"
            )
        name = key if key in ("timeout_min", "mem_gb", "name") or key.startswith("slurm_") else f"slurm_{key}"
        found[name] = int(value) if value.isdecimal() else value
    return found


def _check_storage(config: BatchConfig, storage: Storage) -> None:
    if config.engine == "local" and config.storage is not None:
        raise ConfigError(
            "--storage: the local engine works in --out; use --engine ray or slurm with a storage"
        )
    if config.workers is not None and config.workers > 4 * cpu_count() and config.engine == "local":
        raise ConfigError(f"--workers: got {config.workers}, this machine has {cpu_count()} processors")


def _claim(out: Path) -> None:
    """Make the folder, or check that it holds a batch. Raises InputError for anything else."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / MARK).exists() and any(path.name != LOCK_NAME for path in out.iterdir()):
            raise InputError(f"{out}: holds other files and no batch; choose another --out")
    except OSError as error:
        raise InputError(f"{out}: cannot write here: {error.strerror or error}") from error
