"""`HashGridField`: density and colour from a multiresolution hash encoding and a small network."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sds3d.interfaces import ParamGroup
from sds3d.ops.hashgrid import HashGrid, HashGridConfig
from sds3d.rng import Stream


@dataclass(frozen=True, kw_only=True)
class HashGridFieldConfig:
    """Size, start and learning rates of the field."""

    encoding: HashGridConfig = field(default_factory=HashGridConfig)
    hidden: int = 32
    blob_density: float = 10.0  # pre-activation at the centre; negative gives a hollow start
    blob_radius_m: float = 0.5  # where the blob's pre-activation crosses zero
    start_levels: int = 4  # levels active at progress 0
    unlock_frac: float = 0.4  # all levels are active from this progress on
    lr_encoding: float = 0.01
    lr_network: float = 0.005


class HashGridField(nn.Module):
    """sigma(x) = softplus(f(x) + lambda (1 - |x| / s)) inside a ball, 0 outside; colour = sigmoid(g(x)).

    f and g are one small network on the hash encoding. lambda, s: `blob_density`, `blob_radius_m`.
    Source: Lin et al. 2023, Magic3D, arXiv:2211.10440, supplement; Mueller et al. 2022, arXiv:2201.05989.
    """

    def __init__(self, config: HashGridFieldConfig, half_extent: float, rng: Stream) -> None:
        super().__init__()
        self.config, self.half_extent = config, half_extent
        self.encoding = HashGrid(config.encoding, rng.fork("encoding"))
        self.network = nn.Sequential(
            nn.Linear(self.encoding.width, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 4)
        )
        init_network(self.network, rng.fork("network"))

    def active_levels(self, progress: float) -> int:
        """How many levels of the encoding are unlocked: one after the other, coarse to fine."""
        start, total = self.config.start_levels, self.config.encoding.levels
        if progress >= self.config.unlock_frac:
            return total
        return min(total, start + int((total - start) * progress / self.config.unlock_frac + 1e-6))

    def density(self, points: Float[Tensor, "n 3"], *, progress: float = 1.0) -> Float[Tensor, " n"]:
        """Volume density in 1/m."""
        return self._activate(points, self._raw(points, progress)[:, 0])

    def density_color(
        self, points: Float[Tensor, "n 3"], *, progress: float = 1.0
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n 3"]]:
        """Volume density in 1/m and sRGB colour in [0, 1]."""
        raw = self._raw(points, progress)
        return self._activate(points, raw[:, 0]), torch.sigmoid(raw[:, 1:])

    def groups(self) -> Sequence[ParamGroup]:
        """The table and the network."""
        return [
            ParamGroup(name="encoding", params=[self.encoding.table], lr=self.config.lr_encoding),
            ParamGroup(name="network", params=list(self.network.parameters()), lr=self.config.lr_network),
        ]

    def _raw(self, points: Tensor, progress: float) -> Tensor:
        unit = points / (2 * self.half_extent) + 0.5
        return self.network(self.encoding(unit, self.active_levels(progress)))

    def _activate(self, points: Tensor, raw: Tensor) -> Tensor:
        # The floor keeps the second derivative of |x| finite at the origin.
        radius = points.square().sum(-1).clamp_min(1e-12).sqrt()
        blob = self.config.blob_density * (1 - radius / self.config.blob_radius_m)
        return nn.functional.softplus(raw + blob) * (radius < self.half_extent)


def init_network(network: nn.Sequential, rng: Stream) -> None:
    """He-uniform hidden layers, a last layer of small zero-mean weights, zero biases, drawn from `rng`."""
    linears = [layer for layer in network if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for index, layer in enumerate(linears):
            bound = (6.0 / layer.in_features) ** 0.5 if index < len(linears) - 1 else 0.1
            shape = layer.weight.shape
            layer.weight.copy_((rng.fork(str(index)).uniform(*shape) * 2 - 1) * bound)
            layer.bias.zero_()
