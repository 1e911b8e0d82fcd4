"""diffusers' conditional UNet as a `Denoiser`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
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
class UNetDenoiser:
    """`UNet2DConditionModel` on tokens of `packing`, with `labels` as its class embedding."""

    module: nn.Module
    packing: Packing
    clock: Clock
    further: Further = field(default=nothing)
    coordinates: bool = False  # two more input channels that say where each pixel lies

    def __call__(self, rows: Rows) -> Float[Tensor, "r k h w"]:
        """The raw output."""
        x = with_coordinates(rows.x) if self.coordinates else rows.x
        return self.module(
            x.contiguous(memory_format=torch.channels_last),
            self.clock(rows.t),
            self.packing.tokens_of(rows.text),
            class_labels=self._labels(rows),
            return_dict=False,
            **self.further(rows),
        )[0]

    def _labels(self, rows: Rows) -> Tensor | None:
        """In the precision of the network that reads them, which is not always that of the UNet."""
        if rows.labels is None:
            return None
        reader = self.module.get_submodule("class_embedding")
        return rows.labels.to(next(reader.parameters()).dtype)
