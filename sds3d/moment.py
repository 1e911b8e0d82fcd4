"""Where a run stands."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Moment:
    """`step` of `steps`, step in [0, steps)."""

    step: int
    steps: int

    @property
    def progress(self) -> float:
        """Fraction of the run done, in [0, 1)."""
        return self.step / max(self.steps, 1)
