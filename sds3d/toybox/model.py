"""The toybox text-to-image model: an ordinary diffusers pipeline folder, only small.

    tokenizer/      word-level tokenizer over the closed caption vocabulary
    text_encoder/   two-layer CLIP text transformer, trained from scratch together with the denoiser
    unet/           UNet2DConditionModel on 4x4 pixel-unshuffled images (48 x 16 x 16), x0-prediction
    scheduler/      cosine schedule, 1000 steps
    sds3d_prior.json   what diffusers has no field for: the pixel-unshuffle factor and the camera condition

Pixel unshuffling is a permutation: white noise stays white, so the "latent" needs no scaling and loses nothing,
while the network runs at a quarter of the resolution, which is what makes it cheap enough for a CPU.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from sds3d.priors.camera_condition import CONDITION_SIZE, COORDINATE_CHANNELS

IMAGE_PX = 64
PATCH_PX = 4
TOKENS = 20
SPECIALS = ("<pad>", "<start>", "<end>", "<unk>")
PRIOR_FILE = "sds3d_prior.json"


@dataclass(frozen=True)
class ToyboxModel:
    """The trainable parts and their fixed companions."""

    tokenizer: PreTrainedTokenizerFast
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    scheduler: DDIMScheduler


def build_tokenizer(vocabulary: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: lower-cases, drops punctuation, frames with <start> ... <end>, pads to TOKENS."""
    table = {word: index for index, word in enumerate((*SPECIALS, *vocabulary))}
    core = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation(behavior="removed")]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unk>",
        model_max_length=TOKENS,
    )


def build_text_encoder(vocabulary_size: int, width: int = 128) -> CLIPTextModel:
    """A two-layer CLIP text transformer with random weights."""
    config = CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=width,
        intermediate_size=3 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        hidden_act="gelu",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return CLIPTextModel(config)


def build_unet(
    channels: tuple[int, ...] = (64, 128, 192), layers: tuple[int, ...] = (1, 2, 1), text_width: int = 128
) -> UNet2DConditionModel:
    """A small conditional UNet: attention at 8x8 and 4x4, pooled text and camera added to the time embedding."""
    patch_channels = 3 * PATCH_PX**2
    return UNet2DConditionModel(
        sample_size=IMAGE_PX // PATCH_PX,
        in_channels=patch_channels + COORDINATE_CHANNELS,
        out_channels=patch_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=channels,
        layers_per_block=list(layers),
        cross_attention_dim=text_width,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=CONDITION_SIZE,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def build_scheduler() -> DDIMScheduler:
    """Cosine variance-preserving schedule, the network predicts the clean image ("sample")."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        clip_sample=True,
        clip_sample_range=1.0,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


def build_model(vocabulary: tuple[str, ...]) -> ToyboxModel:
    """A fresh model; weights come from torch's global generator, which the caller seeds."""
    tokenizer = build_tokenizer(vocabulary)
    return ToyboxModel(tokenizer, build_text_encoder(len(tokenizer)), build_unet(), build_scheduler())


def save_model(model: ToyboxModel, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a diffusers pipeline folder with weights in `dtype` (safetensors)."""
    folder.mkdir(parents=True, exist_ok=True)
    model.tokenizer.save_pretrained(folder / "tokenizer")
    model.text_encoder.to(dtype).save_pretrained(folder / "text_encoder", safe_serialization=True)
    model.unet.to(dtype).save_pretrained(folder / "unet", safe_serialization=True)
    model.scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "vae": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    extra = {
        "pixel_unshuffle": PATCH_PX,
        "condition": "camera_background_10",
        "coordinates": True,
        "image_px": IMAGE_PX,
    }
    (folder / PRIOR_FILE).write_text(json.dumps(extra, indent=2) + "\n", encoding="utf-8")
