"""A tiny DeepFloyd IF stage I: 16 px images, T5, a UNet that pools its text and gives eps and a variance."""

from pathlib import Path

import torch
from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel

from tests.tiny.texts import t5_encoder, t5_tokenizer

WIDTH = 32


def make_deepfloyd(folder: Path, *, variance: str = "learned_range", channels: int = 3) -> Path:
    """Save the pipeline with random weights; `folder`. Real folders have variance "learned_range" and thresholding."""
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    real = variance == "learned_range"
    IFPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_encoder(len(tokenizer), width=WIDTH),
        unet=UNet2DConditionModel(
            sample_size=16,
            in_channels=channels,
            out_channels=6,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            cross_attention_dim=32,
            cross_attention_norm="group_norm",
            attention_head_dim=16,
            encoder_hid_dim=WIDTH,
            encoder_hid_dim_type="text_proj",
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            act_fn="gelu",
            resnet_time_scale_shift="scale_shift",
            norm_num_groups=8,
        ),
        scheduler=DDPMScheduler(
            beta_schedule="squaredcos_cap_v2",
            variance_type=variance,
            thresholding=real,
            clip_sample=real,
        ),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder
