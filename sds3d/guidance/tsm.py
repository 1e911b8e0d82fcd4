"""Trajectory score matching."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.guidance.ism import IntervalConfig, interval
from sds3d.guidance.predict import predict
from sds3d.interfaces import Condition, Draw, Residual, Rule, RuleInfo
from sds3d.mathx.ode import ddim_step
from sds3d.mathx.weight import weight

Image = Float[Tensor, "b c h w"]


class TSM(Rule):
    """Trajectory score matching: grad = factor w(t) (eps_hat(x_t; t, y) - eps(x_m; m, null)).

    From one inverted x_s, as in ISM, two steps with the same eps_s lead to x_m and x_t, m = s + ratio (t - s). Ratio 0
    is ISM; ratio 1 compares both prompts at x_t.

    Source: Miao et al. 2024 (Dreamer XL, arXiv:2405.11252), where ratio = gamma = 0.3; the released code uses
    ratio = sqrt(1 - gamma^2) = 0.954.
    """

    info = RuleInfo(
        title="trajectory score matching",
        paper="Miao et al. 2024, arXiv:2405.11252",
        passes="5-9",
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(IntervalConfig):
        """Options of TSM."""

        ratio: float = option(0.3, help="where m lies between s (0) and t (1)", ge=0.0, le=1.0)

    def residual(self, x: Image, draw: Draw, cond: Condition) -> Residual:
        """Grad = factor w (eps_hat - eps_m)."""
        config, schedule, t = self.config, draw.schedule, draw.t
        low, field = interval(config, self.prior, x, draw, cond)
        m = schedule.snap(low.s + config.ratio * (t - low.s))
        x_m = ddim_step(low.x, low.eps, schedule, low.s, m)
        x_t = ddim_step(low.x, low.eps, schedule, low.s, t)
        seen = predict(self.prior, x_t, t, cond, config.cfg_scale)
        w = config.factor * weight(config.weight, draw.alpha, draw.sigma)
        return Residual(grad=w * (seen.guided - field(x_m, m)))
