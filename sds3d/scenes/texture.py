"""`TextureField`: the material of a surface as a function of the point, without texture coordinates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sds3d.config.option import option
from sds3d.interfaces import Material, ParamGroup
from sds3d.ops.hashgrid import HashGrid, HashGridConfig
from sds3d.rng import Stream
from sds3d.scenes.hashgrid import init_network

_CHUNK = 1 << 18  # points: bounds the memory of evaluations without gradient


@dataclass(frozen=True, kw_only=True)
class TextureConfig:
    """Size, start and learning rates of the field."""

    encoding: HashGridConfig = field(default_factory=HashGridConfig)
    hidden: int = option(32, help="width of the network behind the encoding", ge=1)
    metallic: float = option(0.01, help="metallic at the start", ge=0.001, le=0.999)
    roughness: float = option(0.6, help="roughness at the start", ge=0.001, le=0.999)
    lr_encoding: float = option(0.01, help="learning rate of the encoding", ge=0.0)
    lr_network: float = option(0.005, help="learning rate of the network", ge=0.0)


class TextureField(nn.Module):
    """Base colour, metallic and roughness = sigmoid of one small network on a hash encoding of the point.

    It starts as plain grey with constant metallic and roughness. Differentiable in the parameters, not in the points.
    """

    def __init__(self, config: TextureConfig, half_extent: float, rng: Stream) -> None:
        super().__init__()
        self.config, self.half_extent = config, half_extent
        self.encoding = HashGrid(config.encoding, rng.fork("encoding"))
        self.network = nn.Sequential(
            nn.Linear(self.encoding.width, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 5)
        )
        init_network(self.network, rng.fork("network"))
        with torch.no_grad():
            last = list(self.network.parameters())
            last[-2][3:] = 0.0
            last[-1][3:] = torch.tensor([_logit(config.metallic), _logit(config.roughness)])

    def forward(self, points: Float[Tensor, "n 3"]) -> Material:
        """The material at points of the world."""
        unit = (points.detach() / (2 * self.half_extent) + 0.5).clamp(0, 1)
        color, metallic, roughness = torch.sigmoid(self.network(self.encoding(unit))).split([3, 1, 1], 1)
        return Material(base_color=color, metallic=metallic, roughness=roughness)

    @torch.no_grad()
    def sample(self, points: Float[Tensor, "n 3"]) -> Material:
        """`forward` without gradient, in pieces of bounded memory, for any number of points."""
        parts = [self(part.to(self.encoding.table)) for part in points.split(_CHUNK)]
        return Material(
            base_color=torch.cat([part.base_color for part in parts]),
            metallic=torch.cat([part.metallic for part in parts]),
            roughness=torch.cat([part.roughness for part in parts]),
        )

    def variation(self, points: Float[Tensor, "n 3"], rng: Stream, reach_m: float) -> Float[Tensor, ""]:
        """Mean squared difference of base colour between points and others about `reach_m` away."""
        shift = rng.normal(*points.shape, device=points.device) * reach_m
        both = self(torch.cat([points, points + shift])).base_color
        count = len(points)
        return (both[:count] - both[count:]).square().sum() / max(3 * count, 1)

    def groups(self) -> Sequence[ParamGroup]:
        """The table and the network."""
        return [
            ParamGroup(name="texture", params=[self.encoding.table], lr=self.config.lr_encoding),
            ParamGroup(
                name="texture_network", params=list(self.network.parameters()), lr=self.config.lr_network
            ),
        ]


def _logit(share: float) -> float:
    return math.log(share / (1 - share))
