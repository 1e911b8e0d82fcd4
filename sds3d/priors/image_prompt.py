"""IP-Adapter: a picture as further tokens of a UNet's cross-attention, with a weight of its own for every view.

Source: Ye et al. 2023 (arXiv:2308.06721).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from sds3d.errors import PriorError
from sds3d.priors.conditions import PromptImage
from sds3d.priors.config import ImagePromptConfig
from sds3d.priors.network import PriorParts, Rows
from sds3d.priors.quiet import quiet
from sds3d.priors.unet import Further, UNetDenoiser

SETTING = "prior.image_prompt"
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)

Weights = dict[str, dict[str, Tensor]]


class ImageSeen(NamedTuple):
    """What cross-attention is handed of a picture."""

    tokens: Float[Tensor, "r n d"]
    scale: Float[Tensor, "r 1"]


class ImageTokens(nn.Module):
    """From what rows are told (embedding and, in one more row, scale) to tokens; sits in the UNet."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, told: Float[Tensor, "r m d"] | None) -> ImageSeen | None:
        """Tokens and scales; None where no row is told of a picture."""
        if told is None:
            return None
        # One row is the pooled embedding of the plain adapter, which its projection takes flat.
        embedding = told[:, 0] if told.shape[1] == 2 else told[:, :-1]
        return ImageSeen(self.projection(embedding), told[:, -1, :1])


class ImageAttention(nn.Module):
    """Cross-attention to text, plus a scale for every row times cross-attention to image tokens."""

    def __init__(self, to_k: nn.Module, to_v: nn.Module) -> None:
        super().__init__()
        self.to_k, self.to_v = to_k, to_v

    def forward(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "r l d"],
        encoder_hidden_states: tuple[Tensor, ImageSeen | None],
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Float[Tensor, "r l d"]:
        """Called by diffusers, whose names these are."""
        text, image = encoder_hidden_states
        query = _heads(attn, attn.to_q(hidden_states))
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, text.shape[1], len(text))
            attention_mask = attention_mask.unflatten(0, (len(text), attn.heads))
        seen = _attend(query, _heads(attn, attn.to_k(text)), _heads(attn, attn.to_v(text)), attention_mask)
        if image is not None:
            key, value = (_heads(attn, layer(image.tokens)) for layer in (self.to_k, self.to_v))
            seen = seen + image.scale[:, :, None] * _attend(query, key, value)
        output: Tensor = attn.to_out[0](seen)
        return output


def _heads(attn: Attention, states: Float[Tensor, "r l d"]) -> Float[Tensor, "r k l e"]:
    return states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Float[Tensor, "r l d"]:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


@dataclass(frozen=True, kw_only=True)
class ImageRows:
    """The picture that every row is told of, as a further argument of a UNet."""

    before: Further

    def __call__(self, rows: Rows) -> Mapping[str, Any]:
        """The arguments of the UNet."""
        said = self.before(rows)
        return {
            **said,
            "added_cond_kwargs": {**said.get("added_cond_kwargs", {}), "image_embeds": rows.image},
        }


def with_image_prompt(parts: PriorParts, config: ImagePromptConfig, device: torch.device) -> PriorParts:
    """The prior's parts with an IP-Adapter in the UNet and the picture's embedding, computed here and now.

    Raises:
        PriorError: a file that cannot be read, or that belongs to another model.
    """
    denoiser = parts.denoiser
    if not isinstance(denoiser, UNetDenoiser):
        raise PriorError(f"{SETTING}: only UNet models can be given an image prompt")
    if config.adapter is None or config.image_encoder is None:
        raise PriorError(f"{SETTING}: needs adapter and image_encoder for this model")
    weights = _read_adapter(Path(config.adapter))
    embedding, nothing = (rows.to(device) for rows in _embed(config, weights["image_proj"], device))
    _install(denoiser.module, weights, config)
    image = PromptImage(
        embedding=embedding,
        nothing=nothing,
        scale=config.scale,
        back_scale=config.scale if config.back_scale is None else config.back_scale,
        azimuth_deg=config.azimuth_deg,
    )
    return replace(
        parts,
        denoiser=replace(denoiser, further=ImageRows(before=denoiser.further)),
        conditions=replace(parts.conditions, image=image),
    )


