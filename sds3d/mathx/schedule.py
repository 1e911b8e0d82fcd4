"""Noise schedules x_t = alpha(t) x + sigma(t) noise on one clock: t in [0, 1], 0 clean, 1 noise.

Notation: alpha_bar_i is the cumulative product of (1 - beta) after i + 1 of N trained steps; step i sits at
t = (i + 1) / N, so t = 1 is the noisiest trained step and t = 0 is exactly clean.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def _column(values: Float[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
    return values[:, None, None, None]


@dataclass(frozen=True, eq=False)
class TableSchedule:
    """Variance-preserving schedule of a trained table: alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar).

    Between trained steps alpha_bar is interpolated linearly; alpha_bar(0) = 1.
    Source: Ho et al. 2020 (arXiv:2006.11239), eq. 4.
    """

    alphas_cumprod: Float[Tensor, " N"]

    def alpha_bar(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """alpha_bar at t, in the dtype of t (float32 at least)."""
        table = self.alphas_cumprod.to(device=t.device, dtype=t.dtype)
        table = torch.cat([torch.ones_like(table[:1]), table])
        position = t.clamp(0.0, 1.0) * (len(table) - 1)
        low = position.floor().long().clamp(max=len(table) - 2)
        return torch.lerp(table[low], table[low + 1], position - low)

    def alpha(self, t: Float[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
        """sqrt(alpha_bar)."""
        return _column(self.alpha_bar(t).sqrt())

    def sigma(self, t: Float[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
        """sqrt(1 - alpha_bar)."""
        return _column((1.0 - self.alpha_bar(t)).sqrt())

    def index(self, t: Float[Tensor, " b"]) -> Tensor:
        """The trained step (int64, 0 .. N - 1) nearest to t."""
        steps = len(self.alphas_cumprod)
        return (t * steps).round().long().sub(1).clamp(0, steps - 1)

    def snap(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The nearest t that the network was trained on."""
        return (self.index(t) + 1).to(t.dtype) / len(self.alphas_cumprod)


@dataclass(frozen=True)
class CosineSchedule:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): a smooth closed form for analytic priors and tests."""

    def alpha(self, t: Float[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
        """cos(pi t / 2)."""
        return _column((t * (torch.pi / 2)).cos())

    def sigma(self, t: Float[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
        """sin(pi t / 2)."""
        return _column((t * (torch.pi / 2)).sin())

    def snap(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Every t is allowed."""
        return t


@dataclass(frozen=True)
class FlowSchedule:
    """Rectified flow: alpha = 1 - t, sigma = t.   Liu et al. 2022 (arXiv:2209.03003)."""

    def alpha(self, t: Float[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
        """1 - t."""
        return _column(1.0 - t)

    def sigma(self, t: Float[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
        """T."""
        return _column(t)

    def snap(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Every t is allowed."""
        return t
