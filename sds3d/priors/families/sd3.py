"""Stable Diffusion 3 and 3.5: a rectified-flow transformer with two CLIP text encoders and, where present, a T5.

Source: Esser et al. 2024 (arXiv:2403.03206).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel
from jaxtyping import Float
from torch import Tensor, nn

from sds3d.errors import PriorError
from sds3d.mathx.schedule import FlowSchedule
from sds3d.priors.codec import VaeCodec
from sds3d.priors.families import LoadOptions
from sds3d.priors.folder import PipelineFolder
from sds3d.priors.network import PriorParts, Rows
from sds3d.priors.packing import Packing
from sds3d.priors.sizes import side_of
from sds3d.priors.text_coders import ClipReader, load_clip
from sds3d.priors.text_t5 import T5Text, load_t5

PARTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "transformer", "vae", "scheduler")
T5_TOKENS = 256
NATIVE_STEPS = 1000.0  # the network's clock runs from 0 to 1000


def build(folder: PipelineFolder, options: LoadOptions) -> PriorParts:
    """The parts of a Stable Diffusion 3 folder; PriorError where a part is missing or damaged."""
    folder.require(*PARTS)
    schedule = flow_schedule(folder)
    network = folder.load_network("transformer", SD3Transformer2DModel, options.dtype)
    text = SD3Text(
        [load_clip(folder, suffix, projected=True) for suffix in ("", "_2")],
        _load_t5(folder, options.dtype),
        width=int(network.config.joint_attention_dim),
    )
    codec = VaeCodec(folder.load_network("vae", AutoencoderKL, torch.float32).to(options.device))
    patch = int(network.config.patch_size)
    side = side_of(int(network.config.sample_size), codec, options.config.image_px, patch)
    largest = int(network.config.pos_embed_max_size) * patch
    if side > largest:
        raise PriorError(
            f"prior.image_px: got {side * codec.factor}, but the positions of this model end at "
            f"{largest * codec.factor}; give that or less"
        )
    return PriorParts(
        denoiser=SD3Denoiser(module=network, packing=text.packing),
        text=text,
        codec=codec,
        schedule=schedule,
        prediction="flow",
        side=side,
    )


def flow_schedule(folder: PipelineFolder) -> FlowSchedule:
    """The schedule of a rectified flow; PriorError where the folder's scheduler is of another kind.

    A shift in the scheduler's config only says which times a sampler visits, so it plays no part here.
    """
    name = str((folder.index.get("scheduler") or [None, "FlowMatch"])[1])
    if "FlowMatch" not in name:
        raise PriorError(
            f"{folder.path / 'scheduler'}: {name} contradicts {folder.pipeline}, whose networks are rectified "
            "flows; expected FlowMatchEulerDiscreteScheduler"
        )
    return FlowSchedule(trained=True)


def _load_t5(folder: PipelineFolder, dtype: torch.dtype) -> T5Text | None:
    if not folder.has("text_encoder_3"):
        return None
    folder.require("tokenizer_3", "text_encoder_3")
    return load_t5(folder, tokenizer="tokenizer_3", encoder="text_encoder_3", dtype=dtype, length=T5_TOKENS)


class SD3Text:
    """The tokens of two CLIP encoders side by side, then those of T5, zeros without one; both pooled vectors."""

    def __init__(self, clips: Sequence[ClipReader], t5: T5Text | None, *, width: int) -> None:
        """`width` is that of T5; narrower tokens are filled up with zeros."""
        self.clips, self.t5 = clips, t5
        self.packing = Packing(
            tokens=clips[0].tokens + T5_TOKENS, width=width, pooled=sum(clip.pooled for clip in clips)
        )

    def __call__(self, prompts: Sequence[str]) -> Float[Tensor, "p m d"]:
        """Packed embeddings."""
        said = [clip.read(prompts) for clip in self.clips]
        clip_tokens = torch.cat([one.tokens for one in said], dim=-1)
        tokens = F.pad(clip_tokens, (0, self.packing.width - clip_tokens.shape[-1]))
        further = tokens.new_zeros(len(tokens), T5_TOKENS, self.packing.width)
        if self.t5 is not None:
            further = self.t5.read(prompts)[0].to(tokens)
        return self.packing.pack(
            torch.cat([tokens, further], dim=1), torch.cat([one.pooled for one in said], dim=-1)
        )

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """Words that no encoder reads: T5 reads the most."""
        return (self.t5 or self.clips[0]).warnings(prompts)

    def modules(self) -> Sequence[nn.Module]:
        """All encoders."""
        return [reader.encoder for reader in (*self.clips, self.t5) if reader is not None]


@dataclass(frozen=True, kw_only=True)
class SD3Denoiser:
    """`SD3Transformer2DModel`; it predicts the velocity noise - x."""

    module: nn.Module
    packing: Packing

    def __call__(self, rows: Rows) -> Float[Tensor, "r c h w"]:
        """The velocity."""
        return self.module(
            hidden_states=rows.x,
            encoder_hidden_states=self.packing.tokens_of(rows.text),
            pooled_projections=self.packing.pooled_of(rows.text),
            timestep=rows.t * NATIVE_STEPS,
            return_dict=False,
        )[0]
