"""Noise schedules x_t = alpha(t) x + sigma(t) noise on one clock: t in [0, 1], 0 clean, 1 noise.

Notation: alpha_bar_i is the cumulative product of (1 - beta) after i + 1 of N trained steps; step i sits at
t = (i + 1) / N, so t = 1 is the noisiest trained step and t = 0 is exactly clean.

The schedule of a trained network stops just short of alpha = 0, which tables with zero terminal SNR and flows reach
at t = 1: eps says nothing about x0 there (0 / 0), but with alpha = sqrt(machine epsilon) what v-, x0- and
flow-networks say comes back from eps as x0 = (x_t - sigma eps) / alpha. That alpha makes the two errors equal,
rounding and the signal wrongly supposed in x_t: 3e-4 each in float32, 1e-8 in float64. diffusers' Euler sampler has
about the same floor.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


def least_alpha(dtype: torch.dtype) -> float:
    """The least signal level of a trained network's schedule, for algebra in this dtype."""
    return math.sqrt(torch.finfo(dtype).eps)


def _column(values: Float[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
    return values[:, None, None, None]


@dataclass(frozen=True, eq=False)
class TableSchedule:
    """Variance-preserving schedule of a trained table: alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar).

    Between trained steps alpha_bar is interpolated linearly; alpha_bar(0) = 1. A distilled network is good at few
    steps only: `allowed` names them, and `snap` goes to the nearest of them.
    Source: Ho et al. 2020 (arXiv:2006.11239), eq. 4.
    """

    alphas_cumprod: Float[Tensor, " N"]
    allowed: Int[Tensor, " k"] | None = None  # trained steps, 0 .. N - 1; None = all

    def alpha_bar(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """alpha_bar at t, in the dtype of t (float32 at least)."""
        table = self.alphas_cumprod.to(device=t.device, dtype=t.dtype)
        table = torch.cat([torch.ones_like(table[:1]), table])
        position = t.clamp(0.0, 1.0) * (len(table) - 1)
        low = position.floor().long().clamp(max=len(table) - 2)
        return torch.lerp(table[low], table[low + 1], position - low).clamp(min=least_alpha(t.dtype) ** 2)

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
        """The nearest t that the network was trained on; of two equally near allowed ones the noisier."""
        step = self.index(t)
        if self.allowed is not None:
            allowed = self.allowed.to(t.device).sort(descending=True).values
            distance = (t[:, None] * len(self.alphas_cumprod) - 1 - allowed).abs()
            step = allowed[distance.argmin(dim=1)]
        return (step + 1).to(t.dtype) / len(self.alphas_cumprod)


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
    """Rectified flow: alpha = 1 - t, sigma = t.   Liu et al. 2022 (arXiv:2209.03003).

    `trained`: the schedule of a network, which stops just short of t = 1 (see the top of this file); else alpha is
    exactly 0 there.
    """

    trained: bool = False

    def alpha(self, t: Float[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
        """1 - t."""
        return 1.0 - self.sigma(t)

    def sigma(self, t: Float[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
        """T."""
        return _column(t.clamp(max=1.0 - least_alpha(t.dtype)) if self.trained else t)

    def snap(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Every t is allowed."""
        return t
