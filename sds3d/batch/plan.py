"""From the entries of a batch file to jobs: sweeps and candidates expanded, everything checked before the first starts.

The name of a job is made of its prompt and its settings, so that the same command finds the same folders again.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from sds3d.batch.entries import BatchFile, Entry, Sweep
from sds3d.batch.files import Bounds
from sds3d.batch.order import Job
from sds3d.batch.score import check_scorer, scorer_of
from sds3d.config.dump import config_hash, dump_plain, to_plain
from sds3d.config.load import SCHEMA, file_layers, find_config, nested
from sds3d.config.tree import Leaf, Node, Origin, Table, parse
from sds3d.errors import ConfigError, InputError, Sds3dError
from sds3d.job import JobConfig
from sds3d.paths import safe_slug
from sds3d.staged import KEY, Stage, checked_jobs, stages_from

MAX_JOBS = 100_000
SHOWN_FAULTS = 20
_WHERE_IT_RUNS = ("device", "memory", "checkpoint")  # not part of what is made
COMMAND_LINE = "command line"


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the command line says about all jobs."""

    config: str = "default"
    overrides: tuple[Table, ...] = ()
    sweep: Sweep = field(default_factory=dict)
    best_of: int = 1
    scorer: str = "auto"


def make_jobs(file: BatchFile, rules: Rules, folder: Path, roots: Sequence[Path]) -> list[Job]:
    """All jobs of a batch, in order.

    Raises:
        ConfigError: every fault of the file, each with its line, in one message.
    """
    count = sum(
        rules.best_of * math.prod(len(values) for values in {**entry.sweep, **rules.sweep}.values())
        for entry in file.entries
    )
    if count > MAX_JOBS:
        raise ConfigError(f"batch: {count} jobs, expected at most {MAX_JOBS}; split the file or the sweep")
    planner = _Planner(rules, folder, tuple(roots))
    faults = list(file.faults)
    jobs: list[Job] = []
    for entry in file.entries:
        try:
            for values in _combinations({**entry.sweep, **rules.sweep}):
                jobs += planner.jobs(entry, values)
        except Sds3dError as error:
            faults.append(_placed(str(error), entry.origin))
    if faults:
        raise ConfigError(_all_faults(faults))
    return _told_apart(jobs)


class _Planner:
    def __init__(self, rules: Rules, folder: Path, roots: tuple[Path, ...]) -> None:
        if rules.best_of > 1 and rules.scorer == "none":
            raise ConfigError("--best-of: needs a score; remove --score none")
        self.rules = rules
        chain = file_layers(find_config(rules.config))
        trusted = frozenset({COMMAND_LINE, "--sweep", *(layer.origin.source for layer in chain)})
        self.bounds = Bounds(folder=folder, roots=roots, trusted=trusted)
        self.base = lru_cache(maxsize=None)(self._base)

    def _base(self, config: str | None, origin: Origin | None) -> list[Table]:
        if config is None:
            return file_layers(find_config(self.rules.config))
        path = self.bounds.config(config, origin)
        return file_layers(path, lambda found: self.bounds.may_read(found, origin))

    def jobs(self, entry: Entry, values: Mapping[str, Node]) -> Iterator[Job]:
        """The candidates of one entry with one choice of swept values."""
        base = self.base(entry.config, entry.config_origin)
        prompt = Leaf(entry.prompt, True, entry.origin)
        layers = [*entry.layers, nested("prompt", prompt), *self.rules.overrides]
        layers += [nested(key, node) for key, node in values.items()]
        stages = stages_from(base, layers)
        first = stages[0].job.seed
        group, varied = "", {key: _plain(node) for key, node in values.items()}
        for index in range(self.rules.best_of):
            if index:
                seed = Leaf(str(first + index), False, Origin("--best-of"))
                stages = stages_from(base, [*layers, nested("seed", seed)])
            job = self._job(entry, stages, varied)
            group = group or job.id
            yield job if self.rules.best_of == 1 else _candidate(job, group)

    def _job(self, entry: Entry, stages: Sequence[Stage], varied: Mapping[str, Any]) -> Job:
        settings = [to_plain(stage.job) for stage in stages]
        for stage, plain in zip(
            stages, settings, strict=True
        ):  # first, as the other checks look into folders
            self.bounds.settings(stage.job, plain, stage.resolved.origins)
        checked = checked_jobs(stages)
        last = checked[-1]
        scorer = scorer_of(self.rules.scorer, last)
        if self.rules.best_of > 1 or self.rules.scorer not in ("auto", "none"):
            check_scorer(scorer, last)
        whole: dict[str, Any] = {"schema": SCHEMA}
        if len(stages) == 1:
            whole |= settings[0]
        else:
            names = [stage.name for stage in stages]
            whole[KEY] = [{"name": name, **plain} for name, plain in zip(names, settings, strict=True)]
        digest = "".join(config_hash(stage.job, ignore=_WHERE_IT_RUNS) for stage in stages)
        name = _named(entry.name or entry.prompt, digest)
        return Job(
            id=name,
            group=name,
            prompt=entry.prompt,
            seed=last.seed,
            config=entry.config or self.rules.config,
            settings=whole,
            steps=sum(job.steps for job in checked),
            varied=varied,
            scorer=scorer,
            origin=str(entry.origin),
        )


