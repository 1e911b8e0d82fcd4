"""What the prior thinks after guidance: one batched network call, then CFG or Perp-Neg."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.interfaces import Condition, Prior, Told
from sds3d.mathx.cfg import cfg, perp_neg

Image = Float[Tensor, "b c h w"]


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Noise predictions at (x_t, t), each "b c h w"."""

    base: Image  # what guidance moves away from: negative prompt where given, else null
    text: Image
    guided: Image
    also: tuple[Image, ...] = ()  # the further bundles that were asked for, in order


def predict(
    prior: Prior, x_t: Image, t: Float[Tensor, " b"], cond: Condition, scale: float, *also: Told
) -> Predictions:
    """Eps for base, text and guided (CFG, or Perp-Neg where the condition holds negatives); scale 1 = conditional.

    `also` are further bundles whose prediction is wanted at the same (x_t, t); they ride in the same network call.
    """
    count = 0 if cond.negatives is None else cond.negatives.shape[1]
    told = [cond.as_base(), cond.as_text(), *(cond.as_negative(i) for i in range(count)), *also]
    base, text, *rest = prior.eps(x_t, t, *told)
    negatives, others = rest[:count], tuple(rest[count:])
    if cond.negatives is None or cond.negative_weights is None:
        return Predictions(base=base, text=text, guided=cfg(base, text, scale), also=others)
    guided = perp_neg(base, text, torch.stack(negatives, dim=1), cond.negative_weights, scale)
    return Predictions(base=base, text=text, guided=guided, also=others)
