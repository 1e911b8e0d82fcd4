"""Classifier score distillation with its four coefficients."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.config.ramp import Ramp
from sds3d.guidance.predict import predict
from sds3d.interfaces import Condition, Draw, Residual, Rule, RuleInfo
from sds3d.mathx.weight import WeightName, weight


class CSD(Rule):
    """Classifier score distillation: grad = w(t) (c eps(y) + n eps(negative) + u eps(null) - k noise).

    The default (c, n, u, k) = (1, 0, -1, 0) is the classifier direction alone; (s, 0, 1 - s, 1) is SDS at scale s, and
    (1, -v, v - 1, 0) moves away from a negative prompt. Without a negative prompt eps(negative) = eps(null). With
    Perp-Neg the text direction, measured from the negative prompt where there is one, gains its perpendicular terms.

    Source: Yu et al. 2023 (arXiv:2310.19415), eq. 6 and 11.
    """

    info = RuleInfo(
        title="classifier score distillation",
        paper="Yu et al. 2023, arXiv:2310.19415",
        passes="2 (3 with a negative prompt)",
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of CSD."""

        text: Ramp = option(Ramp.constant(1.0), help="coefficient of the prompt's prediction")
        negative: Ramp = option(Ramp.constant(0.0), help="coefficient of the negative prompt's prediction")
        null: Ramp = option(Ramp.constant(-1.0), help="coefficient of the empty prompt's prediction")
        noise: float = option(0.0, help="coefficient of minus the noise; 1 = as in SDS")
        weight: WeightName = option("sds", help="w(t) on the eps residual")

    def residual(self, x: Float[Tensor, "b c h w"], draw: Draw, cond: Condition) -> Residual:
        """Grad = w (c e_y + n e_neg + u e_0 - k noise); CSD has no clean target."""
        config = self.config
        also = () if cond.negative is None else (cond.as_null(),)
        seen = predict(self.prior, draw.diffuse(x), draw.t, cond, 1.0, *also)
        null = seen.also[0] if also else seen.base
        c, n, u = (ramp.at(draw.now) for ramp in (config.text, config.negative, config.null))
        mixed = c * seen.guided + n * seen.base + u * null - config.noise * draw.noise
        return Residual(grad=weight(config.weight, draw.alpha, draw.sigma) * mixed)
