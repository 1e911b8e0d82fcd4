"""The way from the render to the latent, which every step goes forth and back: precision, slices, a tiny encoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sds3d.errors import PriorError
from sds3d.priors.codec import Codec
from sds3d.priors.layout import channels_last
from sds3d.rng import Stream

if TYPE_CHECKING:
    from sds3d.priors.config import PriorConfig
    from sds3d.priors.folder import PipelineFolder
    from sds3d.priors.network import NetworkPrior

Checkpointing = Literal["auto", "on", "off"]
TINY_FOLDER = "vae_tiny"  # beside the other parts of a pipeline folder
# Numbers that an encoder keeps for the backward pass, per pixel of the image and channel of its first layer: 23.7 in
# the autoencoder of Stable Diffusion 1.x, 2.x and XL (7.3 in the tiny one).
KEPT_PER_PIXEL = 24.0
PIECE_SHARE = 1 / 8  # of the device's memory that one piece may keep
WHOLE_SHARE = (
    1 / 4
)  # of it that a batch may keep before the encoder is run again in the backward pass instead
PROBES = 4


class VaePath:
    """A codec with its images encoded and decoded in pieces, optionally computed anew in the backward pass.

    `finite` watches half-precision encoders: whether a latent was not finite is noted on the device and read by
    `settle`, which then goes on in float32.
    """

    def __init__(
        self, codec: Codec, vae: nn.Module, *, slice_images: int | None, checkpointing: Checkpointing
    ) -> None:
        self.inner, self.vae = codec, vae
        self.factor, self.channels = codec.factor, codec.channels
        self.slice_images, self.checkpointing = slice_images, checkpointing
        weight = next(vae.parameters())
        self.watched = weight.dtype != torch.float32
        self.broken = torch.zeros((), dtype=torch.bool, device=weight.device)

    def encode(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """[-1, 1] image to x; differentiable."""
        piece, again = self.plan(image)
        parts = [self._encode(part, again) for part in image.split(piece)]
        x = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._watch(x)

    def decode(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """X to [-1, 1] image."""
        piece = len(x) if self.slice_images is None else self.slice_images
        return self._watch(torch.cat([self.inner.decode(part) for part in x.split(piece)]))

    def plan(self, image: Float[Tensor, "b 3 H W"]) -> tuple[int, bool]:
        """Images per piece, and whether the backward pass computes them anew, for images of this size."""
        count, side = len(image), image.shape[-1]
        memory = device_memory(image.device)
        kept = encoder_bytes(self.vae, side)
        piece = self.slice_images
        if piece is None:
            piece = count if memory is None else max(1, int(PIECE_SHARE * memory / kept))
        again = self.checkpointing == "on"
        if self.checkpointing == "auto" and memory is not None:
            again = count * kept > WHOLE_SHARE * memory
        return min(piece, count), again

    def settle(self) -> str | None:
        """Go on in float32 if a latent was not finite since the last time; what happened. Reads from the device."""
        if not self.watched or not bool(self.broken):
            return None
        was = str(next(self.vae.parameters()).dtype).removeprefix("torch.")
        self.vae.float()
        self.watched = False
        self.broken.zero_()
        return f"the autoencoder gives numbers that are not finite in {was}: it runs in float32 from here on"

    def _encode(self, part: Float[Tensor, "b 3 H W"], again: bool) -> Float[Tensor, "b c h w"]:
        part = part.contiguous(memory_format=torch.channels_last)
        if not again or not torch.is_grad_enabled() or not part.requires_grad:
            return self.inner.encode(part)
        # No random numbers are drawn inside, and saving the generator's state would make the host wait.
        return checkpoint(self.inner.encode, part, use_reentrant=False, preserve_rng_state=False)

    def _watch(self, found: Tensor) -> Tensor:
        if self.watched:
            self.broken |= ~torch.isfinite(found.detach()).all()
        return found


class TinyEncoder:
    """A codec that encodes with a small autoencoder trained to agree with the full one, and decodes with the full one.

    Its latents come scaled. Source: Bohan 2023, TAESD (https://github.com/madebyollin/taesd).
    """

    def __init__(self, full: Codec, tiny: AutoencoderTiny) -> None:
        self.full, self.tiny = full, tiny
        self.scale = float(tiny.config.scaling_factor)
        self.shift = float(tiny.config.get("shift_factor") or 0.0)
        self.factor, self.channels = full.factor, full.channels

    def encode(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """[-1, 1] image to x, near the full one's; differentiable."""
        latents = self.tiny.encode(image.to(self.tiny.dtype)).latents
        return (latents.to(image.dtype) - self.shift) * self.scale

    def decode(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """X to [-1, 1] image, by the full autoencoder."""
        return self.full.decode(x)


def encoder_path(
    prior: "NetworkPrior",
    config: "PriorConfig",
    folder: "PipelineFolder | None",
    tiny: AutoencoderTiny | None = None,
) -> Codec:
    """The prior's codec as `config` asks for it; what the user should know goes to the prior's notes.

    Raises:
        PriorError: a tiny autoencoder is asked for and there is none, or it does not fit.
    """
    codec, vae = prior.codec, getattr(prior.codec, "vae", None)
    if not isinstance(vae, nn.Module):
        if config.vae != "full":
            raise PriorError(
                f"prior.vae: got {config.vae}, but this prior sees pixels and has no autoencoder"
            )
        return codec
    dtype = vae_dtype(config.vae_dtype, prior, next(vae.parameters()).dtype)
    _place(vae, prior.device, dtype)
    path: Codec
    if config.vae == "full":
        path = VaePath(codec, vae, slice_images=config.vae_slice, checkpointing=config.vae_checkpointing)
    else:
        tiny = load_tiny(config.vae, folder) if tiny is None else tiny
        _place(tiny, prior.device, dtype)
        small = TinyEncoder(codec, tiny)
        error = encode_error(small, codec, prior.image_px, prior.device)
        prior.notes.append(
            f"prior.vae={config.vae}: latents of the tiny autoencoder differ from the full one's by {error:.1%} "
            f"(relative RMS over {PROBES} drawn images)"
        )
        path = VaePath(small, tiny, slice_images=config.vae_slice, checkpointing=config.vae_checkpointing)
    if path.watched:
        with torch.no_grad():
            path.encode(2.0 * probe_images(prior.image_px, prior.device) - 1.0)
        told = path.settle()
        prior.notes += [told] if told else []
    return path


def vae_dtype(name: str, prior: "NetworkPrior", loaded: torch.dtype) -> torch.dtype:
    """The autoencoder's precision; auto is the network's on CUDA, the one it was loaded in elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    return prior.dtype if prior.device.type == "cuda" else loaded


def _place(vae: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    vae.eval().requires_grad_(False)
    # nn.Module's own: diffusers' logs a warning about modules that are to stay in float32, of which there are none.
    nn.Module.to(vae, device=device, dtype=dtype)
    channels_last(vae)


def load_tiny(where: str, folder: "PipelineFolder | None") -> AutoencoderTiny:
    """A diffusers AutoencoderTiny: `tiny` is the one in the pipeline's own folder, else `where` is its path.

    Raises:
        PriorError: there is no such folder, or it holds something else.
    """
    path = Path(where)
    if where == "tiny":
        if folder is None or not (folder.path / TINY_FOLDER).is_dir():
            place = "this prior" if folder is None else str(folder.path)
            raise PriorError(
                f"prior.vae=tiny: {place} has no {TINY_FOLDER}/; put a diffusers AutoencoderTiny there, "
                "or give its folder: prior.vae=PATH"
            )
        path = folder.path / TINY_FOLDER
    if not path.is_dir():
        raise PriorError(
            f"prior.vae: got {where}, expected full, tiny or the folder of a diffusers AutoencoderTiny"
        )
    try:
        return AutoencoderTiny.from_pretrained(
            path, local_files_only=True, low_cpu_mem_usage=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise PriorError(f"prior.vae: {path} cannot be loaded as an AutoencoderTiny ({error})") from error


@torch.no_grad()
def encode_error(codec: Codec, reference: Codec, image_px: int, device: torch.device) -> float:
    """Relative RMS difference of two codecs' x over `PROBES` drawn images.

    Raises:
        PriorError: their x differ in shape.
    """
    images = 2.0 * probe_images(image_px, device) - 1.0
    found, wanted = codec.encode(images).float(), reference.encode(images).float()
    if found.shape != wanted.shape:
        raise PriorError(
            f"prior.vae: the tiny autoencoder makes latents of {tuple(found.shape[1:])}, "
            f"this prior denoises {tuple(wanted.shape[1:])}; it belongs to another model"
        )
    return float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def probe_images(side_px: int, device: torch.device) -> Float[Tensor, "b 3 H W"]:
    """`PROBES` sRGB images: white, a checkerboard of full contrast, and blotches of colour with sharp edges."""
    y, x = torch.meshgrid(torch.arange(side_px), torch.arange(side_px), indexing="ij")
    board = ((x // 8 + y // 8) % 2).float().expand(3, -1, -1)
    coarse = Stream(0, "probe").uniform(PROBES - 2, 3, 8, 8)
    blotches = F.interpolate(coarse, size=(side_px, side_px), mode="bicubic").clamp(0.0, 1.0)
    disc = (x - side_px / 2).square() + (y - side_px / 2).square() < (side_px / 3) ** 2
    blotches = torch.where(disc, blotches, 1.0)
    return torch.cat([torch.stack([torch.ones_like(board), board]), blotches]).to(device)


def encoder_bytes(vae: nn.Module, side_px: int) -> int:
    """What encoding one image keeps for the backward pass, about."""
    weight = next(vae.parameters())
    config: Any = vae.config
    channels: Sequence[int] = (
        config.get("block_out_channels") or config.get("encoder_block_out_channels") or (128,)
    )
    return int(KEPT_PER_PIXEL * channels[0] * side_px**2 * weight.element_size())


def device_memory(device: torch.device) -> int | None:
    """Bytes of memory of a CUDA device; None elsewhere, where nothing is cut by itself."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
