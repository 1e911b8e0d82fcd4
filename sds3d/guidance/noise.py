"""Noise sources: where the noise of a step comes from. Each is one small class and one table line."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.guidance.surface_noise import SurfaceNoise
from sds3d.interfaces import Cameras, NoiseSource, Render
from sds3d.moment import Moment
from sds3d.rng import Stream

Shape = tuple[int, int, int, int]


class FreshNoise(NoiseSource):
    """Independent noise for every view and step."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of fresh noise."""

        offset: float = option(
            0.0, help="size of a constant per channel added to the noise (offset noise)", ge=0.0
        )

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def sample(
        self, shape: Shape, view: Render, cameras: Cameras, now: Moment, stream: Stream
    ) -> Float[Tensor, "b c h w"]:
        """N(0, I), plus offset * N(0, 1) per channel: then the total variance is 1 + offset^2."""
        noise = stream.normal(*shape)
        if self.config.offset > 0:
            noise = noise + self.config.offset * stream.fork("offset").normal(*shape[:2], 1, 1)
        return noise


class FixedNoise(NoiseSource):
    """One noise image for all views and steps of a run (Consistent3D, arXiv:2401.09050)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of fixed noise."""

    def __init__(self, config: Config) -> None:
        super().__init__()

    def sample(
        self, shape: Shape, view: Render, cameras: Cameras, now: Moment, stream: Stream
    ) -> Float[Tensor, "b c h w"]:
        """The noise of step 0, a pure function of the seed."""
        return stream.at(0).fork("fixed").normal(1, *shape[1:]).expand(shape).contiguous()


NOISES: dict[str, Any] = {"fixed": FixedNoise, "fresh": FreshNoise, "surface": SurfaceNoise}
