"""Model families: which pipeline classes of diffusers exist here, and which file builds a prior from their folder.

A new family is one file with a `build(folder, options) -> PriorParts` and one line per pipeline class in `FAMILIES`.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from sds3d.errors import PriorError
from sds3d.interfaces import Need
from sds3d.priors.conditions import EXTRAS, Extra
from sds3d.priors.config import PriorConfig


@dataclass(frozen=True, kw_only=True)
class Family:
    """One way of building a prior from a folder; `module` is imported when a model is loaded."""

    module: str
    title: str
    offers: frozenset[Need] = frozenset({"student"})
    views_per_object: int = 1  # views of one object that the networks of this family denoise jointly
    takes: frozenset[Extra] = frozenset()  # styles and conditions that its models can be given


SD = Family(module="stable_diffusion", title="Stable Diffusion 1.x / 2.x and kin (UNet, CLIP)", takes=EXTRAS)
SDXL = Family(module="sdxl", title="Stable Diffusion XL (UNet, two CLIP)", takes=EXTRAS)
SD3 = Family(
    module="sd3",
    title="Stable Diffusion 3 / 3.5 (flow transformer, two CLIP, T5)",
    offers=frozenset({"student", "flow"}),
)
FLUX = Family(
    module="flux",
    title="FLUX.1 (flow transformer, CLIP, T5)",
    offers=frozenset({"student", "flow"}),
)
MVDREAM = Family(
    module="mvdream",
    title="MVDream (UNet, four joint views, CLIP)",
    views_per_object=4,
    takes=frozenset({"loras", "textual_inversions"}),
)
IMAGEDREAM = Family(
    module="mvdream",
    title="ImageDream (MVDream with image prompts)",
    offers=frozenset({"student", "image prompt"}),
    views_per_object=4,
    takes=frozenset({"loras", "textual_inversions", "image_prompt"}),
)
INSTAFLOW = Family(
    module="stable_diffusion",
    title="InstaFlow, 2-rectified flow (flow on the Stable Diffusion UNet)",
    offers=frozenset({"student", "flow"}),
)
DEEPFLOYD = Family(module="deepfloyd", title="DeepFloyd IF, stage I (pixel UNet, T5)")
PIXART = Family(module="pixart", title="PixArt-alpha / PixArt-Sigma (transformer, T5)")
SANA = Family(
    module="sana",
    title="SANA (linear flow transformer, Gemma 2)",
    offers=frozenset({"student", "flow"}),
)

FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": SD,
    "LatentConsistencyModelPipeline": SD,
    "RectifiedFlowPipeline": INSTAFLOW,
    "IFPipeline": DEEPFLOYD,
    "PixArtAlphaPipeline": PIXART,
    "PixArtSigmaPipeline": PIXART,
    "SanaPipeline": SANA,
    "StableDiffusionXLPipeline": SDXL,
    "StableDiffusion3Pipeline": SD3,
    "FluxPipeline": FLUX,
    "MVDreamPipeline": MVDREAM,
    "MVDreamStableDiffusionPipeline": MVDREAM,
    "ImageDreamPipeline": IMAGEDREAM,
}


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a family builds its parts."""

    config: PriorConfig
    device: torch.device
    dtype: torch.dtype


def family_of(pipeline: str, where: Path) -> Family:
    """The family of a pipeline class; PriorError with the known ones where there is none."""
    if pipeline in FAMILIES:
        return FAMILIES[pipeline]
    close = difflib.get_close_matches(pipeline, FAMILIES, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise PriorError(
        f"{where}: the pipeline {pipeline!r} is of no known family{hint}; known: {', '.join(sorted(FAMILIES))}"
    )


def builder(family: Family) -> Callable[..., Any]:
    """The family's `build(folder: PipelineFolder, options: LoadOptions) -> PriorParts`."""
    return import_module(f"sds3d.priors.families.{family.module}").build
