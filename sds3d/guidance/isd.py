"""Image-prompt score distillation with a control variate."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.interfaces import Condition, Draw, Residual, Rule, RuleInfo
from sds3d.mathx.cfg import cfg
from sds3d.mathx.weight import WeightName, weight


class ISD(Rule):
    """Image-prompt distillation: grad = w(t) (eps_hat(x_t; y, image) - [noise + v (eps(x_t; y) - noise)]).

    The prior sees prompt and image prompt; the same prior without the image is a control variate with coefficient v:
    v = 0 is image-prompted SDS, v = 1 subtracts the text-only prediction, which removes most of the noise.

    Source: ModeDreamer 2024 (arXiv:2411.18135) for the idea; no code is public, so scale, weight and coefficient are
    ours, hence experimental.
    """

    info = RuleInfo(
        title="image-prompt score distillation",
        paper="ModeDreamer 2024, arXiv:2411.18135",
        passes="3",
        experimental=True,
        needs=("image prompt",),
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of ISD."""

        cfg_scale: float = option(7.5, help="classifier-free guidance of the image-prompted branch", ge=0.0)
        variate: float = option(1.0, help="coefficient v of the control variate", ge=0.0, le=1.0)
        weight: WeightName = option("sds", help="w(t) on the eps residual")

    def residual(self, x: Float[Tensor, "b c h w"], draw: Draw, cond: Condition) -> Residual:
        """Grad = w (guided - (1 - v) noise - v e_y)."""
        config = self.config
        told = (cond.as_base(), cond.as_image(), *([cond.as_text()] if config.variate > 0 else []))
        base, seen, *text = self.prior.eps(draw.diffuse(x), draw.t, *told)
        reference = draw.noise
        if text:
            reference = reference + config.variate * (text[0] - draw.noise)
        guided = cfg(base, seen, config.cfg_scale)
        return Residual(grad=weight(config.weight, draw.alpha, draw.sigma) * (guided - reference))
