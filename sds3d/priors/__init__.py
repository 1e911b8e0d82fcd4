"""Priors by name, folder or hub id: the table in `catalog`, the files from `hub`, one file per family."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sds3d.errors import PriorError
from sds3d.interfaces import Need, Prior
from sds3d.priors.catalog import PRIORS, PriorInfo
from sds3d.priors.config import PriorConfig
from sds3d.priors.shelf import kept

if TYPE_CHECKING:
    from sds3d.priors.families import Family, LoadOptions
    from sds3d.priors.network import NetworkPrior, PriorParts

__all__ = [
    "PriorConfig",
    "PriorInfo",
    "known_priors",
    "load_prior",
    "missing_offer",
    "needed_views",
    "open_prior",
    "prior_offers",
]


def known_priors() -> dict[str, PriorInfo]:
    """Priors that can be asked for by name."""
    return dict(PRIORS)


UNSEEN: frozenset[Need] = frozenset({"student", "flow"})  # offers of a model whose files are not here yet

OFFER_HINTS: dict[Need, str] = {
    "student": "trains a LoRA student, which the prior {name!r} cannot carry; use a UNet prior, e.g. prior.name=toybox",
    "flow": "needs a flow prior, but {name!r} is none; set prior.as_flow=true to see it as its equivalent flow",
    "image prompt": "needs a picture, and {name!r} is given none; set prior.image_prompt (an IP-Adapter)",
}


def missing_offer(need: Need, name: str) -> str:
    """Why a prior does not serve a rule, and what would."""
    return OFFER_HINTS[need].format(name=name)


def prior_offers(config: PriorConfig) -> frozenset[Need]:
    """What a prior can do for rules, from its settings and folder listing alone; nothing is loaded.

    A hub model that is not on this disk is not refused anything here: what it is shows when it is loaded.
    """
    family = _family(config)
    offers: set[Need] = set(UNSEEN if family is None else family.offers) - {"image prompt"}
    if config.as_flow:
        offers.add("flow")
    if config.image_prompt is not None:
        offers.add("image prompt")
    return frozenset(offers)


def needed_views(config: PriorConfig) -> int:
    """Views of one object that a prior denoises jointly, from its folder listing alone; 1 where that is not here."""
    family = _family(config)
    return 1 if family is None else family.views_per_object


def _family(config: PriorConfig) -> "Family | None":
    """The family of a prior by its name or its model_index.json; None where neither is at hand."""
    from sds3d.priors.families import family_of
    from sds3d.priors.weights import pipeline_of

    folder = Path(config.name).expanduser()
    try:
        if config.name in PRIORS:
            return family_of(PRIORS[config.name].pipeline, folder)
        if not folder.is_dir():
            from sds3d.priors.hub import cached_folder, local_folder, sources_of

            local_folder(config)
            cached = cached_folder(sources_of(config)[0])
            if cached is None:
                return None
            folder = cached
        return family_of(pipeline_of(folder), folder)
    except PriorError:  # told in full where the prior is loaded
        return None


def load_prior(config: PriorConfig, device: torch.device) -> Prior:
    """The prior of this name, folder or hub id, on this device; downloads it where needed.

    Raises:
        PriorError: unknown name, files that cannot be had, or a folder that is not a complete pipeline.
    """
    return kept(f"{device} {config!r}", lambda: _load(config, device))


def _load(config: PriorConfig, device: torch.device) -> Prior:
    from sds3d.mathx.schedule import FlowSchedule
    from sds3d.priors.flow_view import FlowView
    from sds3d.priors.hub import find_folder

    prior = open_prior(find_folder(config), config, device)
    # A model that is a rectified flow already is its own flow view.
    return FlowView(prior) if config.as_flow and not isinstance(prior.schedule, FlowSchedule) else prior


def open_prior(folder: Path, config: PriorConfig, device: torch.device) -> "NetworkPrior":
    """The prior of a pipeline folder on this machine.

    Raises:
        PriorError: the folder is not a complete pipeline of a known family.
    """
    from sds3d.priors.conditions import check_extras
    from sds3d.priors.families import LoadOptions, builder, family_of
    from sds3d.priors.folder import PipelineFolder
    from sds3d.priors.network import NetworkPrior
    from sds3d.priors.speed import pick_dtype, tuned
    from sds3d.priors.text_cache import with_text_cache

    dtype, told = pick_dtype(config.dtype, device)
    options = LoadOptions(config=config, device=device, dtype=dtype)
    pipeline = PipelineFolder(folder)
    family = family_of(pipeline.pipeline, folder)
    reads_pictures = "image prompt" in family.offers
    check_extras(config, family.takes, family.title, reads_pictures=reads_pictures)
    parts = with_text_cache(builder(family)(pipeline, options), folder, options)
    parts = _conditioned(parts, options)
    prior = NetworkPrior(parts, device, dtype)
    prior.notes += told
    return tuned(prior, config, pipeline)


def _conditioned(parts: "PriorParts", options: "LoadOptions") -> "PriorParts":
    """The parts with the run's control networks and image prompt around the network."""
    config = options.config
    if config.controls:
        from sds3d.priors.control import with_controls

        parts = with_controls(parts, config.controls, options.device, options.dtype)
    if config.image_prompt is not None and parts.conditions.image is None:
        from sds3d.priors.image_prompt import with_image_prompt

        parts = with_image_prompt(parts, config.image_prompt, options.device)
    return parts
