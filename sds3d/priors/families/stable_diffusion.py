"""Stable Diffusion 1.x / 2.x and everything with their layout, the shipped toybox model among them.

A UNet with one CLIP text encoder; eps, v or x0 output; a KL autoencoder, or pixels where the folder has no vae.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from diffusers.schedulers import DDIMScheduler
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sds3d.errors import PriorError
from sds3d.mathx.schedule import TableSchedule
from sds3d.priors.camera_condition import camera_background_labels
from sds3d.priors.codec import Codec, PixelCodec, VaeCodec
from sds3d.priors.families import LoadOptions
from sds3d.priors.folder import PipelineFolder, alphas_cumprod_of
from sds3d.priors.network import Prediction, PriorParts
from sds3d.priors.sizes import side_of
from sds3d.priors.text_coders import ClipText
from sds3d.priors.unet import UNetDenoiser

PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v_prediction", "sample")


def build(folder: PipelineFolder, options: LoadOptions) -> PriorParts:
    """The parts of a Stable-Diffusion-shaped folder; PriorError where a part is missing or damaged."""
    folder.require("tokenizer", "text_encoder", "unet", "scheduler", *(["vae"] if folder.has("vae") else []))
    encoder = folder.load_text_encoder("text_encoder", CLIPTextModel)
    tokenizer = folder.load_tokenizer("tokenizer", CLIPTokenizer, words=encoder.config.vocab_size)
    vae = None
    if folder.has("vae"):
        # float32: SDXL-class autoencoders overflow in half precision.
        vae = folder.load_network("vae", AutoencoderKL, torch.float32).to(options.device)
    return assemble(
        tokenizer=tokenizer,
        encoder=encoder,
        unet=folder.load_network("unet", UNet2DConditionModel, options.dtype),
        scheduler=folder.load("scheduler", DDIMScheduler),
        vae=vae,
        extra=folder.extra,
        options=options,
    )


def assemble(
    *,
    tokenizer: PreTrainedTokenizerBase,
    encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    vae: AutoencoderKL | None,
    extra: dict[str, Any],
    options: LoadOptions,
) -> PriorParts:
    """The same from loaded modules."""
    text = ClipText(tokenizer, encoder)
    codec: Codec = PixelCodec(int(extra.get("pixel_unshuffle", 1))) if vae is None else VaeCodec(vae)
    schedule = TableSchedule(alphas_cumprod_of(scheduler).to(options.device))
    return PriorParts(
        denoiser=UNetDenoiser(
            module=unet.to(memory_format=torch.channels_last),
            packing=text.packing,
            clock=schedule.index,
            coordinates=bool(extra.get("coordinates", False)),
        ),
        text=text,
        codec=codec,
        schedule=schedule,
        prediction=prediction_of(scheduler),
        side=side_of(int(unet.config.sample_size), codec, options.config.image_px),
        labels=camera_background_labels if "condition" in extra else None,
    )


def prediction_of(scheduler: SchedulerMixin) -> Prediction:
    """What a diffusers scheduler's config says that the network predicts."""
    said = scheduler.config.get("prediction_type", "epsilon")
    if said not in PREDICTIONS:
        raise PriorError(f"prediction_type {said!r} is unknown; expected {', '.join(PREDICTIONS)}")
    return said
