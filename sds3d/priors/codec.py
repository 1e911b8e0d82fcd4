"""Between the image in [-1, 1] and the space x that a network denoises."""

from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from diffusers import AutoencoderDC, AutoencoderKL
from jaxtyping import Float
from torch import Tensor


class Codec(Protocol):
    """Image to x and back. `factor` is image side / x side, `channels` the channels of x."""

    factor: int
    channels: int

    def encode(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """[-1, 1] image to x; differentiable."""
        ...

    def decode(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """X to [-1, 1] image."""
        ...


@runtime_checkable
class Settling(Protocol):
    """A codec that may change its precision between steps."""

    def settle(self) -> str | None:
        """Put right what went wrong since the last time, and say so. Reads from the device."""
        ...


class PixelCodec:
    """x is the image itself, pixel-unshuffled by `factor` (1 = plain pixels): an exact, noise-preserving code."""

    def __init__(self, factor: int = 1) -> None:
        self.factor, self.channels = factor, 3 * factor**2

    def encode(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """[-1, 1] image to x."""
        return F.pixel_unshuffle(image, self.factor) if self.factor > 1 else image

    def decode(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """X to [-1, 1] image."""
        return F.pixel_shuffle(x, self.factor) if self.factor > 1 else x


class VaeCodec:
    """x = (posterior mean - shift) * scale of a KL autoencoder; shift is 0 for all but SD3- and FLUX-class models.

    The mean keeps sampling noise out of the gradient.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae
        self.scale = float(vae.config.scaling_factor)
        self.shift = float(vae.config.get("shift_factor") or 0.0)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.channels = int(vae.config.latent_channels)

    def encode(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """[-1, 1] image to scaled latent; differentiable."""
        posterior = self.vae.encode(image.to(self.vae.dtype)).latent_dist
        return (posterior.mean.to(image.dtype) - self.shift) * self.scale

    def decode(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Scaled latent to [-1, 1] image."""
        return self.vae.decode((x / self.scale + self.shift).to(self.vae.dtype)).sample.to(x.dtype)


class DcCodec:
    """x = latent * scale of a deep-compression autoencoder, which has no posterior.

    Source: Chen et al. 2024 (arXiv:2410.10733).
    """

    def __init__(self, vae: AutoencoderDC) -> None:
        self.vae = vae
        self.scale = float(vae.config.scaling_factor)
        self.factor = 2 ** (len(vae.config.encoder_block_out_channels) - 1)
        self.channels = int(vae.config.latent_channels)

    def encode(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """[-1, 1] image to scaled latent; differentiable."""
        return self.vae.encode(image.to(self.vae.dtype)).latent.to(image.dtype) * self.scale

    def decode(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Scaled latent to [-1, 1] image."""
        return self.vae.decode((x / self.scale).to(self.vae.dtype)).sample.to(x.dtype)
