"""Any variance-preserving prior seen as a rectified flow."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.errors import PriorError
from sds3d.interfaces import NoiseSchedule, ParamGroup, Prior, Student, Teacher, Told
from sds3d.mathx.schedule import FlowSchedule
from sds3d.priors.wrapped import WrappedPrior
from sds3d.rng import Stream

NODES = 4001  # of the table that finds times; holds every step of schedules with 1000, 2000 or 4000 of them
POLISH = 6  # corrections of the table's answer, each gains three digits


class VPTime:
    """Finds the time of a variance-preserving schedule at which the angle atan2(sigma, alpha) has a given value."""

    def __init__(self, schedule: NoiseSchedule, device: torch.device) -> None:
        self.schedule = schedule
        self.times = torch.linspace(0.0, 1.0, NODES, dtype=torch.float64, device=device)
        self.angles = self.angle(self.times)

    def angle(self, t: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The angle at t; rises from 0 at t = 0."""
        return torch.atan2(self.schedule.sigma(t), self.schedule.alpha(t)).flatten()

    def __call__(self, angle: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The time of an angle, in float64; 1 where the schedule never gets so noisy."""
        angle = angle.double()
        upper = torch.searchsorted(self.angles, angle).clamp(1, NODES - 1)
        low, high = self.times[upper - 1], self.times[upper]
        slope = (high - low) / (self.angles[upper] - self.angles[upper - 1])
        t = torch.lerp(low, high, 0.5)
        for _ in range(POLISH):
            t = (t + (angle - self.angle(t)) * slope).clamp(low, high)
        return t


@dataclass(frozen=True, kw_only=True)
class FlowViewSchedule(FlowSchedule):
    """Rectified flow whose trained times are those of the schedule behind it."""

    vp_time: VPTime

    def to_vp(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The time with the same sigma / alpha, in float64."""
        t = t.double()
        return self.vp_time(torch.atan2(t, 1.0 - t))

    def from_vp(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """T = sigma / (sigma + alpha) at a time of the schedule behind it."""
        sigma, alpha = self.vp_time.schedule.sigma(t), self.vp_time.schedule.alpha(t)
        return (sigma / (sigma + alpha)).flatten()

    def snap(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The flow time of the nearest trained time (nearest on the other schedule's clock)."""
        return self.from_vp(self.vp_time.schedule.snap(self.to_vp(t))).to(t.dtype)

    def equivalent(
        self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, " b"]]:
        """The sample of the schedule behind it with the same image and noise, and its time."""
        return x_t / torch.hypot(self.alpha(t), self.sigma(t)), self.to_vp(t).to(t.dtype)


class FlowView(WrappedPrior):
    """A variance-preserving prior as its equivalent rectified flow x_f = (1 - t) x + t noise.

    x_f / sqrt((1 - t)^2 + t^2) is a sample of the wrapped prior at the time where sigma / alpha = t / (1 - t), with the
    same noise; so eps is the same, and the ODE of both has the same paths.
    """

    def __init__(self, inner: Prior) -> None:
        super().__init__(inner)
        self.schedule = FlowViewSchedule(vp_time=VPTime(inner.schedule, inner.device))

    def eps(
        self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], *told: Told
    ) -> tuple[Float[Tensor, "b c h w"], ...]:
        """The wrapped prior's predictions at the equivalent sample and time."""
        return self.inner.eps(*self.schedule.equivalent(x_t, t), *told)

    def student(self, *, rank: int, lr: float, convolutions: bool, stream: Stream) -> Student:
        """A student of the wrapped prior, seen as a flow too; PriorError where that prior gives none."""
        if not isinstance(self.inner, Teacher):
            raise PriorError("prior.as_flow: the model behind it can carry no student; use a UNet prior")
        student = self.inner.student(rank=rank, lr=lr, convolutions=convolutions, stream=stream)
        return FlowStudent(student, self.schedule)


class FlowStudent(Student):
    """A student of a variance-preserving prior, asked at flow times."""

    def __init__(self, inner: Student, schedule: FlowViewSchedule) -> None:
        super().__init__()
        self.inner, self.schedule = inner, schedule

    def eps(
        self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], *told: Told
    ) -> tuple[Float[Tensor, "b c h w"], ...]:
        """The wrapped student's predictions at the equivalent sample and time."""
        return self.inner.eps(*self.schedule.equivalent(x_t, t), *told)

    def groups(self) -> Sequence[ParamGroup]:
        """As the wrapped student's."""
        return self.inner.groups()
