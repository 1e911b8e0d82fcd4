"""How many prior evaluations a method spends, counted without a network."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.cameras.sample import CameraLaw
from sds3d.interfaces import NoiseSchedule, Prior, Render, Shading, Student, Told
from sds3d.moment import Moment
from sds3d.priors.wrapped import WrappedPrior

if TYPE_CHECKING:
    from sds3d.guide import Guide
    from sds3d.job import JobConfig


class MutePrior(WrappedPrior):
    """A prior that answers zeros and counts the bundles it is asked for; per view, as a bundle covers all views."""

    def __init__(self, inner: Prior) -> None:
        super().__init__(inner)
        self.schedule: NoiseSchedule = inner.schedule
        self.calls = 0.0
        self.views = 0

    def eps(
        self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], *told: Told
    ) -> tuple[Float[Tensor, "b c h w"], ...]:
        """Zeros."""
        self.calls += len(told)
        return tuple(torch.zeros_like(x_t) for _ in told)


@contextmanager
def counted(guide: "Guide") -> Iterator[MutePrior]:
    """The guide's rules ask a mute prior, and their students, while this lasts; all of it is counted.

    A student's pass counts like one of the prior (it is as large), three where it learns from it (forward and twice
    that backward), by the share of the views it is asked about.
    """
    counter = MutePrior(guide.prior)
    rules = [part for term in guide.terms for part in term.rule.modules()]
    owners = [part for part in rules if hasattr(part, "prior")]
    students = [part for part in rules if isinstance(part, Student)]

    def watch(student: Student) -> None:
        ask = student.eps

        def eps(x_t: Tensor, t: Tensor, *told: Told) -> tuple[Tensor, ...]:
            share = len(x_t) / max(counter.views, 1)
            counter.calls += len(told) * share * (3 if torch.is_grad_enabled() else 1)
            return ask(x_t, t, *told)

        student.eps = eps  # type: ignore[method-assign]

    for part in owners:
        part.prior = counter  # type: ignore[assignment]
    for student in students:
        watch(student)
    try:
        yield counter
    finally:
        for part in owners:
            part.prior = guide.prior  # type: ignore[assignment]
        for student in students:
            del student.eps


def count_passes(guide: "Guide", job: "JobConfig", samples: int = 24) -> float:
    """Mean prior evaluations per view and optimisation step over the run, from `samples` moments with a mute prior.

    The guide's rules are asked for residuals on blank renders; their own parameters do not learn.
    """
    law, hold = CameraLaw(job.camera), job.camera.hold_steps
    with counted(guide) as counter:
        for index in range(samples):
            step = index * job.steps // samples
            now = Moment(step, job.steps)
            cameras = law.sample(now, guide.streams.stream("count", step)).to(guide.prior.device)
            counter.views = len(cameras)
            size = (len(cameras), 1, cameras.height_px, cameras.width_px)
            blank = torch.ones(size, device=guide.prior.device)
            view = Render(rgb=blank.expand(-1, 3, -1, -1), alpha=blank, depth=blank)
            x = guide.prior.encode(view.rgb)
            background = torch.ones(len(cameras), 3, device=guide.prior.device)
            cond = guide.bank.for_views(cameras, Shading(background=background))
            draw = guide.draw(view, x, cameras, now)
            for term in guide.terms:
                if term.acts(now):
                    term.rule.residual(x, draw, cond)
    return counter.calls / samples / hold
