"""Tiny styles and conditions with random weights, in the file formats of the real ones."""

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.tiny.checks import randn

VISION_PX, PROJECTION, VISION_WIDTH = 24, 12, 16
RANK = 2


def make_lora(
    path: Path, parts: dict[str, nn.Module], *, layout: Literal["peft", "kohya"] = "peft", seed: int = 1
) -> Path:
    """Rank-2 LoRA of the attention layers; `parts` by their names in diffusers; kohya files carry an alpha of 1."""
    tensors: dict[str, Tensor] = {}
    for part, module in parts.items():
        ends = ("to_q", "to_v", "to_out.0") if part == "unet" else ("q_proj", "v_proj")
        for name, layer in module.named_modules():
            if not name.endswith(ends):
                continue
            seed += 1
            low = 0.3 * randn(RANK, layer.in_features, seed=seed)
            high = 0.3 * randn(layer.out_features, RANK, seed=seed + 1000)
            if layout == "peft":
                tensors[f"{part}.{name}.lora_A.weight"], tensors[f"{part}.{name}.lora_B.weight"] = low, high
                continue
            stem = "lora_unet" if part == "unet" else "lora_te"
            whole = name if part == "unet" else "text_model." + name.removeprefix("text_model.")
            key = f"{stem}_{whole.replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": low, f"{key}.lora_up.weight": high}
            tensors[f"{key}.alpha"] = torch.tensor(1.0)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def make_words(path: Path, tensors: dict[str, tuple[int, ...]], *, seed: int = 3) -> Path:
    """A textual inversion: vectors of these shapes under these keys."""
    save_file({key: randn(*shape, seed=seed + i) for i, (key, shape) in enumerate(tensors.items())}, path)
    return path


def make_picture(path: Path, *, seed: int = 0) -> Path:
    """A picture that is not square."""
    coarse = torch.randint(0, 256, (5, 6, 3), generator=torch.Generator().manual_seed(seed))
    Image.fromarray(coarse.to(torch.uint8).numpy()).resize((60, 50)).save(path)
    return path


def make_image_encoder(folder: Path) -> Path:
    """A two-layer CLIP vision encoder of 3 x 3 patches."""
    torch.manual_seed(5)
    config = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=2 * VISION_WIDTH,
        projection_dim=PROJECTION,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=VISION_PX,
        patch_size=VISION_PX // 3,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def make_ip_adapter(path: Path, unet: Any, *, plus: bool = False) -> Path:
    """A plain or a "plus" IP-Adapter of this UNet."""
    width = unet.config.cross_attention_dim
    tensors = _resampler(width) if plus else _projection(width)
    key = 1
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            size = module.to_q.out_features
            for half, layer in enumerate(("to_k_ip", "to_v_ip")):
                tensors[f"ip_adapter.{key}.{layer}.weight"] = randn(size, width, seed=100 * key + half)
            key += 2
    save_file(tensors, path)
    return path


def _projection(width: int) -> dict[str, Tensor]:
    return {
        "image_proj.proj.weight": randn(4 * width, PROJECTION, seed=1),
        "image_proj.proj.bias": randn(4 * width, seed=2),
        "image_proj.norm.weight": 1.0 + 0.1 * randn(width, seed=3),
        "image_proj.norm.bias": 0.1 * randn(width, seed=4),
    }


def _resampler(width: int, inner: int = 64, hidden: int = 16, layers: int = 4) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "latents": (1, 5, hidden),
        "proj_in.weight": (hidden, VISION_WIDTH),
        "proj_in.bias": (hidden,),
        "proj_out.weight": (width, hidden),
        "proj_out.bias": (width,),
        "norm_out.weight": (width,),
        "norm_out.bias": (width,),
    }
    for layer in range(layers):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"layers.{layer}.{norm}.{kind}": (hidden,) for kind in ("weight", "bias")}
        shapes |= {
            f"layers.{layer}.0.to_q.weight": (inner, hidden),
            f"layers.{layer}.0.to_kv.weight": (2 * inner, hidden),
            f"layers.{layer}.0.to_out.weight": (hidden, inner),
            f"layers.{layer}.1.1.weight": (4 * hidden, hidden),
            f"layers.{layer}.1.3.weight": (hidden, 4 * hidden),
        }
    return {f"image_proj.{key}": 0.3 * randn(*shape, seed=i) for i, (key, shape) in enumerate(shapes.items())}


def make_controlnet(folder: Path, unet: Any, *, channels: int = 3, seed: int = 7) -> Path:
    """A ControlNet of this UNet that says something: its zero convolutions are not zero. It halves its picture."""
    torch.manual_seed(seed)
    network = ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(8, 16), conditioning_channels=channels
    )
    last = network.controlnet_cond_embedding.conv_out
    with torch.no_grad():
        for module in (last, network.controlnet_mid_block, *network.controlnet_down_blocks):
            module.weight.normal_(std=0.3)
    network.save_pretrained(folder)
    return folder