def job_config(job: Job) -> JobConfig:
    """The settings of a job's last stage, read back; for those who check what was planned."""
    layers = [_as_table(job.settings)]
    return stages_from(layers)[-1].job


def _as_table(settings: Mapping[str, Any]) -> Table:
    rest = {key: value for key, value in settings.items() if key != "schema"}
    node = parse(dump_plain(rest), "job")
    assert isinstance(node, Table)
    return node


def _named(text: str, digest: str) -> str:
    """A folder name for any prompt; told apart by what is made."""
    mark = hashlib.blake2b(f"{text}\n{digest}".encode(), digest_size=4).hexdigest()
    return f"{safe_slug(text, 40).rstrip('-')}-{mark}"


def _candidate(job: Job, group: str) -> Job:
    return replace(job, group=group, id=f"{group}-seed{job.seed}")


def _told_apart(jobs: Sequence[Job]) -> list[Job]:
    """Jobs that are written twice get numbers, in the order of the file."""
    seen: dict[str, int] = {}
    result = []
    for job in jobs:
        seen[job.id] = seen.get(job.id, 0) + 1
        number = seen[job.id]
        mark = f"-{number}" if number > 1 else ""
        result.append(replace(job, id=f"{job.id}{mark}", group=f"{job.group}{mark}"))
    return result


def _combinations(sweep: Sweep) -> Iterator[dict[str, Node]]:
    for values in itertools.product(*sweep.values()):
        yield dict(zip(sweep, values, strict=True))


def _plain(node: Node) -> Any:
    if isinstance(node, Leaf):
        return node.value
    if isinstance(node, Table):
        return {key: _plain(value) for key, value in node.entries.items()}
    return [_plain(value) for value in node.nodes]


def _placed(message: str, origin: Origin) -> str:
    """Every fault names a file and line; what stands elsewhere is told together with the job it belongs to."""
    return message if message.startswith(f"{origin.source}:") else f"{origin}: {message}"


def _all_faults(faults: Sequence[str]) -> str:
    different = list(dict.fromkeys(faults))
    if len(different) == 1:
        return different[0]
    lines = [f"{len(different)} faults, and no job was started:", *different[:SHOWN_FAULTS]]
    if len(different) > SHOWN_FAULTS:
        lines.append(f"... and {len(different) - SHOWN_FAULTS} more")
    return "\n  ".join(lines)


def check_overrides(overrides: Sequence[Table], sweep: Sweep) -> None:
    """Raises InputError where a setting is both given and swept on the command line."""
    for layer in overrides:
        key, node = "", layer
        while isinstance(node, Table) and len(node.entries) == 1:
            part, inner = next(iter(node.entries.items()))
            key = f"{key}.{part}".lstrip(".")
            if key in sweep:
                raise InputError(f"--sweep: {key} is also set to one value; keep one of them")
            if not isinstance(inner, Table):
                break
            node = inner
