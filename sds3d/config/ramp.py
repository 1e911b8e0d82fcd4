"""`Ramp`: the one way in which a setting changes over a run."""

import math
from dataclasses import dataclass
from typing import Literal

from sds3d.moment import Moment

RampShape = Literal["linear", "sqrt", "cosine", "log", "step"]


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """A value that moves from `start` to `end`; constant before and after.

    YAML: a plain number, or `{from: 0.98, to: 0.5, over_frac: [0, 0.8], shape: linear}`; `over_steps: [0, 5000]`
    instead of `over_frac` counts optimisation steps, whatever the length of the run.

    Shapes, with u in [0, 1] the way gone: linear u; sqrt sqrt(u) (fast first, as in HiFA); cosine
    (1 - cos(pi u)) / 2; log interpolates the logarithms (both ends > 0); step jumps at the end of the interval.
    """

    start: float
    end: float
    over_frac: tuple[float, float] = (0.0, 1.0)
    over_steps: tuple[int, int] | None = None
    shape: RampShape = "linear"

    @classmethod
    def constant(cls, value: float) -> "Ramp":
        """A ramp that never moves."""
        return cls(start=value, end=value)

    @property
    def is_constant(self) -> bool:
        """Whether the value is the same at every step."""
        return self.start == self.end

    def at(self, now: Moment) -> float:
        """The value at this moment."""
        if self.over_steps is not None:
            first, last = map(float, self.over_steps)
            position = float(now.step)
        else:
            first, last = self.over_frac
            position = now.progress
        u = (
            min(max((position - first) / (last - first), 0.0), 1.0)
            if last > first
            else float(position >= first)
        )
        if self.shape == "log":
            return math.exp(math.log(self.start) + u * (math.log(self.end) - math.log(self.start)))
        bend = {"sqrt": math.sqrt(u), "cosine": 0.5 - 0.5 * math.cos(math.pi * u), "step": float(u >= 1.0)}
        return self.start + bend.get(self.shape, u) * (self.end - self.start)
