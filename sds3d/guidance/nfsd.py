"""Noise-free score distillation."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.guidance.predict import predict
from sds3d.interfaces import Condition, Draw, Residual, Rule, RuleInfo
from sds3d.mathx.weight import WeightName, weight


class NFSD(Rule):
    """Noise-free score distillation: grad = w(t) (delta_D + s (eps(y) - eps(null))), delta_D without the noise.

    delta_D = eps(null) at small t, where the predicted noise is small, and eps(null) - eps(negative) above, where a
    prompt for bad images stands for the residual of an image that is off the data. The rule has its own negative
    prompt; the run's negative prompt plays no part. Perp-Neg terms join the text direction.

    Source: Katzir et al. 2023 (NFSD, arXiv:2310.17590).
    """

    info = RuleInfo(
        title="noise-free score distillation",
        paper="Katzir et al. 2023, arXiv:2310.17590",
        passes="3 (2 with an empty negative)",
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of NFSD."""

        scale: float = option(7.5, help="factor s on the text direction eps(y) - eps(null)", ge=0.0)
        negative: str = option(
            "unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark, low-resolution, gloomy",
            help="prompt of bad images; {prompt} stands for the run's prompt",
        )
        switch: float = option(0.2, help="t below which delta_D = eps(null)", ge=0.0, le=1.0)
        weight: WeightName = option("sds", help="w(t) on the eps residual")

    def prompts(self) -> Mapping[str, str]:
        """The prompt of bad images."""
        return {"nfsd_negative": self.config.negative}

    def residual(self, x: Float[Tensor, "b c h w"], draw: Draw, cond: Condition) -> Residual:
        """Grad = w (delta_D + s delta_C), delta_D chosen per view by its t."""
        config = self.config
        known = replace(cond, negative=None)  # the text direction starts at the null prompt
        # Seen without camera, like every negative: the direction away from it must not point away from the view.
        bad = replace(cond.as_extra("nfsd_negative"), cameras=None)
        also = (bad,) if config.negative.strip() else ()
        seen = predict(self.prior, draw.diffuse(x), draw.t, known, 1.0, *also)
        negative = seen.also[0] if also else seen.base
        early = (draw.t < config.switch)[:, None, None, None]
        domain = torch.where(early, seen.base, seen.base - negative)
        mixed = domain + config.scale * (seen.guided - seen.base)
        return Residual(grad=weight(config.weight, draw.alpha, draw.sigma) * mixed)
