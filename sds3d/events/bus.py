"""Events: the only way in which the loop reaches the outside. Each is a record, each listener a callable.

The loop emits `StepDone` (and `Warned`); the run emits the rest. A listener may not change what is optimised.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PhaseStarted:
    """A named part of the run begins: "load", "optimise", "export"."""

    name: str


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """One optimisation step is finished; `step` of `steps` are done, so the first event has step 1."""

    step: int
    steps: int
    grad_norm: float
    seconds: float = 0.0  # wall time per step since the event before; the run fills it in
    log: Mapping[str, float] = field(default_factory=dict)  # "alpha_mean" among them
    nonfinite: int = 0  # steps so far whose gradients were not finite


@dataclass(frozen=True, kw_only=True)
class PreviewReady:
    """A picture of the scene as it stands, sRGB in [0, 1]."""

    step: int
    image: Float[Tensor, "3 H W"]
    path: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Warned:
    """Something the user should know; the run goes on."""

    message: str


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved:
    """The state after `step` steps is safe on disk."""

    path: Path
    step: int


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The run is over; `status` is "done", "interrupted" or "failed"."""

    status: str
    folder: Path
    files: Mapping[str, Path] = field(default_factory=dict)
    seconds: float = 0.0


Event = PhaseStarted | StepDone | PreviewReady | Warned | CheckpointSaved | Finished
Emit = Callable[[Event], None]


def to_all(listeners: Sequence[Emit]) -> Emit:
    """An `Emit` that calls every listener in order."""

    def emit(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return emit
