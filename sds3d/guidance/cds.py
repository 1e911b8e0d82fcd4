"""Consistency distillation sampling."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.config.ramp import Ramp
from sds3d.guidance.predict import predict
from sds3d.guidance.trajectory import noised
from sds3d.interfaces import Condition, Draw, Residual, Rule, RuleInfo
from sds3d.mathx.cfg import rescale
from sds3d.mathx.ode import ddim_step
from sds3d.mathx.predict import eps_from_x0, x0_from_eps
from sds3d.mathx.weight import WeightName, weight

Image = Float[Tensor, "b c h w"]


class CDS(Rule):
    """Consistency distillation sampling: grad = w(t) (eps_hat(x_t; t, y) - eps_hat(x_t'; t', y)), t' < t.

    x_t = alpha x + sigma noise and x_t' is one guided DDIM step down from it. The time law gives t', and t = t' + gap
    + perturb U. Meant for one fixed noise image (`noise: {kind: fixed}`) and a falling t'. With `cfg_rescale` the step
    and the first term use the std-rescaled prediction e, which leaves (lambda_t / lambda_t') (eps_hat - e) over.

    Source: Wu et al. 2024 (Consistent3D, arXiv:2401.09050); coefficients as in the released code.
    """

    info = RuleInfo(
        title="consistency distillation sampling",
        paper="Wu et al. 2024, arXiv:2401.09050",
        passes="4",
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of CDS."""

        cfg_scale: Ramp = option(
            Ramp(start=101.0, end=51.0), help="classifier-free guidance; 1 = conditional", ge=0.0
        )
        gap: float = option(0.1, help="smallest t - t'", ge=0.0, le=1.0)
        perturb: float = option(0.2, help="t - t' is uniform in [gap, gap + perturb)", ge=0.0, le=1.0)
        highest: float = option(0.98, help="largest t", ge=0.0, le=0.999)
        cfg_rescale: float = option(0.0, help="share of the std-rescaled prediction", ge=0.0, le=1.0)
        weight: WeightName = option("uniform", help="w on the eps residual, taken at the upper time")

    def residual(self, x: Image, draw: Draw, cond: Condition) -> Residual:
        """Grad = w(t) (eps_1 - eps_2)."""
        config, schedule, lower = self.config, draw.schedule, draw.t
        scale = config.cfg_scale.at(draw.now)
        gap = config.gap + config.perturb * draw.stream.fork("gap").uniform(1, device=lower.device).to(lower)
        upper = schedule.snap((lower + gap).clamp(max=config.highest)).maximum(lower)
        a, s = schedule.alpha(upper), schedule.sigma(upper)
        x_t = noised(x, draw, upper)
        first = predict(self.prior, x_t, upper, cond, scale)
        eps, left_over = first.guided, torch.zeros_like(x)
        if config.cfg_rescale > 0:
            plain, text = (x0_from_eps(x_t, each, a, s) for each in (first.guided, first.text))
            eps = eps_from_x0(x_t, rescale(plain, text, config.cfg_rescale), a, s)
            left_over = s * draw.alpha / (a * draw.sigma) * (first.guided - eps)
        x_lower = ddim_step(x_t, eps, schedule, upper, lower)
        second = predict(self.prior, x_lower, lower, cond, scale)
        return Residual(grad=weight(config.weight, a, s) * (eps - second.guided + left_over))
