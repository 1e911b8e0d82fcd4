"""Paths of the probability-flow ODE between two diffusion times: inversion upwards, sampling downwards.

In y = x_t / alpha, lambda = sigma / alpha the ODE is dy = eps dlambda, and a stride is Euler's step of it
(`mathx.ode.ddim_step`), on variance-preserving tables and flows alike.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.guidance.predict import predict
from sds3d.interfaces import Condition, Draw, NoiseSchedule, Prior, Told
from sds3d.mathx.ode import ddim_step

Image = Float[Tensor, "b c h w"]
Times = Float[Tensor, " b"]
EpsField = Callable[[Image, Times], Image]

_CRUMB = 1e-3  # a remainder below this share of a stride belongs to the last stride


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """Where a path ends."""

    x: Image
    eps: Image  # each view's prediction at the beginning of its last stride


def eps_of(prior: Prior, told: Told) -> EpsField:
    """The prior's prediction for one bundle: 1 pass per call."""
    return lambda x_t, t: prior.eps(x_t, t, told)[0]


def guided_eps(prior: Prior, cond: Condition, scale: float) -> EpsField:
    """The guided prediction (CFG or Perp-Neg) at any scale, also negative: 2 passes per call (4 with Perp-Neg)."""
    return lambda x_t, t: predict(prior, x_t, t, cond, scale).guided


def noised(x: Image, draw: Draw, t: Times) -> Image:
    """Alpha(t) x + sigma(t) noise at another time than the draw's; exactly x at t = 0."""
    return replace(draw, t=t).diffuse(x)


def stride_times(schedule: NoiseSchedule, start: Times, end: Times, stride: float) -> list[Times]:
    """The times start, start +- stride, ..., end of every view, those between on trained times.

    As many strides as the longest way needs, at least one; views that have arrived stay at `end`.
    """
    way = end - start
    longest = float(way.abs().max())
    count = max(1, math.ceil(longest / stride - _CRUMB))
    times = [start]
    for k in range(1, count + 1):
        arrived = k * stride > way.abs() - _CRUMB * stride
        times.append(torch.where(arrived, end, schedule.snap(start + way.sign() * (k * stride))))
    return times


def follow(x_t: Image, eps: EpsField, schedule: NoiseSchedule, times: Sequence[Times]) -> Arrival:
    """Carry x_t from times[0] to times[-1], one call of `eps` per stride.

    Networks are asked at the nearest trained time; a stride of zero length leaves its view as it is.
    """
    last: Tensor | None = None
    for t, later in pairwise(times):
        seen = eps(x_t, schedule.snap(t))
        moves = (later != t)[:, None, None, None]
        last = seen if last is None else torch.where(moves, seen, last)
        x_t = torch.where(moves, ddim_step(x_t, seen, schedule, t, later), x_t)
    if last is None:
        raise ValueError("a path needs at least two times")
    return Arrival(x=x_t, eps=last)


def integrate(
    x_t: Image, eps: EpsField, schedule: NoiseSchedule, start: Times, end: Times, stride: float
) -> Arrival:
    """Carry x_t from `start` to `end` in strides of at most `stride`: max(1, ceil(|end - start| / stride)) calls."""
    return follow(x_t, eps, schedule, stride_times(schedule, start, end, stride))
