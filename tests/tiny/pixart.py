"""A tiny PixArt: T5, a transformer with a learned variance; alpha is told the image's size, sigma is not."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

from tests.tiny.texts import t5_encoder, t5_tokenizer

WIDTH = 32


def make_pixart(folder: Path, *, sigma: bool = False, sample_size: int = 128) -> Path:
    """Save the pipeline with random weights; `folder`.

    A `sample_size` of 128 is what makes the pipeline of alpha tell the size. The transformer of alpha is named as in
    its first folders, before it had a class of its own.
    """
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    settings: dict[str, Any] = {"use_additional_conditions": False} if sigma else {}
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": t5_encoder(len(tokenizer), width=WIDTH),
        "vae": AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.13025 if sigma else 0.18215,
        ),
        "transformer": PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=12,  # of an embedding for the size: 24 / 3
            in_channels=4,
            out_channels=8,
            num_layers=2,
            norm_num_groups=4,
            cross_attention_dim=24,
            sample_size=sample_size,
            patch_size=2,
            caption_channels=WIDTH,
            **settings,
        ),
        "scheduler": DDIMScheduler(
            beta_start=0.0001,
            beta_end=0.02,
            beta_schedule="linear",
            clip_sample=False,
            timestep_spacing="leading",
        ),
    }
    (PixArtSigmaPipeline if sigma else PixArtAlphaPipeline)(**parts).save_pretrained(folder)
    if not sigma:
        file = folder / "transformer" / "config.json"
        old = json.loads(file.read_text(encoding="utf-8")) | {"_class_name": "Transformer2DModel"}
        del old["use_additional_conditions"]
        file.write_text(json.dumps(old), encoding="utf-8")
    return folder
