"""Time laws: which diffusion time t a step uses. Each is one small class and one table line."""

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.config.ramp import Ramp
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


TIME_LAWS: dict[str, type] = {"annealed": AnnealedTime, "uniform": UniformTime}
