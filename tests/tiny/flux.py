"""A tiny FLUX.1: 32 px images, CLIP and T5, with guidance embedding ("dev") or without ("schnell")."""

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from tests.tiny.sd3 import flow_vae
from tests.tiny.texts import as_old_clip_files, clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer


def make_flux(folder: Path, *, dev: bool = True) -> Path:
    """Save the pipeline with random weights; `folder`."""
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=dev,
        axes_dims_rope=(4, 6, 6),
    )
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev),
        vae=flow_vae(channels=4),
        text_encoder=clip_encoder(len(tokenizer), width=16),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(len(tokenizer_2), width=32),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    ).save_pretrained(folder)
    as_old_clip_files(folder / "tokenizer")
    # The real model's 1024 px would be 256 px here, where an image pixel is half a latent one.
    (folder / "sds3d_prior.json").write_text(json.dumps({"image_px": 32}), encoding="utf-8")
    return folder
