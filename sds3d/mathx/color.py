"""sRGB and linear light; the transfer functions of IEC 61966-2-1."""

import torch
from jaxtyping import Float
from torch import Tensor


def to_linear(srgb: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Linear light of sRGB values in [0, 1]."""
    low = srgb / 12.92
    high = ((srgb.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4
    return torch.where(srgb <= 0.04045, low, high)


def to_srgb(linear: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """SRGB of linear light; values above 1 stay above 1."""
    low = linear * 12.92
    high = 1.055 * linear.clamp(min=0.0031308) ** (1.0 / 2.4) - 0.055
    return torch.where(linear <= 0.0031308, low, high)
