"""SDS-Bridge: from the prompt's description of the current image to that of the wanted one."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.config.ramp import Ramp
from sds3d.interfaces import Condition, Draw, Residual, Rule, RuleInfo
from sds3d.mathx.weight import WeightName, weight


class Bridge(Rule):
    """SDS-Bridge: grad = w(t) s (eps(plus) - eps(minus)), two descriptions of the same object.

    `minus` describes the flaws of an asset made by SDS, so the rule refines such an asset; it has no restoring force of
    its own. Use it as the last term of a `mix`, after SDS. An empty text stands for the null prompt. Perp-Neg and the
    run's negative prompt play no part.

    Source: McAllister et al. 2024 (arXiv:2406.09417).
    """

    info = RuleInfo(
        title="SDS-Bridge (second stage)",
        paper="McAllister et al. 2024, arXiv:2406.09417",
        passes="2",
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of SDS-Bridge."""

        scale: Ramp = option(
            Ramp.constant(40.0), help="factor s; paper: 40 on images, 1 or 100 in 3D", ge=0.0
        )
        plus: str = option(
            "{prompt}, detailed high resolution, high quality, sharp", help="what the image should become"
        )
        minus: str = option(
            "{prompt}, oversaturated, smooth, pixelated, cartoon, foggy, hazy, blurry, bad structure, noisy, malformed",
            help="what the image is now",
        )
        weight: WeightName = option("uniform", help="w(t) on the eps residual")

    def prompts(self) -> Mapping[str, str]:
        """Both descriptions."""
        return {"bridge_plus": self.config.plus, "bridge_minus": self.config.minus}

    def residual(self, x: Float[Tensor, "b c h w"], draw: Draw, cond: Condition) -> Residual:
        """Grad = w s (eps(plus) - eps(minus))."""
        config = self.config
        told = [
            cond.as_extra(name) if text.strip() else cond.as_null() for name, text in self.prompts().items()
        ]
        plus, minus = self.prior.eps(draw.diffuse(x), draw.t, *told)
        factor = config.scale.at(draw.now) * weight(config.weight, draw.alpha, draw.sigma)
        return Residual(grad=factor * (plus - minus))
