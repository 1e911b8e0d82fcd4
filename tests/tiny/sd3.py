"""A tiny Stable Diffusion 3: 32 px images, two CLIP encoders, T5 or none, dual attention as in 3.5."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from tests.tiny.texts import as_old_clip_files, clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer

WIDTHS, PROJECTIONS, T5_WIDTH = (12, 16), (12, 20), 32


def flow_vae(channels: int = 16, factor_steps: int = 2) -> AutoencoderKL:
    """An autoencoder with a shift and without the 1x1 convolutions around the latent."""
    return AutoencoderKL(
        block_out_channels=(8, 16)[:factor_steps],
        down_block_types=("DownEncoderBlock2D",) * factor_steps,
        up_block_types=("UpDecoderBlock2D",) * factor_steps,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_sd3(folder: Path, *, t5: bool = True, shift: float = 3.0) -> Path:
    """Save the pipeline with random weights; `folder`."""
    torch.manual_seed(0)
    tokenizer, tokenizer_2, tokenizer_3 = clip_tokenizer(), clip_tokenizer(pad="!"), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=sum(PROJECTIONS),
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=flow_vae(),
        text_encoder=clip_encoder(len(tokenizer), width=WIDTHS[0], projection=PROJECTIONS[0]),
        tokenizer=tokenizer,
        text_encoder_2=clip_encoder(len(tokenizer_2), width=WIDTHS[1], projection=PROJECTIONS[1], act="gelu"),
        tokenizer_2=tokenizer_2,
        text_encoder_3=t5_encoder(len(tokenizer_3), width=T5_WIDTH) if t5 else None,
        tokenizer_3=tokenizer_3 if t5 else None,
    ).save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):
        as_old_clip_files(folder / name)
    return folder
