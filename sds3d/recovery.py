"""What follows a step whose gradients are not finite: it is undone, the learning rate halves, the run goes on.

Such a step never reaches the parameters: the optimiser skips it on the device. Where several come in a row the state
itself is doubted, and the last remembered one takes its place. The step counter never goes back, so every run ends.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

BACKOFF, SLOWEST = 0.5, 1 / 64
DOUBTFUL = 3  # bad steps in a row after which the state is rolled back
CALM = 50  # good steps in a row after which the learning rate doubles, until it is what it was

Advice = Literal["go on", "undo", "roll back"]


class Recovery:
    """Counts good and bad steps; `lr_scale` multiplies the learning rate. Travels in checkpoints."""

    def __init__(self) -> None:
        self.lr_scale = 1.0
        self.good = self.bad = 0  # in a row
        self.remembered: Mapping[str, Tensor] | None = None

    def remember(self, state: Mapping[str, Tensor]) -> None:
        """Keep a state to come back to; one that was just doubted is not kept."""
        if self.bad == 0:
            self.remembered = state

    def after(self, finite: bool) -> Advice:
        """What to do after a step."""
        if finite:
            self.good, self.bad = self.good + 1, 0
            if self.lr_scale < 1.0 and self.good >= CALM:
                self.lr_scale, self.good = min(1.0, self.lr_scale / BACKOFF), 0
            return "go on"
        self.good, self.bad = 0, self.bad + 1
        self.lr_scale = max(SLOWEST, self.lr_scale * BACKOFF)
        if self.bad % DOUBTFUL == 0 and self.remembered is not None:
            return "roll back"
        return "undo"

    def message(self, step: int, advice: Advice) -> str | None:
        """What the user is told about a bad step; None where it was said already."""
        rate = f"the learning rate is now {self.lr_scale:g} of its setting"
        if advice == "roll back":
            return (
                f"step {step}: {self.bad} steps in a row were not finite; back to the last good state, {rate}"
            )
        if advice == "undo" and self.bad == 1:
            return f"step {step}: gradients are not finite; the step is undone, {rate}"
        return None

    def as_tensor(self) -> Float[Tensor, "3"]:
        """For checkpoints."""
        return torch.tensor([self.lr_scale, self.good, self.bad], dtype=torch.float64)

    def load(self, saved: Float[Tensor, "3"]) -> None:
        """What `as_tensor` gave."""
        self.lr_scale, self.good, self.bad = float(saved[0]), int(saved[1]), int(saved[2])
