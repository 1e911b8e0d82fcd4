"""What the prior thinks after guidance: one batched network call, then CFG or Perp-Neg."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.interfaces import Condition, Prior
from sds3d.mathx.cfg import cfg, perp_neg

Image = Float[Tensor, "b c h w"]


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Noise predictions at (x_t, t), each "b c h w"."""

    null: Image
    text: Image
    guided: Image


def predict(prior: Prior, x_t: Image, t: Float[Tensor, " b"], cond: Condition, scale: float) -> Predictions:
    """Eps for null, text and guided (CFG, or Perp-Neg where the condition holds negatives); scale 1 = conditional."""
    count = 0 if cond.negatives is None else cond.negatives.shape[1]
    told = [cond.as_null(), cond.as_text(), *(cond.as_negative(i) for i in range(count))]
    null, text, *negatives = prior.eps(x_t, t, *told)
    if cond.negatives is None or cond.negative_weights is None:
        return Predictions(null=null, text=text, guided=cfg(null, text, scale))
    guided = perp_neg(null, text, torch.stack(negatives, dim=1), cond.negative_weights, scale)
    return Predictions(null=null, text=text, guided=guided)
