"""The camera law: where the views of a step are taken from."""

from dataclasses import dataclass

import torch

from sds3d.cameras.orbit import orbit_cameras
from sds3d.config.option import option
from sds3d.config.ramp import Ramp
from sds3d.errors import ConfigError
from sds3d.interfaces import Cameras
from sds3d.moment import Moment
from sds3d.rng import Stream

SIZE_STEP_PX = 8


@dataclass(frozen=True, kw_only=True)
class CameraConfig:
    """Ranges of the training cameras. Degrees, metres, pixels."""

    batch: int = option(4, help="views per step", ge=1, le=256)
    views_per_object: int = option(
        1,
        help="consecutive views that look from evenly spaced azimuths; 4 for MVDream-class priors",
        ge=1,
        le=16,
    )
    micro_batch: int | None = option(
        None,
        help="views rendered and guided at once, the others of the step after them; null = as many as fit",
        ge=1,
        le=256,
    )
    render_px: Ramp = option(
        Ramp.constant(64.0), help="side of the rendered image, rounded to 8 px", ge=8, le=4096
    )
    hold_steps: int = option(
        1,
        help="optimisation steps that share one set of views and one clean target (rules with a target)",
        ge=1,
    )
    azimuth_deg: tuple[float, float] = option((0.0, 360.0), help="range of azimuths, 0 = front")
    elevation_deg: tuple[float, float] = option((-10.0, 45.0), help="range of ordinary elevations")
    overhead_deg: tuple[float, float] = option((50.0, 80.0), help="range of overhead elevations")
    overhead_frac: float = option(0.15, help="share of overhead views", ge=0.0, le=1.0)
    radius: tuple[float, float] = option((3.1, 3.5), help="distance from the origin")
    fov_deg: tuple[float, float] = option((40.0, 40.0), help="vertical field of view")
    widen: Ramp = option(
        Ramp.constant(1.0),
        help="progressive widening: share of the azimuth and elevation ranges in use",
        ge=0.0,
        le=1.0,
    )

    def __post_init__(self) -> None:
        if self.batch % self.views_per_object:
            raise ConfigError(
                f"batch: got {self.batch}, expected a multiple of views_per_object = {self.views_per_object}"
            )


class CameraLaw:
    """Draws balanced orbit cameras: one azimuth per equal sector of the range, so no side is starved.

    With v views per object every v consecutive cameras share elevation, radius and field of view, and their azimuths
    are 360 / v degrees apart (MVDream, arXiv:2308.16512); the ranges are then those of the first of them.
    """

    def __init__(self, config: CameraConfig) -> None:
        self.config = config

    def size_px(self, now: Moment) -> int:
        """Side of the rendered image at this moment."""
        return max(SIZE_STEP_PX, round(self.config.render_px.at(now) / SIZE_STEP_PX) * SIZE_STEP_PX)

    def sample(self, now: Moment, stream: Stream) -> Cameras:
        """`batch` cameras; overhead views are spread over the batch at random."""
        config, views = self.config, self.config.views_per_object
        count, share = config.batch // views, config.widen.at(now)
        u = stream.uniform(5, count)
        offset = stream.fork("sector").uniform(1)
        order = torch.argsort(stream.fork("order").uniform(count))
        sector = (torch.arange(count)[order] + u[0]) / count
        low, high = config.azimuth_deg
        # A full turn has no edges: rotate the sectors as a whole. A partial range is centred on the front.
        turn = (sector + offset) % 1.0 if high - low >= 360.0 else sector
        azimuth = low + (high - low) * turn
        azimuth = share * ((azimuth + 180.0) % 360.0 - 180.0) if share < 1.0 else azimuth % 360.0

        def span(bounds: tuple[float, float], position: torch.Tensor) -> torch.Tensor:
            return bounds[0] + (bounds[1] - bounds[0]) * position

        overhead = u[1] < config.overhead_frac * (share >= 1.0)
        middle = 15.0
        ordinary = middle + share * (span(config.elevation_deg, u[2]) - middle)
        elevation = torch.where(overhead, span(config.overhead_deg, u[2]), ordinary)
        radius, fov = span(config.radius, u[3]), span(config.fov_deg, u[4])
        if views > 1:
            azimuth = (azimuth[:, None] + torch.arange(views) * (360.0 / views)).flatten() % 360.0
            elevation, radius, fov = (each.repeat_interleave(views) for each in (elevation, radius, fov))
        return orbit_cameras(azimuth, elevation, radius, fov, self.size_px(now))
