"""How many prior evaluations a method spends, counted without a network."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.interfaces import NoiseSchedule, Prior, Render, Shading, Told

if TYPE_CHECKING:
    from sds3d.guide import Guide
    from sds3d.job import JobConfig


class CountingPrior:
    """A prior that counts the bundles it is asked for; per view, as every bundle covers all views.

    With `mute` it answers zeros instead of asking the network.
    """

    def __init__(self, prior: Prior, *, mute: bool = False) -> None:
        self.inner, self.mute, self.calls = prior, mute, 0
        self.device, self.shape, self.image_px = prior.device, prior.shape, prior.image_px

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    @property
    def schedule(self) -> NoiseSchedule:
        """That of the prior."""
        return self.inner.schedule

    def encode_text(self, prompts: Sequence[str]) -> Float[Tensor, "p n d"]:
        """As the prior does."""
        return self.inner.encode_text(prompts)

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """As the prior does."""
        return self.inner.warnings(prompts)

    def encode(self, rgb: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """As the prior does."""
        return self.inner.encode(rgb)

    def decode(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """As the prior does."""
        return self.inner.decode(x)

    def eps(
        self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], *told: Told
    ) -> tuple[Float[Tensor, "b c h w"], ...]:
        """Counts, then asks the prior or answers zeros."""
        self.calls += len(told)
        if self.mute:
            return tuple(torch.zeros_like(x_t) for _ in told)
        return self.inner.eps(x_t, t, *told)


def count_passes(guide: "Guide", job: "JobConfig", samples: int = 24) -> float:
    """Mean prior evaluations per view and optimisation step over the run, from `samples` moments with a mute prior.

    The guide's rules are asked for residuals on blank renders; their own parameters do not learn.
    """
    from sds3d.cameras.sample import CameraLaw
    from sds3d.moment import Moment

    counter = CountingPrior(guide.prior, mute=True)
    law, hold = CameraLaw(job.camera), job.camera.hold_steps
    for term in guide.terms:
        for part in term.rule.modules():
            if hasattr(part, "prior"):
                part.prior = counter  # type: ignore[assignment]
    try:
        for index in range(samples):
            step = index * job.steps // samples
            now = Moment(step, job.steps)
            cameras = law.sample(now, guide.streams.stream("count", step)).to(guide.prior.device)
            size = (len(cameras), 1, cameras.height_px, cameras.width_px)
            blank = torch.ones(size, device=guide.prior.device)
            view = Render(rgb=blank.expand(-1, 3, -1, -1), alpha=blank, depth=blank)
            x = guide.prior.encode(view.rgb)
            cond = guide.bank.for_views(cameras, Shading(background=torch.ones(len(cameras), 3)))
            for number, term in enumerate(guide.terms):
                if term.acts(now):
                    term.rule.residual(x, guide.draw(view, x, cameras, now, number), cond)
    finally:
        for term in guide.terms:
            for part in term.rule.modules():
                if hasattr(part, "prior"):
                    part.prior = guide.prior  # type: ignore[assignment]
    return counter.calls / samples / hold
