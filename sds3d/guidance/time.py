"""Time laws: which diffusion time t a step uses. Each is one small class and one table line."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.config.ramp import Ramp
from sds3d.errors import ConfigError
from sds3d.moment import Moment
from sds3d.rng import Stream


class TimeLaw(Protocol):
    """Draws t in [0, 1] for b views."""

    def sample(self, now: Moment, views: int, stream: Stream) -> Float[Tensor, " b"]: ...


class UniformTime:
    """t uniform in [low, high], both of which may move over the run: plain, hard switch or annealed."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of the uniform law."""

        low: Ramp = option(Ramp.constant(0.02), help="smallest t", ge=0.0, le=1.0)
        high: Ramp = option(Ramp.constant(0.98), help="largest t", ge=0.0, le=1.0)
        per_view: bool = option(True, help="draw one t per view; otherwise one for the whole batch")

    def __init__(self, config: Config) -> None:
        self.config = config

    def sample(self, now: Moment, views: int, stream: Stream) -> Float[Tensor, " b"]:
        """Low + (high - low) U."""
        low, high = self.config.low.at(now), self.config.high.at(now)
        u = stream.uniform(views if self.config.per_view else 1)
        return (low + (high - low) * u).expand(views).clone()


class AnnealedTime:
    """One deterministic t per step that follows a ramp, e.g. 0.98 -> 0.3 with shape sqrt (HiFA, arXiv:2305.18766)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of the annealed law."""

        t: Ramp = option(Ramp(start=0.98, end=0.3, shape="sqrt"), help="t over the run", ge=0.0, le=1.0)
        spread: float = option(0.0, help="uniform jitter of +- this much per view", ge=0.0, le=0.5)

    def __init__(self, config: Config) -> None:
        self.config = config

    def sample(self, now: Moment, views: int, stream: Stream) -> Float[Tensor, " b"]:
        """ramp(now) + spread (2U - 1), kept in [0.001, 1]."""
        jitter = (2.0 * stream.uniform(views) - 1.0) * self.config.spread
        return (torch.full((views,), self.config.t.at(now)) + jitter).clamp(0.001, 1.0)


class WarmupTime:
    """t uniform in [low, high + extra], where extra shrinks to 0; one t per batch (ISM family, arXiv:2311.11284)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of the warm-up law."""

        low: float = option(0.02, help="smallest t", ge=0.0, le=1.0)
        high: float = option(0.5, help="largest t after the warm-up", ge=0.0, le=1.0)
        extra: Ramp = option(
            Ramp(start=0.48, end=0.0, over_steps=(0, 1500)), help="added to high", ge=0.0, le=1.0
        )
        per_view: bool = option(False, help="draw one t per view; otherwise one for the whole batch")

    def __init__(self, config: Config) -> None:
        self.config = config

    def sample(self, now: Moment, views: int, stream: Stream) -> Float[Tensor, " b"]:
        """Low + (high + extra - low) U, at most 1."""
        config = self.config
        high = min(config.high + config.extra.at(now), 1.0)
        u = stream.uniform(views if config.per_view else 1)
        return (config.low + (high - config.low) * u).expand(views).clone()


class DreamTime:
    """One falling t per step that dwells where a density W(t) is high (DreamTime, arXiv:2306.12422).

    W = 1 in [m2, m1], exp(-(t - m1)^2 / (2 s1^2)) above and exp(-(t - m2)^2 / (2 s2^2)) below; t at progress p is where
    the share of W that lies at or above t is closest to p.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of the DreamTime law."""

        m1: float = option(0.8, help="upper end of the plateau of W", ge=0.0, le=1.0)
        m2: float = option(0.5, help="lower end of the plateau of W", ge=0.0, le=1.0)
        s1: float = option(0.3, help="width of W above m1", ge=1e-3)
        s2: float = option(0.1, help="width of W below m2", ge=1e-3)
        low: float = option(0.02, help="smallest t", ge=0.0, le=1.0)
        high: float = option(0.98, help="largest t", ge=0.0, le=1.0)
        halved: bool = option(True, help="the factor 1/2 in the exponents; false as in CFD's code")

        def __post_init__(self) -> None:
            if self.m2 > self.m1:
                raise ConfigError(f"m2 = {self.m2} is above m1 = {self.m1}, expected m2 <= m1")
            if self.low > self.high:
                raise ConfigError(f"low = {self.low} is above high = {self.high}, expected low <= high")

    def __init__(self, config: Config) -> None:
        self.times = torch.arange(round(1000 * config.low), round(1000 * config.high) + 1).double() / 1000
        above, below = (self.times - config.m1).clamp(min=0.0), (config.m2 - self.times).clamp(min=0.0)
        factor = 0.5 if config.halved else 1.0
        density = torch.exp(-factor * ((above / config.s1).square() + (below / config.s2).square()))
        share = density / density.sum()
        self.reached = share.flip(0).cumsum(0).flip(0)  # share of W at or above each time

    def sample(self, now: Moment, views: int, stream: Stream) -> Float[Tensor, " b"]:
        """argmin_t |sum_(t' >= t) W(t') - progress|."""
        nearest = int((self.reached - now.progress).abs().argmin())
        return torch.full((views,), float(self.times[nearest]))


