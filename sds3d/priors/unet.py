"""diffusers' conditional UNet as a `Denoiser`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from jaxtyping import Float
from torch import Tensor, nn

from sds3d.priors.camera_condition import with_coordinates
from sds3d.priors.network import Rows
from sds3d.priors.packing import Packing

Clock = Callable[[Float[Tensor, " r"]], Tensor]  # our t to the network's timestep
Further = Callable[[Rows], Mapping[str, Any]]  # further arguments of the network, from the rows of a call


def nothing(rows: Rows) -> Mapping[str, Any]:
    """No further arguments."""
    return {}


@dataclass(frozen=True, kw_only=True)
class GuidanceTold:
    """The guidance scale that a latent consistency model is told, as sine and cosine of 1000 (scale - 1).

    Source: Luo et al. 2023 (arXiv:2310.04378), section 4.2, whose scale w is ours minus 1.
    """

    scale: float
    size: int  # the UNet's `time_cond_proj_dim`

    def __call__(self, rows: Rows) -> Mapping[str, Any]:
        """The argument `timestep_cond` of the UNet."""
        w = torch.full((len(rows.x),), 1000.0 * (self.scale - 1.0), device=rows.x.device)
        return {"timestep_cond": get_timestep_embedding(w, self.size, downscale_freq_shift=1).to(rows.x)}


@dataclass(frozen=True, kw_only=True)
class UNetDenoiser:
    """`UNet2DConditionModel` on tokens of `packing`, with `labels` as its class embedding."""

    module: nn.Module
    packing: Packing
    clock: Clock
    further: Further = field(default=nothing)
    coordinates: bool = False  # two more input channels that say where each pixel lies
    to_data: bool = False  # the output is a velocity x - noise; the raw output is then given as noise - x

    def __call__(self, rows: Rows) -> Float[Tensor, "r k h w"]:
        """The raw output."""
        x = with_coordinates(rows.x) if self.coordinates else rows.x
        output = self.module(
            x.contiguous(memory_format=torch.channels_last),
            self.clock(rows.t),
            self.packing.tokens_of(rows.text),
            class_labels=self._labels(rows),
            return_dict=False,
            **self.further(rows),
        )[0]
        return -output if self.to_data else output

    def _labels(self, rows: Rows) -> Tensor | None:
        """In the precision of the network that reads them, which is not always that of the UNet."""
        if rows.labels is None:
            return None
        reader = self.module.get_submodule("class_embedding")
        return rows.labels.to(next(reader.parameters()).dtype)
