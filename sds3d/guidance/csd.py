"""Classifier score distillation."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.guidance.predict import predict
from sds3d.interfaces import Condition, Draw, Prior, Residual, Rule
from sds3d.mathx.weight import WeightName, weight


class CSD(Rule):
    """Classifier score distillation: grad = w(t) cfg_scale (eps(x_t; t, y) - eps(x_t; t, null)).

    The part of SDS that knows the prompt, without the noise term: SDS(s) = SDS(1) + (s - 1) CSD(1). With Perp-Neg
    the guided direction replaces the plain difference. With a negative prompt the null branch is the negative one.

    Source: Yu et al. 2023 (arXiv:2310.19415), eq. 6.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of CSD."""

        cfg_scale: float = option(1.0, help="factor on the classifier direction", ge=0.0)
        weight: WeightName = option("sds", help="w(t) on the eps residual")

    def __init__(self, config: Config, prior: Prior) -> None:
        super().__init__()
        self.config, self.prior = config, prior

    def residual(self, x: Float[Tensor, "b c h w"], draw: Draw, cond: Condition) -> Residual:
        """Grad = w (eps_guided - eps_null); CSD has no clean target."""
        a, s = draw.schedule.alpha(draw.t), draw.schedule.sigma(draw.t)
        seen = predict(self.prior, draw.diffuse(x), draw.t, cond, self.config.cfg_scale)
        return Residual(grad=weight(self.config.weight, a, s) * (seen.guided - seen.null))