class PiecewiseTime:
    """One falling t per step: 0.98 - 0.96 p, with p linear between knots (CFD, arXiv:2501.05445)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of the piecewise law."""

        knots: tuple[tuple[float, float], ...] = option(
            ((0.0, 0.0), (0.1, 0.3), (0.5, 0.6), (1.0, 0.8)),
            help="list of [fraction of the run, p]; constant before the first and after the last",
            ge=0.0,
            le=1.0,
        )

        def __post_init__(self) -> None:
            if not self.knots:
                raise ConfigError("knots: empty, expected a list of [fraction of the run, p]")
            if any(b[0] <= a[0] or b[1] < a[1] for a, b in pairwise(self.knots)):
                raise ConfigError(
                    "knots: expected rising fractions with p that never falls, so that t never rises"
                )

    def __init__(self, config: Config) -> None:
        self.config = config

    def sample(self, now: Moment, views: int, stream: Stream) -> Float[Tensor, " b"]:
        """0.98 - 0.96 p(progress)."""
        return torch.full((views,), 0.98 - 0.96 * self.position(now.progress))

    def position(self, progress: float) -> float:
        """The progress p at a fraction of the run."""
        knots = self.config.knots
        if progress <= knots[0][0]:
            return knots[0][1]
        for (x0, p0), (x1, p1) in pairwise(knots):
            if progress <= x1:
                return p0 + (p1 - p0) * (progress - x0) / (x1 - x0)
        return knots[-1][1]


class DescendingTime:
    """The lower t' of a pair of times, falling as a square root; rules add the gap (CDS, arXiv:2401.09050)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of the descending law."""

        t: Ramp = option(Ramp(start=0.7, end=0.1, shape="sqrt"), help="t' over the run", ge=0.0, le=1.0)

    def __init__(self, config: Config) -> None:
        self.config = config

    def sample(self, now: Moment, views: int, stream: Stream) -> Float[Tensor, " b"]:
        """The ramp at this moment, the same for all views."""
        return torch.full((views,), self.config.t.at(now))


def shift_time(u: Float[Tensor, " b"], shift: float) -> Float[Tensor, " b"]:
    """Flow shift t = shift u / (1 + (shift - 1) u): more time at high noise where shift > 1; FLUX's e^mu is a shift.

    Source: Esser et al. 2024 (SD3, arXiv:2403.03206).
    """
    return shift * u / (1.0 + (shift - 1.0) * u)


class LogitNormalTime:
    """t = shift(sigmoid(mean + std n)), n normal: the density flow models are trained with (SD3, arXiv:2403.03206)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of the logit-normal law."""

        mean: float = option(0.0, help="of the logit, before the shift")
        std: float = option(1.0, help="of the logit", ge=0.0)
        shift: float = option(1.0, help="flow shift: 1 = none, 3 = SD3", ge=1e-3)
        low: float = option(0.001, help="smallest t", ge=0.0, le=1.0)
        high: float = option(0.999, help="largest t", ge=0.0, le=1.0)
        per_view: bool = option(True, help="draw one t per view; otherwise one for the whole batch")

    def __init__(self, config: Config) -> None:
        self.config = config

    def sample(self, now: Moment, views: int, stream: Stream) -> Float[Tensor, " b"]:
        """shift(sigmoid(mean + std n)), kept in [low, high]."""
        config = self.config
        n = stream.normal(views if config.per_view else 1)
        t = shift_time((config.mean + config.std * n).sigmoid(), config.shift)
        return t.clamp(config.low, config.high).expand(views).clone()


class ShiftedTime:
    """t = shift(u), u uniform in [low, high]: uniform in the index of a flow schedule (RFDS, arXiv:2406.03293)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of the shifted law."""

        low: Ramp = option(
            Ramp.constant(0.02), help="smallest u; index i of 1000 is u = 1 - i/1000", ge=0.0, le=1.0
        )
        high: Ramp = option(Ramp.constant(0.7), help="largest u", ge=0.0, le=1.0)
        shift: float = option(3.0, help="flow shift: 1 = none, 3 = SD3", ge=1e-3)
        per_view: bool = option(True, help="draw one t per view; otherwise one for the whole batch")

    def __init__(self, config: Config) -> None:
        self.config = config

    def sample(self, now: Moment, views: int, stream: Stream) -> Float[Tensor, " b"]:
        """shift(low + (high - low) U)."""
        low, high = self.config.low.at(now), self.config.high.at(now)
        u = low + (high - low) * stream.uniform(views if self.config.per_view else 1)
        return shift_time(u, self.config.shift).expand(views).clone()


TIME_LAWS: dict[str, type] = {
    "annealed": AnnealedTime,
    "descending": DescendingTime,
    "dreamtime": DreamTime,
    "logit_normal": LogitNormalTime,
    "piecewise": PiecewiseTime,
    "shifted": ShiftedTime,
    "uniform": UniformTime,
    "warmup": WarmupTime,
}
