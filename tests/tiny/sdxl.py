"""A tiny Stable Diffusion XL: 32 px images, two CLIP encoders of different width, tokenizers as old files."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

from tests.tiny.texts import as_old_clip_files, clip_encoder, clip_tokenizer

WIDTHS, POOLED = (16, 24), 20


def make_sdxl(
    folder: Path, *, prediction: str = "epsilon", zeros_for_empty: bool = True, lcm: bool = False
) -> Path:
    """Save the pipeline with random weights; `folder`. `lcm`: a UNet that is told a guidance scale."""
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = clip_tokenizer(), clip_tokenizer(pad="!")
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=sum(WIDTHS),
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=POOLED + 6 * 8,
        time_cond_proj_dim=8 if lcm else None,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.13025,
    )
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=clip_encoder(len(tokenizer), width=WIDTHS[0]),
        text_encoder_2=clip_encoder(len(tokenizer_2), width=WIDTHS[1], projection=POOLED, act="gelu"),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
            prediction_type=prediction,
        ),
        force_zeros_for_empty_prompt=zeros_for_empty,
        add_watermarker=False,
    ).save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):
        as_old_clip_files(folder / name)
    return folder
