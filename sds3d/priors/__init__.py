"""Priors by name: one line per model in this table, one file per family."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sds3d.errors import PriorError
from sds3d.interfaces import Need, Prior
from sds3d.paths import data_dir
from sds3d.priors.config import PriorConfig

if TYPE_CHECKING:
    from sds3d.priors.network import NetworkPrior

__all__ = [
    "PriorConfig",
    "PriorInfo",
    "known_priors",
    "load_prior",
    "missing_offer",
    "open_prior",
    "prior_offers",
]


@dataclass(frozen=True, kw_only=True)
class PriorInfo:
    """What `sds3d priors` shows."""

    folder: Path
    summary: str
    licence: str


def known_priors() -> dict[str, PriorInfo]:
    """Priors that can be asked for by name."""
    return {
        "toybox": PriorInfo(
            folder=data_dir("assets") / "priors" / "toybox",
            summary="64 px text- and camera-conditioned model of the toybox world; ships with sds3d, runs on a CPU",
            licence="Apache-2.0",
        ),
    }


OFFER_HINTS: dict[Need, str] = {
    "student": "trains a LoRA student, which the prior {name!r} cannot carry; use a UNet prior, e.g. prior.name=toybox",
    "flow": "needs a flow prior, but {name!r} is none; set prior.as_flow=true to see it as its equivalent flow",
    "image prompt": "needs a prior with image tokens (IP-Adapter), which {name!r} does not take",
}


def missing_offer(need: Need, name: str) -> str:
    """Why a prior does not serve a rule, and what would."""
    return OFFER_HINTS[need].format(name=name)


def prior_offers(config: PriorConfig) -> frozenset[Need]:
    """What a prior can do for rules, from its settings and folder listing alone; nothing is loaded."""
    offers: set[Need] = {"student"}
    if config.as_flow:
        offers.add("flow")
    return frozenset(offers)


def load_prior(config: PriorConfig, device: torch.device) -> Prior:
    """The prior of this name or folder, on this device.

    Raises:
        PriorError: unknown name, missing folder, or a folder that is not a complete pipeline.
    """
    known = known_priors()
    if config.name in known:
        folder = known[config.name].folder
        if not folder.is_dir():
            raise PriorError(
                f"prior {config.name!r}: its files are missing from {folder}; install sds3d again, "
                "or give another prior from `sds3d priors` or a folder"
            )
    else:
        folder = Path(config.name)
    if not folder.is_dir():
        raise PriorError(
            f"prior {config.name!r}: not one of {', '.join(sorted(known))} and no such folder; "
            "give a name from `sds3d priors` or the path of a diffusers pipeline folder"
        )
    from sds3d.priors.flow_view import FlowView

    prior = open_prior(folder, config, device)
    return FlowView(prior) if config.as_flow else prior


def open_prior(folder: Path, config: PriorConfig, device: torch.device) -> "NetworkPrior":
    """The prior of a pipeline folder on this machine.

    Raises:
        PriorError: the folder is not a complete pipeline of a known family.
    """
    from sds3d.priors.families import LoadOptions, builder, family_of
    from sds3d.priors.folder import PipelineFolder
    from sds3d.priors.network import NetworkPrior

    options = LoadOptions(config=config, device=device, dtype=pick_dtype(config.dtype))
    pipeline = PipelineFolder(folder)
    parts = builder(family_of(pipeline.pipeline, folder))(pipeline, options)
    return NetworkPrior(parts, device, options.dtype)


def pick_dtype(name: str) -> torch.dtype:
    """The network's precision by its name in the config."""
    return torch.bfloat16 if name == "auto" else getattr(torch, name)
