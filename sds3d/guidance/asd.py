"""Asynchronous score distillation."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.config.ramp import Ramp
from sds3d.guidance.predict import predict
from sds3d.interfaces import Condition, Draw, Residual, Rule, RuleInfo
from sds3d.mathx.weight import WeightName, weight

LAST = 0.999  # the noisiest time that is asked for


class ASD(Rule):
    """Asynchronous score distillation: grad = w(t) (eps_hat(x_t; t, y) - eps(x_t'; t', y)), t' = t + delta, same noise.

    The conditional prediction at a slightly noisier time takes the place of VSD's trained score: it errs less there.
    delta = U min(eta (t - t_min), 0.999 - t) with one U in [0, 1) per step, so that the gradient of a view does not
    depend on its place in the batch.

    Source: Ma et al. 2024 (ScaleDreamer, arXiv:2407.02040).
    """

    info = RuleInfo(
        title="asynchronous score distillation",
        paper="Ma et al. 2024, arXiv:2407.02040",
        passes="3",
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of ASD."""

        cfg_scale: float = option(7.5, help="classifier-free guidance at t; 1 = conditional", ge=0.0)
        eta: float = option(0.1, help="largest delta as a share of t - t_min", ge=0.0, le=1.0)
        t_min: Ramp = option(
            Ramp.constant(0.02), help="where delta is 0; the smallest t of the time law", ge=0.0, le=1.0
        )
        weight: WeightName = option("sds", help="w(t) on the eps residual")

    def residual(self, x: Float[Tensor, "b c h w"], draw: Draw, cond: Condition) -> Residual:
        """Grad = w (eps_hat(t) - eps_y(t')); no clean target."""
        config, t = self.config, draw.t
        u = draw.stream.fork("asd").uniform(1, device=t.device).to(t)
        gap = torch.minimum(config.eta * (t - config.t_min.at(draw.now)), LAST - t).clamp(min=0.0)
        later = replace(draw, t=draw.schedule.snap(t + u * gap))
        seen = predict(self.prior, draw.diffuse(x), t, cond, config.cfg_scale)
        (noisier,) = self.prior.eps(later.diffuse(x), later.t, cond.as_text())
        return Residual(grad=weight(config.weight, draw.alpha, draw.sigma) * (seen.guided - noisier))
