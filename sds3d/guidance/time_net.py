"""A small convolutional network that knows the diffusion time, for rules that learn a function of (image, t)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sds3d.rng import Stream

FREQUENCIES = 4


def _layer(kind: type[nn.Module], stream: Stream, *shape: int, scale: float = 1.0) -> nn.Module:
    """A linear or 3x3 convolutional layer with He-normal weights from the stream and zero bias."""
    options = {"kernel_size": 3, "padding": 1} if kind is nn.Conv2d else {}
    layer = nn.utils.skip_init(kind, *shape, **options)
    fan_in = layer.weight[0].numel()
    layer.weight.data = stream.normal(*layer.weight.shape) * scale * math.sqrt(2.0 / fan_in)
    nn.init.zeros_(layer.bias)
    return layer


class TimeNet(nn.Module):
    """Residual blocks h + conv(silu((1 + g(t)) conv(h) + b(t))) between two convolutions; 0 everywhere at the start.

    Runs in float32 and answers in the dtype of its input.
    """

    def __init__(self, channels: int, outputs: int, width: int, blocks: int, stream: Stream) -> None:
        super().__init__()
        self.first = _layer(nn.Conv2d, stream.fork("first"), channels, width)
        self.last = _layer(nn.Conv2d, stream.fork("last"), width, outputs, scale=0.0)
        streams = [stream.fork(str(index)) for index in range(blocks)]
        self.inner = nn.ModuleList(_layer(nn.Conv2d, s.fork("inner"), width, width) for s in streams)
        self.outer = nn.ModuleList(
            _layer(nn.Conv2d, s.fork("outer"), width, width, scale=0.5) for s in streams
        )
        self.film = nn.ModuleList(
            _layer(nn.Linear, s.fork("film"), 2 * FREQUENCIES, 2 * width) for s in streams
        )

    def forward(self, x: Float[Tensor, "b c h w"], t: Float[Tensor, " b"]) -> Float[Tensor, "b o h w"]:
        """The network's answer for images x at times t in [0, 1]."""
        phase = t.float()[:, None] * math.pi * 2.0 ** torch.arange(FREQUENCIES, device=t.device)
        time = torch.cat([phase.sin(), phase.cos()], dim=1)
        h = self.first(x.float())
        for inner, outer, film in zip(self.inner, self.outer, self.film, strict=True):
            gain, shift = film(time)[:, :, None, None].chunk(2, dim=1)
            h = h + outer(F.silu((1.0 + gain) * inner(h) + shift))
        return self.last(F.silu(h)).to(x.dtype)
