"""`TextureField`: the material of a surface as a function of the point, without texture coordinates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sds3d.config.option import option
from sds3d.errors import ConfigError
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
    base_color_range: tuple[float, float] = option(
        (0.0, 1.0), help="base colour stays in this range", ge=0.0, le=1.0
    )
    metallic_range: tuple[float, float] = option(
        (0.0, 1.0), help="metallic stays in this range; equal ends = it does not learn", ge=0.0, le=1.0
    )
    roughness_range: tuple[float, float] = option(
        (0.0, 1.0), help="roughness stays in this range; equal ends = it does not learn", ge=0.0, le=1.0
    )
    normal_detail: float = option(
        0.0,
        help="learn normals finer than the mesh, bent by about this slope at most; 0 = none",
        ge=0.0,
        le=2.0,
    )
    lr_encoding: float = option(0.01, help="learning rate of the encoding", ge=0.0)
    lr_network: float = option(0.005, help="learning rate of the network", ge=0.0)

    def __post_init__(self) -> None:
        """Raise ConfigError for a range whose ends are the wrong way round."""
        for name in ("base_color_range", "metallic_range", "roughness_range"):
            low, high = getattr(self, name)
            if low > high:
                raise ConfigError(f"texture.{name}: got [{low}, {high}], expected the smaller value first")


class TextureField(nn.Module):
    """Base colour, metallic, roughness (and a bump) = sigmoids (tanh) of one small network on a hash encoding.

    It starts as plain grey with constant metallic and roughness, without bumps. Differentiable in the parameters, not
    in the points. A bump is a vector of the world, so that it needs no texture coordinates; the exported normal
    texture holds what it does to the normal.
    """

    def __init__(self, config: TextureConfig, half_extent: float, rng: Stream) -> None:
        super().__init__()
        self.config, self.half_extent = config, half_extent
        self.encoding = HashGrid(config.encoding, rng.fork("encoding"))
        self.network = nn.Sequential(
            nn.Linear(self.encoding.width, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, 8 if config.normal_detail > 0 else 5),
        )
        init_network(self.network, rng.fork("network"))
        with torch.no_grad():
            last = list(self.network.parameters())
            last[-2][3:] = 0.0
            start = [
                _logit(config.metallic, config.metallic_range),
                _logit(config.roughness, config.roughness_range),
            ]
            last[-1][3:] = torch.tensor(start + [0.0] * (len(last[-1]) - 5))

    def forward(self, points: Float[Tensor, "n 3"]) -> Material:
        """The material at points of the world."""
        unit = (points.detach() / (2 * self.half_extent) + 0.5).clamp(0, 1)
        raw = self.network(self.encoding(unit))
        color, metallic, roughness = torch.sigmoid(raw[:, :5]).split([3, 1, 1], 1)
        config = self.config
        return Material(
            base_color=_within(color, config.base_color_range),
            metallic=_within(metallic, config.metallic_range),
            roughness=_within(roughness, config.roughness_range),
            bump=config.normal_detail * torch.tanh(raw[:, 5:]) if config.normal_detail > 0 else None,
        )

    @torch.no_grad()
    def sample(self, points: Float[Tensor, "n 3"]) -> Material:
        """`forward` without gradient, in pieces of bounded memory, for any number of points."""
        parts = [self(part.to(self.encoding.table)) for part in points.split(_CHUNK)]
        return Material(
            base_color=torch.cat([part.base_color for part in parts]),
            metallic=torch.cat([part.metallic for part in parts]),
            roughness=torch.cat([part.roughness for part in parts]),
            bump=None if self.config.normal_detail == 0 else torch.cat([bump_of(part) for part in parts]),
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


def bump_of(material: Material) -> Float[Tensor, "n 3"]:
    """The bump of a material; zeros where it has none."""
    return torch.zeros_like(material.base_color) if material.bump is None else material.bump


def _within(share: Tensor, ends: tuple[float, float]) -> Tensor:
    """A share of a range; the whole range from 0 to 1 leaves it as it is."""
    return share if ends == (0.0, 1.0) else ends[0] + (ends[1] - ends[0]) * share


def _logit(value: float, ends: tuple[float, float]) -> float:
    """Whose sigmoid is `value` in its range, or the nearest that is not stuck at an end."""
    low, high = ends
    share = 0.5 if high <= low else min(max((value - low) / (high - low), 1e-3), 1 - 1e-3)
    return math.log(share / (1 - share))
