"""MVDream and ImageDream written as plain loops over rows and heads, from the weights of a folder in our layout."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor


class LoopAttention:
    """Attention row by row and head by head; self-attention of a row sees the tokens of its group of `views` rows."""

    def __init__(self, views: int, image: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
        self.views, self.image = views, image

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        rows = []
        for r, row in enumerate(hidden_states):
            start = r - r % self.views
            seen = (
                torch.cat(list(hidden_states[start : start + self.views]))
                if encoder_hidden_states is None
                else encoder_hidden_states[r]
            )
            query = attn.to_q(row)
            out = heads(query, attn.to_k(seen), attn.to_v(seen), attn.heads)
            if self.image is not None:
                tokens, to_k, to_v = self.image
                out = out + heads(query, tokens[r] @ to_k.T, tokens[r] @ to_v.T, attn.heads)
            rows.append(attn.to_out[0](out))
        return torch.stack(rows)


def heads(query: Tensor, key: Tensor, value: Tensor, count: int) -> Tensor:
    size = query.shape[-1] // count
    parts = []
    for h in range(count):
        q, k, v = (each[:, h * size : (h + 1) * size] for each in (query, key, value))
        parts.append(torch.softmax(q @ k.T / size**0.5, dim=-1) @ v)
    return torch.cat(parts, dim=1)


def reference_pose(azimuth_deg: Tensor, elevation_deg: Tensor) -> Tensor:
    """Cameras of MVDream's own generator: +z up, azimuth from +x (the front) to +y, OpenGL axes, unit distance."""
    azimuth, elevation = azimuth_deg.deg2rad(), elevation_deg.deg2rad()
    position = torch.stack(
        [elevation.cos() * azimuth.cos(), elevation.cos() * azimuth.sin(), elevation.sin()], dim=1
    )
    right = F.normalize(
        torch.linalg.cross(-position, torch.tensor([[0.0, 0.0, 1.0]]).expand_as(position)), dim=1
    )
    up = torch.linalg.cross(right, -position)
    pose = torch.eye(4).repeat(len(position), 1, 1)
    pose[:, :3] = torch.stack([right, up, position, position], dim=2)
    return pose.flatten(1)


def reference_unet(
    folder: Path, poses: Tensor, views: int, image: Tensor | None = None
) -> UNet2DConditionModel:
    """A plain UNet with loops for attention, and the embedding of `poses` (repeated over bundles) at its clock.

    `image` are the hidden states of the vision encoder, row by row. All in the precision of `poses`.
    """
    unet = (
        UNet2DConditionModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False).eval().to(poses.dtype)
    )
    camera = read(folder / "camera_embed", poses.dtype)
    processors: dict[str, LoopAttention] = {}
    adapter = {} if image is None else read(folder / "image_adapter", poses.dtype)
    tokens = None if image is None else reference_tokens(adapter, image)
    for index, name in enumerate(unet.attn_processors):
        own = None
        if name.endswith("attn2.processor") and tokens is not None:
            own = (tokens, *(adapter[f"ip_adapter.{index}.to_{part}_ip.weight"] for part in ("k", "v")))
        processors[name] = LoopAttention(views, own)
    unet.set_attn_processor(processors)

    def add_camera(module: Any, inputs: Any, output: Tensor) -> Tensor:
        hidden = F.silu(poses @ camera["0.weight"].T + camera["0.bias"])
        added = hidden @ camera["2.weight"].T + camera["2.bias"]
        return output + added.repeat(len(output) // len(poses), 1)

    unet.time_embedding.register_forward_hook(add_camera)
    return unet


def read(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) for name, value in load_file(folder / "model.safetensors").items()}


def reference_tokens(adapter: dict[str, Tensor], image: Tensor) -> Tensor:
    """The resampler of ImageDream, from its own weights: four layers of one query per token."""
    w = {name.removeprefix("image_proj."): value for name, value in adapter.items()}
    found = []
    for states in image:
        x = states @ w["proj_in.weight"].T + w["proj_in.bias"]
        latents = w["latents"][0]
        for n in range(4):
            norm = [f"layers.{n}.0.norm{k}" for k in (1, 2)]
            seen, asking = (
                F.layer_norm(value, value.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])
                for value, name in zip((x, latents), norm, strict=True)
            )
            key, value = (torch.cat([seen, asking]) @ w[f"layers.{n}.0.to_kv.weight"].T).chunk(2, dim=1)
            query = asking @ w[f"layers.{n}.0.to_q.weight"].T
            latents = (
                latents + heads(query, key, value, query.shape[1] // 64) @ w[f"layers.{n}.0.to_out.weight"].T
            )
            hidden = F.layer_norm(
                latents, latents.shape[-1:], w[f"layers.{n}.1.0.weight"], w[f"layers.{n}.1.0.bias"]
            )
            hidden = F.gelu(hidden @ w[f"layers.{n}.1.1.weight"].T) @ w[f"layers.{n}.1.3.weight"].T
            latents = latents + hidden
        out = latents @ w["proj_out.weight"].T + w["proj_out.bias"]
        found.append(F.layer_norm(out, out.shape[-1:], w["norm_out.weight"], w["norm_out.bias"]))
    return torch.stack(found)
