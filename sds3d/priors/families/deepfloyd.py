"""DeepFloyd IF, stage I: a pixel UNet at 64 px with a T5 text encoder. The later stages, which enlarge, are not used.

The UNet gives six channels, eps and a learned variance (the latter is dropped), and pools the text by itself. Its
scheduler's dynamic thresholding belongs to sampling and plays no part here.
Source: https://github.com/deep-floyd/IF, after Saharia et al. 2022 (Imagen, arXiv:2205.11487).
"""

import torch
from diffusers import UNet2DConditionModel
from diffusers.schedulers import DDPMScheduler

from sds3d.errors import PriorError
from sds3d.priors.codec import PixelCodec
from sds3d.priors.families import LoadOptions
from sds3d.priors.families.stable_diffusion import prediction_of
from sds3d.priors.folder import PipelineFolder
from sds3d.priors.network import PriorParts
from sds3d.priors.sizes import side_of
from sds3d.priors.steps import allowed_steps, table_schedule
from sds3d.priors.text_t5 import load_t5
from sds3d.priors.unet import UNetDenoiser

TEXT_TOKENS = 77


def build(folder: PipelineFolder, options: LoadOptions) -> PriorParts:
    """The parts of a stage I folder; PriorError where a part is missing, damaged or of another stage."""
    folder.require("tokenizer", "text_encoder", "unet", "scheduler")
    scheduler = folder.load("scheduler", DDPMScheduler)
    prediction = prediction_of(scheduler)
    allowed = allowed_steps(folder, scheduler, options.config)
    schedule = table_schedule(scheduler, prediction, allowed, options.device)
    unet = folder.load_network("unet", UNet2DConditionModel, options.dtype)
    codec = PixelCodec()
    if unet.config.in_channels != codec.channels:
        raise PriorError(
            f"{folder.path / 'unet'}: reads {unet.config.in_channels} channels, expected {codec.channels}; "
            "only stage I of DeepFloyd IF makes images from text, give e.g. IF-I-XL"
        )
    text = load_t5(folder, dtype=options.dtype, length=TEXT_TOKENS, encoder_masked=True, lower=True)
    return PriorParts(
        denoiser=UNetDenoiser(
            module=unet.to(memory_format=torch.channels_last),
            packing=text.packing,
            clock=schedule.index,
        ),
        text=text,
        codec=codec,
        schedule=schedule,
        prediction=prediction,
        side=side_of(int(unet.config.sample_size), codec, options.config.image_px),
    )
