"""PixArt-alpha and PixArt-Sigma: a latent diffusion transformer with a T5 text encoder and a learned variance.

Sources: Chen et al. 2023 (arXiv:2310.00426), Chen et al. 2024 (arXiv:2403.04692).
"""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from diffusers.schedulers import DDIMScheduler
from jaxtyping import Float
from torch import Tensor, nn

from sds3d.priors.codec import VaeCodec
from sds3d.priors.families import LoadOptions
from sds3d.priors.families.stable_diffusion import prediction_of
from sds3d.priors.folder import PipelineFolder
from sds3d.priors.network import PriorParts, Rows
from sds3d.priors.packing import Packing
from sds3d.priors.sizes import side_of
from sds3d.priors.steps import allowed_steps, table_schedule
from sds3d.priors.text_t5 import load_t5
from sds3d.priors.unet import Clock

TEXT_TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}


def build(folder: PipelineFolder, options: LoadOptions) -> PriorParts:
    """The parts of a PixArt folder; PriorError where a part is missing or damaged."""
    folder.require("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    scheduler = folder.load("scheduler", DDIMScheduler)
    prediction = prediction_of(scheduler)
    allowed = allowed_steps(folder, scheduler, options.config)
    schedule = table_schedule(scheduler, prediction, allowed, options.device)
    network = folder.load_network("transformer", PixArtTransformer2DModel, options.dtype)
    codec = VaeCodec(folder.load_network("vae", AutoencoderKL, torch.float32).to(options.device))
    text = load_t5(
        folder,
        dtype=options.dtype,
        length=TEXT_TOKENS[folder.pipeline],
        encoder_masked=True,
        masked=True,
        lower=True,
    )
    patch = int(network.config.patch_size)
    return PriorParts(
        denoiser=PixArtDenoiser(
            module=network,
            packing=text.packing,
            clock=schedule.index,
            factor=codec.factor,
            sized=bool(network.use_additional_conditions),
        ),
        text=text,
        codec=codec,
        schedule=schedule,
        prediction=prediction,
        side=side_of(int(network.config.sample_size), codec, options.config.image_px, patch),
    )


@dataclass(frozen=True, kw_only=True)
class PixArtDenoiser:
    """`PixArtTransformer2DModel`, told the image's size and aspect ratio where it asks (`sized`)."""

    module: nn.Module
    packing: Packing
    clock: Clock
    factor: int  # image side / latent side
    sized: bool

    def __call__(self, rows: Rows) -> Float[Tensor, "r k h w"]:
        """The raw output, eps and variance."""
        height, width = (side * self.factor for side in rows.x.shape[-2:])
        conditions: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.sized:
            conditions["resolution"] = rows.x.new_tensor([[height, width]]).expand(len(rows.x), -1)
            conditions["aspect_ratio"] = rows.x.new_tensor([[height / width]]).expand(len(rows.x), -1)
        return self.module(
            rows.x,
            encoder_hidden_states=self.packing.tokens_of(rows.text),
            encoder_attention_mask=self.packing.mask_of(rows.text),
            timestep=self.clock(rows.t),
            added_cond_kwargs=conditions,
            return_dict=False,
        )[0]
