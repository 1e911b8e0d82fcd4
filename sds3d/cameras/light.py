"""The shading law: light, shading mode and background of a step."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from sds3d.config.option import option
from sds3d.config.ramp import Ramp
from sds3d.interfaces import Cameras, Shading, ShadingMode
from sds3d.moment import Moment
from sds3d.rng import Stream


@dataclass(frozen=True, kw_only=True)
class ShadingConfig:
    """How views are lit and what stands behind the object."""

    background: Literal["random", "white", "black", "gray", "scene"] = option(
        "random",
        help="plain colour behind the object; random stops the scene from hiding in it; scene = its own",
    )
    white_frac: float = option(0.12, help="share of white among random backgrounds", ge=0.0, le=1.0)
    lit: Ramp = option(Ramp.constant(0.0), help="share of steps rendered with light instead of plain albedo")
    textureless_frac: float = option(
        0.5, help="of the lit steps, share that hides the colour", ge=0.0, le=1.0
    )
    ambient: float = option(0.3, help="ambient part of the light in lit steps", ge=0.0, le=1.0)


class ShadingLaw:
    """Draws one shading per step: mode for the whole batch, background and light per view."""

    def __init__(self, config: ShadingConfig) -> None:
        self.config = config

    def sample(self, now: Moment, cameras: Cameras, stream: Stream) -> Shading:
        """Albedo, or with probability `lit` textureless / lambertian under a light near the camera."""
        count = len(cameras)
        background = self._background(count, stream)
        u = stream.fork("mode").uniform(2)
        if u[0] >= self.config.lit.at(now):
            return Shading(background=background)
        mode: ShadingMode = "textureless" if u[1] < self.config.textureless_frac else "lambertian"
        # DreamFusion's light: the camera direction plus unit Gaussian noise (arXiv:2209.14988, appendix A.2).
        direction = F.normalize(cameras.c2w[:, :3, 3], dim=1) + stream.fork("light").normal(count, 3)
        light = F.normalize(direction, dim=1)
        return Shading(mode=mode, background=background, light=light, ambient=self.config.ambient)

    def _background(self, count: int, stream: Stream) -> torch.Tensor | None:
        if self.config.background == "scene":
            return None
        plain = {"white": 1.0, "black": 0.0, "gray": 0.5}
        if self.config.background in plain:
            return torch.full((count, 3), plain[self.config.background])
        colors = stream.fork("background").uniform(count, 3)
        white = stream.fork("white").uniform(count, 1) < self.config.white_frac
        return torch.where(white, torch.ones_like(colors), colors)
