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
from sds3d.priors.config import PriorConfig


@dataclass(frozen=True, kw_only=True)
class Family:
    """One way of building a prior from a folder; `module` is imported when a model is loaded."""

    module: str
    title: str
    offers: frozenset[Need] = frozenset({"student"})


SD = Family(module="stable_diffusion", title="Stable Diffusion 1.x / 2.x and kin (UNet, CLIP)")

FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": SD,
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
