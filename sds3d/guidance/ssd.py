"""Stable score distillation."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.guidance.predict import predict
from sds3d.interfaces import Condition, Draw, Residual, Rule, RuleInfo
from sds3d.mathx.weight import WeightName, weight

DIMS = (1, 2, 3)


def without_noise(
    eps: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], power: int
) -> Float[Tensor, "b c h w"]:
    """Eps - noise <eps, noise> / |noise|^power per view; power 2 is the projection that leaves nothing of the noise."""
    along = (eps * noise).sum(DIMS, keepdim=True)
    length = torch.linalg.vector_norm(noise, dim=DIMS, keepdim=True)
    return eps - along / length**power * noise


class SSD(Rule):
    """Stable score distillation: grad = h = w(t) (eps(y) - eps(null)) above t = M, below it |h| e / |e|.

    e is eps(y) with its part along the noise taken out, per view: at small t the prediction is mostly the noise itself,
    and what is left seeks the mode. Both branches have the length of h. A negative prompt takes the place of the null
    prompt; Perp-Neg terms join h.

    Source: Tang et al. 2023 (arXiv:2312.09305), through a re-implementation whose divisor |e_noise| (not squared) is
    kept as projection `pgc3d`; the paper's own M could not be checked.
    """

    info = RuleInfo(
        title="stable score distillation",
        paper="Tang et al. 2023, arXiv:2312.09305",
        passes="2",
        experimental=True,
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of SSD."""

        threshold: float = option(0.1, help="M: the mode-seeking branch acts at t <= M", ge=0.0, le=1.0)
        projection: Literal["orthogonal", "pgc3d"] = option(
            "orthogonal", help="how the noise is taken out; pgc3d divides by |noise| instead of |noise|^2"
        )
        weight: WeightName = option("sds", help="w(t) on the eps residual")

    def residual(self, x: Float[Tensor, "b c h w"], draw: Draw, cond: Condition) -> Residual:
        """Grad = h, or |h| e / |e| where t <= M; chosen per view."""
        config = self.config
        seen = predict(self.prior, draw.diffuse(x), draw.t, cond, 1.0)
        h = weight(config.weight, draw.alpha, draw.sigma) * (seen.guided - seen.base)
        e = without_noise(seen.text, draw.noise, 2 if config.projection == "orthogonal" else 1)
        size_h, size_e = (torch.linalg.vector_norm(v, dim=DIMS, keepdim=True) for v in (h, e))
        seek = size_h / size_e.clamp(min=1e-12) * e
        return Residual(grad=torch.where((draw.t > config.threshold)[:, None, None, None], h, seek))
