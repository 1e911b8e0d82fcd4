"""Stable Diffusion XL and its fine-tunes: a latent UNet with two CLIP text encoders and sizes as a condition.

Distilled ones (Turbo, Lightning, LCM) are the same networks, asked at few steps; LCMs are told a guidance scale.
Source: Podell et al. 2023 (arXiv:2307.01952).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.schedulers import DDIMScheduler
from jaxtyping import Float
from torch import Tensor, nn

from sds3d.errors import PriorError
from sds3d.priors.adapters import apply_styles
from sds3d.priors.codec import VaeCodec
from sds3d.priors.families import LoadOptions
from sds3d.priors.families.stable_diffusion import prediction_of
from sds3d.priors.folder import PipelineFolder
from sds3d.priors.network import PriorParts, Rows
from sds3d.priors.packing import Packing
from sds3d.priors.sizes import side_of
from sds3d.priors.steps import allowed_steps, table_schedule
from sds3d.priors.text_coders import ClipReader, load_clip
from sds3d.priors.unet import Further, GuidanceTold, UNetDenoiser, nothing

PARTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "unet", "vae", "scheduler")


def build(folder: PipelineFolder, options: LoadOptions) -> PriorParts:
    """The parts of a Stable Diffusion XL folder; PriorError where a part is missing or damaged."""
    folder.require(*PARTS)
    text = TwoClipText(
        load_clip(folder, projected=False),
        load_clip(folder, "_2", projected=True),
        zeros_for_empty=bool(folder.index.get("force_zeros_for_empty_prompt", True)),
    )
    scheduler = folder.load("scheduler", DDIMScheduler)
    prediction = prediction_of(scheduler)
    allowed = allowed_steps(folder, scheduler, options.config)
    schedule = table_schedule(scheduler, prediction, allowed, options.device)
    # float32: the original autoencoder overflows in half precision.
    vae = folder.load_network("vae", AutoencoderKL, torch.float32).to(options.device)
    if vae.config.get("latents_mean") is not None:
        raise PriorError(
            f"{folder.path / 'vae'}: latents are scaled per channel (latents_mean), as in models of the EDM "
            "kind, which are not supported; give a Stable Diffusion XL model with a scaling_factor alone"
        )
    codec = VaeCodec(vae)
    unet = folder.load_network("unet", UNet2DConditionModel, options.dtype)
    apply_styles(
        options.config,
        "StableDiffusionXLPipeline",
        network=unet,
        tokenizers=[clip.tokenizer for clip in text.clips],
        encoders=[clip.encoder for clip in text.clips],
    )
    told_size = unet.config.get("time_cond_proj_dim")
    guidance = GuidanceTold(scale=options.config.lcm_guidance, size=told_size) if told_size else nothing
    return PriorParts(
        denoiser=UNetDenoiser(
            module=unet.to(memory_format=torch.channels_last),
            packing=text.packing,
            clock=schedule.index,
            further=SizeConditions(packing=text.packing, factor=codec.factor, before=guidance),
        ),
        text=text,
        codec=codec,
        schedule=schedule,
        prediction=prediction,
        side=side_of(int(unet.config.sample_size), codec, options.config.image_px),
    )


class TwoClipText:
    """Hidden states of two CLIP encoders side by side, and the pooled vector of the second."""

    def __init__(self, first: ClipReader, second: ClipReader, *, zeros_for_empty: bool) -> None:
        """`zeros_for_empty`: the empty prompt is all zeros, as the model was trained, instead of being read."""
        self.clips, self.zeros_for_empty = (first, second), zeros_for_empty
        self.packing = Packing(tokens=first.tokens, width=first.width + second.width, pooled=second.pooled)

    def __call__(self, prompts: Sequence[str]) -> Float[Tensor, "p m d"]:
        """Packed embeddings."""
        first, second = (clip.read(prompts) for clip in self.clips)
        packed = self.packing.pack(torch.cat([first.tokens, second.tokens], dim=-1), second.pooled)
        if self.zeros_for_empty:
            packed[[not prompt.strip() for prompt in prompts]] = 0.0
        return packed

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """Words beyond the limit, which is the same for both."""
        return self.clips[0].warnings(prompts)

    def modules(self) -> Sequence[nn.Module]:
        """Both encoders."""
        return [clip.encoder for clip in self.clips]


@dataclass(frozen=True, kw_only=True)
class SizeConditions:
    """The pooled text and the "time ids" of SDXL: the image is told to be uncropped and of its own size."""

    packing: Packing
    factor: int  # image side / latent side
    before: Further = field(default=nothing)  # further arguments that these are added to

    def __call__(self, rows: Rows) -> Mapping[str, Any]:
        """The argument `added_cond_kwargs` of the UNet, beside those before."""
        height, width = (side * self.factor for side in rows.x.shape[-2:])
        sizes = torch.zeros(len(rows.x), 6, device=rows.x.device)  # original h w, crop top left, target h w
        sizes[:, 0::4], sizes[:, 1::4] = height, width
        added = {"text_embeds": self.packing.pooled_of(rows.text), "time_ids": sizes}
        return {**self.before(rows), "added_cond_kwargs": added}
