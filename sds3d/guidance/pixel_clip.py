"""Pixel-wise gradient clipping."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class _PixelClip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rgb: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return rgb.view_as(rgb)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        largest = grad.abs().amax(dim=1, keepdim=True)
        return grad * (ctx.limit / largest.clamp(min=1e-30)).clamp(max=1.0), None


def clip_pixel_gradient(rgb: Float[Tensor, "b 3 H W"], limit: float) -> Float[Tensor, "b 3 H W"]:
    """Identity whose gradient at each pixel is scaled by min(1, limit / max_c |g_c|): bounded, same direction.

    Source: Pan et al. 2024 (PGC-3D, arXiv:2310.12474), eq. 8.
    """
    return _PixelClip.apply(rgb, limit)
