"""A tiny Stable Diffusion: 32 px images, one CLIP encoder; eps as 1.5, v as 2.1, or a flow as InstaFlow."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from tests.tiny.texts import as_old_clip_files, clip_encoder, clip_tokenizer

WIDTH = 16
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tiny_parts(**unet: Any) -> dict[str, Any]:
    """All parts but the scheduler, with random weights; `unet` adds to its settings."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": clip_encoder(len(tokenizer), width=WIDTH),
        "unet": UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            attention_head_dim=2,
            norm_num_groups=4,
            **unet,
        ),
        "vae": AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def make_stable_diffusion(folder: Path, *, prediction: str = "epsilon", zero_snr: bool = False) -> Path:
    """Save the pipeline with random weights, tokenizer as old files; `folder`.

    The eps kind samples as Stable Diffusion 1.5 does (leading steps, offset 1, ends at the first trained step), the
    others from t = 1 to 0.
    """
    old = prediction == "epsilon" and not zero_snr
    scheduler = DDIMScheduler(
        **NOISE,
        prediction_type=prediction,
        clip_sample=False,
        set_alpha_to_one=not old,
        steps_offset=1,
        timestep_spacing="leading" if old else "trailing",
        rescale_betas_zero_snr=zero_snr,
    )
    unet = {} if prediction == "epsilon" else {"use_linear_projection": True}
    StableDiffusionPipeline(scheduler=scheduler, **tiny_parts(**unet)).save_pretrained(folder)
    as_old_clip_files(folder / "tokenizer")
    return folder


def make_instaflow(folder: Path, *, named: bool = True) -> Path:
    """The same with the names of a published InstaFlow, or (`named=False`) declared in sds3d_prior.json."""
    StableDiffusionPipeline(scheduler=PNDMScheduler(**NOISE, steps_offset=1), **tiny_parts()).save_pretrained(
        folder
    )
    if named:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        index["_class_name"] = "RectifiedFlowPipeline"
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    else:
        (folder / "sds3d_prior.json").write_text('{"prediction": "flow_to_data"}', encoding="utf-8")
    return folder
