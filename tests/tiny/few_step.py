"""Tiny distilled models on the tiny Stable Diffusion: a consistency model told its guidance, and a "turbo" one."""

import json
from pathlib import Path

from diffusers import (
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
)

from tests.tiny.stable_diffusion import NOISE, tiny_parts


def make_lcm(folder: Path) -> Path:
    """A latent consistency model as LCM_Dreamshaper_v7 is laid out; `folder`."""
    scheduler = LCMScheduler(**NOISE, original_inference_steps=50)
    LatentConsistencyModelPipeline(scheduler=scheduler, **tiny_parts(time_cond_proj_dim=32)).save_pretrained(
        folder
    )
    return folder


def make_turbo(folder: Path, name: str = "stabilityai/sd-turbo") -> Path:
    """As SD-Turbo is laid out: an ordinary pipeline whose sampler says "trailing"; `name` stands in its index."""
    scheduler = EulerDiscreteScheduler(**NOISE, steps_offset=1, timestep_spacing="trailing")
    StableDiffusionPipeline(scheduler=scheduler, **tiny_parts()).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    (folder / "model_index.json").write_text(json.dumps(index | {"_name_or_path": name}), encoding="utf-8")
    return folder
