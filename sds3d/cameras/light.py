"""The shading law: light, shading mode and background of a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.config.ramp import Ramp
from sds3d.errors import ConfigError, InputError
from sds3d.interfaces import Buffer, Cameras, KnownMaterial, Shading, ShadingMode
from sds3d.moment import Moment
from sds3d.ops.skies import read_environment
from sds3d.rng import Stream


@dataclass(frozen=True, kw_only=True)
class ShadingConfig:
    """How views are lit and what stands behind the object."""

    background: Literal["random", "white", "black", "gray", "scene"] = option(
        "random",
        help="plain colour behind the object; random stops the scene from hiding in it; scene = its own",
    )
    white_frac: float = option(0.12, help="share of white among random backgrounds", ge=0.0, le=1.0)
    lit: Ramp = option(
        Ramp.constant(0.0), help="share of steps rendered with light instead of plain albedo", ge=0.0, le=1.0
    )
    textureless_frac: float = option(
        0.5, help="of the lit steps, share that hides the colour (under a lamp)", ge=0.0, le=1.0
    )
    ambient: float = option(0.3, help="ambient part of the lamp's light", ge=0.0, le=1.0)
    light: Literal["lamp", "environment"] = option(
        "lamp",
        help="of lit steps: lamp = one light near the camera on a matte surface; environment = light from all sides on "
        "base colour, metallic and roughness (mesh and tetmesh scenes)",
    )
    environments: tuple[str, ...] = option(
        ("studio",),
        help="names or lat-long files (.hdr, .png), one drawn per step; see `sds3d relight --help`",
        path=True,
    )
    turning: Literal["step", "view"] = option(
        "view", help="turn the environment anew at every step, or for every view of a step"
    )
    anchor: Literal["world", "camera"] = option(
        "world", help="what the environment stands still against: the object, or the camera as it goes round"
    )
    turn_deg: tuple[float, float] = option(
        (-180.0, 180.0),
        help="range of the random turn about the vertical; [0, 0] = none",
        ge=-360.0,
        le=360.0,
    )
    intensity: float = option(
        1.0, help="factor on the environment; at 1 it lights white matte surfaces to 0.8 in the mean", ge=0.0
    )
    specular: float = option(
        1.0, help="factor on reflections of non-metals; 0 = matte, for priors that know no highlights", ge=0.0
    )

    @property
    def uses_environment(self) -> bool:
        """Whether any step is lit by an environment."""
        return self.light == "environment" and max(self.lit.start, self.lit.end) > 0.0

    @property
    def always_environment(self) -> bool:
        """Whether every step is lit by an environment and shows colours."""
        lit = min(self.lit.start, self.lit.end) >= 1.0
        return self.light == "environment" and lit and self.textureless_frac == 0.0

    def check(self) -> None:
        """Raise ConfigError for environments that cannot be read, or a range the wrong way round."""
        if self.turn_deg[0] > self.turn_deg[1]:
            raise ConfigError(
                f"shading.turn_deg: got {list(self.turn_deg)}, expected the smaller value first"
            )
        if not self.uses_environment:
            return
        if not self.environments:
            raise ConfigError("shading.environments: empty; name at least one, e.g. [studio]")
        for name in self.environments:
            try:
                read_environment(name)
            except InputError as error:
                raise ConfigError(f"shading.environments: {error}") from error


class ShadingLaw:
    """Draws one shading per step: mode and environment for the whole batch, background, light and turn per view.

    `also` and `known_materials` say what renders must hold besides their picture; they change nothing else.
    """

    def __init__(
        self,
        config: ShadingConfig,
        *,
        also: Sequence[Buffer] = (),
        known_materials: Sequence[KnownMaterial] = (),
    ) -> None:
        self.config, self.also, self.known_materials = config, tuple(also), tuple(known_materials)

    def sample(self, now: Moment, cameras: Cameras, stream: Stream) -> Shading:
        """Albedo, or with probability `lit` textureless or coloured under a light."""
        count = len(cameras)
        background = self._background(count, stream)
        u = stream.fork("mode").uniform(2)
        if u[0] >= self.config.lit.at(now):
            return Shading(background=background, also=self.also)
        textureless = bool(u[1] < self.config.textureless_frac)
        if self.config.light == "environment" and not textureless:
            return self._environment(cameras, background, stream)
        mode: ShadingMode = "textureless" if textureless else "lambertian"
        # DreamFusion's light: the camera direction plus unit Gaussian noise (arXiv:2209.14988, appendix A.2).
        direction = F.normalize(cameras.c2w[:, :3, 3], dim=1) + stream.fork("light").normal(count, 3)
        light = F.normalize(direction, dim=1)
        return Shading(
            mode=mode, background=background, light=light, ambient=self.config.ambient, also=self.also
        )

    def _environment(
        self, cameras: Cameras, background: Float[Tensor, "b 3"] | None, stream: Stream
    ) -> Shading:
        """An environment of the list, turned at random."""
        config, count = self.config, len(cameras)
        index = int(stream.fork("environment").uniform(1) * len(config.environments))
        low, high = config.turn_deg
        turns = 1 if config.turning == "step" else count
        turn = (low + (high - low) * stream.fork("turn").uniform(turns)).expand(count)
        if config.anchor == "camera":
            turn = turn + cameras.azimuth_deg
        return Shading(
            mode="pbr",
            background=background,
            environment=config.environments[index],
            turn_deg=turn,
            intensity=config.intensity,
            specular=config.specular,
            also=self.also,
            known_materials=self.known_materials,
        )

    def _background(self, count: int, stream: Stream) -> torch.Tensor | None:
        if self.config.background == "scene":
            return None
        plain = {"white": 1.0, "black": 0.0, "gray": 0.5}
        if self.config.background in plain:
            return torch.full((count, 3), plain[self.config.background])
        colors = stream.fork("background").uniform(count, 3)
        white = stream.fork("white").uniform(count, 1) < self.config.white_frac
        return torch.where(white, torch.ones_like(colors), colors)
