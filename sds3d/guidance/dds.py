"""Delta denoising score: editing by the difference of two predictions."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.errors import ConfigError
from sds3d.guidance.predict import predict
from sds3d.interfaces import Condition, Draw, Prior, Residual, Rule, RuleInfo
from sds3d.mathx.predict import x0_from_eps
from sds3d.mathx.weight import WeightName, weight

Image = Float[Tensor, "b c h w"]
SOURCE = "source"  # name of the prompt that describes the asset that is edited


def clean_pair(
    prior: Prior, x: Image, draw: Draw, cond: Condition, scale: float
) -> tuple[Image, Image, Image]:
    """(source, x0_hat of x under the prompt, x0_hat of source under its own prompt), with one noise for both.

    Perp-Neg is left out on both sides: its negatives belong to the new prompt alone.
    """
    if cond.source is None:
        raise ConfigError("this rule edits an existing asset: set edit.run to the folder of a finished run")
    plain = replace(cond, negatives=None, negative_weights=None)
    before = replace(plain, text=cond.extra[SOURCE])
    clean = []
    for image, known in ((x, plain), (cond.source, before)):
        x_t = draw.diffuse(image)
        eps = predict(prior, x_t, draw.t, known, scale).guided
        clean.append(x0_from_eps(x_t, eps, draw.alpha, draw.sigma))
    return cond.source, clean[0], clean[1]


class DDS(Rule):
    """Delta denoising score: grad = w(t) (eps_hat(x_t; t, y) - eps_hat(source_t; t, y_source)), same noise.

    What the prior says about the unedited asset under its own prompt is error, and is taken off. With clean estimates,
    grad = w (alpha / sigma) (x - target) with target = source + x0_hat(x) - x0_hat(source).

    Source: Hertz et al. 2023 (arXiv:2304.07090).
    """

    info = RuleInfo(
        title="delta denoising score (editing)",
        paper="Hertz et al. 2023, arXiv:2304.07090",
        passes="4",
        needs=("source",),
    )
    has_target = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of DDS."""

        source_prompt: str = option("", help="what the asset that is edited shows; empty = no text")
        cfg_scale: float = option(7.5, help="classifier-free guidance on both sides; 1 = conditional", ge=0.0)
        weight: WeightName = option("uniform", help="w(t) on the eps residual")

    def prompts(self) -> Mapping[str, str]:
        """What the edited asset shows."""
        return {SOURCE: self.config.source_prompt}

    def residual(self, x: Image, draw: Draw, cond: Condition) -> Residual:
        """Grad = w (alpha / sigma) (x - source - x0_hat(x) + x0_hat(source))."""
        source, clean, clean_source = clean_pair(self.prior, x, draw, cond, self.config.cfg_scale)
        target = source + (clean - clean_source)
        pull = weight(self.config.weight, draw.alpha, draw.sigma) * draw.alpha / draw.sigma
        return Residual(grad=pull * (x - target), target=target, weight=pull)
