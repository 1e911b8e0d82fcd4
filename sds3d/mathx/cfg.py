"""Mixing noise predictions of several conditions. Scale 0 is the null prediction, 1 the conditional one."""

from jaxtyping import Float
from torch import Tensor

Image = Float[Tensor, "b c h w"]


def cfg(eps_null: Image, eps_text: Image, scale: float) -> Image:
    """eps_null + scale (eps_text - eps_null).   Ho & Salimans 2022 (arXiv:2207.12598), eq. 6 with w = scale - 1."""
    return eps_null + scale * (eps_text - eps_null)


def _perpendicular(d: Image, reference: Image) -> Image:
    """The part of d at right angles to `reference`, per sample; all of d where the reference vanishes."""
    dims = (1, 2, 3)
    square = reference.square().sum(dims, keepdim=True)
    along = (d * reference).sum(dims, keepdim=True) / square.clamp(min=1e-6)
    return d - along * reference


def perp_neg(
    eps_null: Image,
    eps_text: Image,
    eps_negatives: Float[Tensor, "b k c h w"],
    weights: Float[Tensor, "b k"],
    scale: float,
) -> Image:
    """eps_null + scale (d + sum_i w_i perp(d_i, d)), d = eps_text - eps_null, d_i = eps_neg_i - eps_null.

    `weights` are negative numbers for things to avoid. With all negatives parallel to d this is `cfg`.
    Source: Armandpour et al. 2023 (arXiv:2304.04968), eq. 6.
    """
    direction = eps_text - eps_null
    mixed = direction
    for i in range(eps_negatives.shape[1]):
        away = _perpendicular(eps_negatives[:, i] - eps_null, direction)
        mixed = mixed + weights[:, i, None, None, None] * away
    return eps_null + scale * mixed


def rescale(x0_mixed: Image, x0_text: Image, strength: float) -> Image:
    """x0 (strength std(x0_text) / std(x0_mixed) + 1 - strength), std per sample; tames over-saturation.

    Source: Lin et al. 2023 (arXiv:2305.08891), eq. 15-16.
    """
    dims = (1, 2, 3)
    factor = x0_text.std(dims, keepdim=True) / x0_mixed.std(dims, keepdim=True)
    return x0_mixed * (strength * factor + 1.0 - strength)