def _install(unet: nn.Module, weights: Weights, config: ImagePromptConfig) -> None:
    """Let diffusers read the weights; then our own attention, with a scale for every row, takes them over."""
    try:
        with torch.random.fork_rng(devices=[]), quiet():  # initial values that the file replaces
            from diffusers.loaders import IPAdapterMixin

            loader = IPAdapterMixin()
            loader.unet = unet  # all that it asks of a pipeline
            loader.load_ip_adapter(
                weights, subfolder="", weight_name="", image_encoder_folder=None, low_cpu_mem_usage=False
            )
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise PriorError(
            f"{SETTING}.adapter: {config.adapter} was made for another UNet ({str(error)[:200]}); use one for "
            "this prior's family"
        ) from error
    for module in list(unet.modules()):
        if isinstance(module, Attention) and isinstance(module.processor, IPAdapterAttnProcessor2_0):
            module.set_processor(ImageAttention(module.processor.to_k_ip[0], module.processor.to_v_ip[0]))
    unet.encoder_hid_proj = ImageTokens(unet.get_submodule("encoder_hid_proj.image_projection_layers.0"))
    unet.eval().requires_grad_(False)


def _read_adapter(path: Path) -> Weights:
    """The two halves of an IP-Adapter file."""
    try:
        tensors = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise PriorError(f"{SETTING}.adapter: {path} cannot be read ({error}); download it again") from error
    weights: Weights = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in tensors.items():
        half, _, name = key.partition(".")
        if half in weights:
            weights[half][name] = tensor
    if not all(weights.values()):
        raise PriorError(
            f"{SETTING}.adapter: {path} is no IP-Adapter: expected entries image_proj.* and ip_adapter.*, got "
            f"{', '.join(sorted(tensors)[:3])}"
        )
    return weights


def _embedding_width(projection: Mapping[str, Tensor]) -> tuple[int, bool]:
    """(width of the embedding that the adapter projects, whether it takes CLIP's patches instead of its summary)."""
    if "proj.weight" in projection:
        return projection["proj.weight"].shape[1], False
    if "proj.3.weight" in projection:
        return projection["proj.0.weight"].shape[1], True
    if "latents" in projection:
        return projection["proj_in.weight"].shape[1], True
    raise PriorError(
        f"{SETTING}.adapter: this kind of IP-Adapter needs a face recogniser, which sds3d has not; use a plain, "
        "plus or full-face adapter"
    )


@torch.no_grad()
def _embed(
    config: ImagePromptConfig, projection: Mapping[str, Tensor], device: torch.device
) -> tuple[Float[Tensor, "m d"], Float[Tensor, "m d"]]:
    """The picture's embedding and that of no picture (zeros; for patches, those of an empty input)."""
    width, patches = _embedding_width(projection)
    try:
        with quiet():
            encoder = CLIPVisionModelWithProjection.from_pretrained(
                Path(config.image_encoder or ""),
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise PriorError(
            f"{SETTING}.image_encoder: {config.image_encoder} cannot be loaded ({error}); download it again"
        ) from error
    given = encoder.config.hidden_size if patches else encoder.config.projection_dim
    if given != width:
        raise PriorError(
            f"{SETTING}.image_encoder: {config.image_encoder} gives {given} numbers, the adapter "
            f"{config.adapter} reads {width}; use the image encoder that came with the adapter"
        )
    encoder = encoder.to(device).eval()
    pixels = read_picture(Path(config.image), int(encoder.config.image_size))[None].to(device)
    if not patches:
        embedding = encoder(pixels).image_embeds
        return embedding, torch.zeros_like(embedding)
    both = encoder(torch.cat([pixels, torch.zeros_like(pixels)]), output_hidden_states=True).hidden_states[-2]
    return both[0], both[1]


def read_picture(path: Path, size_px: int) -> Float[Tensor, "3 P P"]:
    """A picture as CLIP reads it: shorter side to `size_px`, centre square, standardised; transparent is white."""
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGBA")
    except (OSError, UnidentifiedImageError) as error:
        raise PriorError(f"{SETTING}.image: {path} cannot be read as a picture ({error})") from error
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture).convert("RGB")
    factor = size_px / min(picture.size)
    width, height = (max(size_px, int(side * factor)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size_px) // 2, (height - size_px) // 2
    square = np.asarray(picture.crop((left, top, left + size_px, top + size_px)), dtype=np.float32) / 255.0
    return torch.from_numpy((square - CLIP_MEAN) / CLIP_STD).permute(2, 0, 1)
