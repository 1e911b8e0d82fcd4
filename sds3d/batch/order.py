"""What travels between the driver of a batch and its workers, as JSON: a job, an order to do it, and the result."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a batch, as plain data; `settings` is a whole config that needs no other file."""

    id: str  # also its folder
    group: str  # candidates for the same asset share it
    prompt: str
    seed: int
    config: str  # what the manifest calls it
    settings: Mapping[str, Any]
    steps: int = 0
    varied: Mapping[str, Any] = field(default_factory=dict)  # swept settings and their values
    scorer: str = ""
    origin: str = ""


@dataclass(frozen=True, kw_only=True)
class Order:
    """A job to be done somewhere."""

    job: Job
    attempt: int
    storage: str
    session: str = ""  # the command that gave it; tells its stop from that of another
    threads: int = 1

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Order":
        """The order of a line."""
        raw = json.loads(text)
        return cls(**{**raw, "job": Job(**raw["job"])})


@dataclass(frozen=True, kw_only=True)
class Result:
    """How one attempt at a job ended; "died" means that its worker went away."""

    job: str
    attempt: int
    status: Literal["done", "failed", "interrupted", "died"]
    error: str | None = None
    exit_code: int = 0
    seconds: float = 0.0
    steps_done: int = 0
    files: Mapping[str, str] = field(default_factory=dict)  # names inside the job's folder
    warnings: tuple[str, ...] = ()
    score: float | None = None
    worker: str = ""

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Result":
        """The result of a line."""
        raw = json.loads(text)
        return cls(**{**raw, "warnings": tuple(raw["warnings"])})
