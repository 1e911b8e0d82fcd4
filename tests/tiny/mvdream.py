"""Tiny MVDream and ImageDream folders in both layouts, with the same random weights."""

import json
import re
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.tiny.texts import clip_encoder, clip_tokenizer

Layout = Literal["ours", "hub"]
Image = Literal["local", "pixel"]
Weights = dict[str, Tensor]
CHANNELS, LAYERS, TEXT, HEAD, SIDE = (32, 64), 1, 16, 16, 8
TIME = 4 * CHANNELS[0]
IMAGE_WIDTH, IMAGE_TOKENS = 24, 3  # of the vision encoder; of what cross attention sees


def make_mvdream(
    folder: Path, layout: Layout = "ours", *, image: Image | None = None, views: int = 4
) -> Path:
    """A whole pipeline folder of 16 px images; `image` makes it an ImageDream."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=SIDE,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=CHANNELS,
        layers_per_block=LAYERS,
        cross_attention_dim=TEXT,
        attention_head_dim=[width // HEAD for width in CHANNELS],
        use_linear_projection=True,
    )
    camera = {
        "0.weight": torch.randn(TIME, 16) / 2,
        "0.bias": torch.randn(TIME) / 4,
        "2.weight": torch.randn(TIME, TIME) / TIME**0.5,
        "2.bias": torch.randn(TIME) / 4,
    }
    resampler, keys = _resampler(), _image_keys(unet)
    _save_common(folder, image is not None)
    name = "MVDreamPipeline" if layout == "hub" or not image else "ImageDreamPipeline"
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": name, "vae": ["diffusers", "AutoencoderKL"]})
    )
    if layout == "hub":
        original = {_ldm_name(key): value for key, value in unet.state_dict().items()}
        original |= {f"camera_embed.{key}": value for key, value in camera.items()}
        if image:
            original |= {f"image_embed.{key}": value for key, value in resampler.items()}
            original |= {_ldm_name(key): value for key, value in keys.items()}
        _save(folder / "unet" / "diffusion_pytorch_model.safetensors", original)
        (folder / "unet" / "config.json").write_text(json.dumps(_ldm_config(bool(image))))
        extra = {"image_view": False} if image == "local" else {}
    else:
        unet.save_pretrained(folder / "unet")
        _save(folder / "camera_embed" / "model.safetensors", camera)
        if image:
            stored = {f"image_proj.{key}": value for key, value in resampler.items()}
            numbers = {name: index for index, name in enumerate(unet.attn_processors)}
            for key, value in keys.items():
                layer, part = key.split("attn2.")
                stored[f"ip_adapter.{numbers[f'{layer}attn2.processor']}.{part}"] = value
            _save(folder / "image_adapter" / "model.safetensors", stored)
        extra = {"image_view": True} if image == "pixel" else {}
    if views != 4:
        extra["views_per_object"] = views
    (folder / "sds3d_prior.json").write_text(json.dumps(extra))
    return folder


def _save_common(folder: Path, image: bool) -> None:
    tokenizer = clip_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    clip_encoder(len(tokenizer), width=TEXT).save_pretrained(folder / "text_encoder")
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=2 * SIDE,
    )
    vae.save_pretrained(folder / "vae")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    ).save_pretrained(folder / "scheduler")
    if image:
        vision = CLIPVisionConfig(
            hidden_size=IMAGE_WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
        CLIPVisionModel(vision).save_pretrained(folder / "image_encoder")


def _resampler(width: int = TEXT, heads: int = 1) -> Weights:
    """Under the names of the original code; 64 numbers per head, as there."""
    inner = 64 * heads
    shapes: dict[str, tuple[int, ...]] = {
        "latents": (1, IMAGE_TOKENS, width),
        "proj_in.weight": (width, IMAGE_WIDTH),
        "proj_in.bias": (width,),
        "proj_out.weight": (TEXT, width),
        "proj_out.bias": (TEXT,),
        "norm_out.weight": (TEXT,),
        "norm_out.bias": (TEXT,),
    }
    for layer in range(4):
        shapes |= {
            f"layers.{layer}.0.{norm}.{kind}": (width,)
            for norm in ("norm1", "norm2")
            for kind in ("weight", "bias")
        }
        shapes |= {
            f"layers.{layer}.0.to_q.weight": (inner, width),
            f"layers.{layer}.0.to_kv.weight": (2 * inner, width),
            f"layers.{layer}.0.to_out.weight": (width, inner),
            f"layers.{layer}.1.0.weight": (width,),
            f"layers.{layer}.1.0.bias": (width,),
            f"layers.{layer}.1.1.weight": (4 * width, width),
            f"layers.{layer}.1.3.weight": (width, 4 * width),
        }
    return {name: torch.randn(shape) / shape[-1] ** 0.5 for name, shape in shapes.items()}


def _image_keys(unet: UNet2DConditionModel) -> Weights:
    """Keys and values of the image tokens for every cross attention, under diffusers' names of the layers."""
    return {
        name.replace("to_k.", f"to_{part}_ip."): torch.randn_like(value) / TEXT**0.5
        for name, value in unet.state_dict().items()
        if name.endswith("attn2.to_k.weight")
        for part in ("k", "v")
    }


def _save(path: Path, weights: Weights) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().contiguous() for name, value in weights.items()}, path)


def _ldm_config(image: bool) -> dict[str, object]:
    """The fields that the public folders carry."""
    return {
        "_class_name": "MultiViewUNetModel",
        "image_size": SIDE,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": CHANNELS[0],
        "attention_resolutions": [2, 1],
        "num_res_blocks": LAYERS,
        "channel_mult": [width // CHANNELS[0] for width in CHANNELS],
        "num_head_channels": HEAD,
        "transformer_depth": 1,
        "context_dim": TEXT,
        "camera_dim": 16,
        **({"ip_dim": IMAGE_TOKENS} if image else {}),
    }


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
STEMS = {
    "conv_in.": "input_blocks.0.0.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}


def _ldm_name(name: str) -> str:
    """The name of a weight in the original code."""
    for ours, theirs in STEMS.items():
        if name.startswith(ours):
            return name.replace(ours, theirs)
    if name.startswith("mid_block"):
        _, kind, index, rest = name.split(".", 3)
        block = {"resnets": 2 * int(index), "attentions": 1}[kind]
        return f"middle_block.{block}.{_inside(kind, rest)}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
    assert found is not None, name
    side, level, kind, index, rest = found.groups()
    first = int(level) * (LAYERS + 1) + (side == "down")
    stem = "input_blocks" if side == "down" else "output_blocks"
    if kind == "downsamplers":
        return f"{stem}.{first + LAYERS}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"{stem}.{first + LAYERS}.2.{rest}"
    return f"{stem}.{first + int(index)}.{int(kind == 'attentions')}.{_inside(kind, rest)}"


def _inside(kind: str, rest: str) -> str:
    if kind == "attentions":
        return rest
    layer, end = rest.split(".", 1)
    return f"{RESNET[layer]}.{end}"
