"""Stable Diffusion 1.x / 2.x and everything with their layout, the shipped toybox model among them.

A UNet with one CLIP text encoder; eps, v or x0 output; a KL autoencoder, or pixels where the folder has no vae.
Distilled models (Turbo, Lightning, LCM) are the same networks, asked at few steps; LCMs are told a guidance scale.

InstaFlow and 2-rectified flow (Liu et al. 2023, arXiv:2309.06380) are the same UNet too, as a rectified flow: the
published pipeline (class RectifiedFlowPipeline) starts at noise, asks the network at timesteps 1000 (1 - i / n) and
adds output / n. So the clock runs as ours, 1000 at noise and not cut to whole steps, the output is x - noise, and the
scheduler of the folder, left over from Stable Diffusion, plays no part. A folder without that class says
`"prediction": "flow_to_data"` in its sds3d_prior.json.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from diffusers.schedulers import DDIMScheduler
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sds3d.errors import PriorError
from sds3d.interfaces import NoiseSchedule
from sds3d.mathx.schedule import FlowSchedule
from sds3d.priors.adapters import apply_styles
from sds3d.priors.camera_condition import camera_background_labels
from sds3d.priors.codec import Codec, PixelCodec, VaeCodec
from sds3d.priors.families import LoadOptions
from sds3d.priors.folder import PipelineFolder
from sds3d.priors.lazy import LazyEncoder
from sds3d.priors.network import Prediction, PriorParts
from sds3d.priors.sizes import side_of
from sds3d.priors.steps import allowed_steps, table_schedule
from sds3d.priors.text_coders import ClipText
from sds3d.priors.unet import Clock, GuidanceTold, UNetDenoiser, nothing

PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v_prediction", "sample")
FLOW_PIPELINE, FLOW_TO_DATA = "RectifiedFlowPipeline", "flow_to_data"
NATIVE_STEPS = 1000.0  # the clock of a rectified flow on this UNet runs from 0 to 1000


def build(folder: PipelineFolder, options: LoadOptions) -> PriorParts:
    """The parts of a Stable-Diffusion-shaped folder; PriorError where a part is missing or damaged."""
    folder.require("tokenizer", "text_encoder", "unet", "scheduler", *(["vae"] if folder.has("vae") else []))
    scheduler = folder.load("scheduler", DDIMScheduler)
    flow = _is_flow(folder, scheduler)
    allowed = None if flow else allowed_steps(folder, scheduler, options.config)
    encoder = folder.load_text_encoder("text_encoder", CLIPTextModel)
    tokenizer = folder.load_tokenizer("tokenizer", CLIPTokenizer, words=encoder.config.vocab_size)
    vae = None
    if folder.has("vae"):
        # float32: SDXL-class autoencoders overflow in half precision.
        vae = folder.load_network("vae", AutoencoderKL, torch.float32).to(options.device)
    unet = folder.load_network("unet", UNet2DConditionModel, options.dtype)
    apply_styles(
        options.config, "StableDiffusionPipeline", network=unet, tokenizers=[tokenizer], encoders=[encoder]
    )
    return assemble(
        tokenizer=tokenizer,
        encoder=encoder,
        unet=unet,
        scheduler=scheduler,
        vae=vae,
        extra=folder.extra,
        options=options,
        allowed=allowed,
        flow=flow,
    )


def assemble(
    *,
    tokenizer: PreTrainedTokenizerBase,
    encoder: CLIPTextModel | LazyEncoder,
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    vae: AutoencoderKL | None,
    extra: dict[str, Any],
    options: LoadOptions,
    allowed: Int[Tensor, " k"] | None = None,
    flow: bool = False,
) -> PriorParts:
    """The same from loaded modules; `flow`: a rectified flow in InstaFlow's convention."""
    text = ClipText(tokenizer, encoder)
    codec: Codec = PixelCodec(int(extra.get("pixel_unshuffle", 1))) if vae is None else VaeCodec(vae)
    prediction: Prediction = "flow" if flow else prediction_of(scheduler)
    schedule: NoiseSchedule
    clock: Clock
    if flow:
        schedule, clock = FlowSchedule(trained=True), _flow_clock
    else:
        schedule = table_schedule(scheduler, prediction, allowed, options.device)
        clock = schedule.index
    told_size = unet.config.get("time_cond_proj_dim")
    return PriorParts(
        denoiser=UNetDenoiser(
            module=unet.to(memory_format=torch.channels_last),
            packing=text.packing,
            clock=clock,
            further=GuidanceTold(scale=options.config.lcm_guidance, size=told_size) if told_size else nothing,
            coordinates=bool(extra.get("coordinates", False)),
            to_data=flow,
        ),
        text=text,
        codec=codec,
        schedule=schedule,
        prediction=prediction,
        side=side_of(int(unet.config.sample_size), codec, options.config.image_px),
        labels=camera_background_labels if "condition" in extra else None,
    )


def prediction_of(scheduler: SchedulerMixin) -> Prediction:
    """What a diffusers scheduler's config says that the network predicts."""
    said = scheduler.config.get("prediction_type", "epsilon")
    if said not in PREDICTIONS:
        raise PriorError(f"prediction_type {said!r} is unknown; expected {', '.join(PREDICTIONS)}")
    return said


def _flow_clock(t: Float[Tensor, " r"]) -> Float[Tensor, " r"]:
    return (t * NATIVE_STEPS).float()


def _is_flow(folder: PipelineFolder, scheduler: SchedulerMixin) -> bool:
    """Whether the UNet is a rectified flow; PriorError where sds3d_prior.json contradicts the rest of the folder."""
    said = folder.extra.get("prediction")
    flow = folder.pipeline == FLOW_PIPELINE or said == FLOW_TO_DATA
    expected = FLOW_TO_DATA if flow else prediction_of(scheduler)
    if said not in (None, expected):
        raise PriorError(
            f"{folder.path}: sds3d_prior.json says that the network predicts {said!r}, the rest of the folder "
            f"says {expected!r}; correct one of them"
        )
    return flow
