"""How a cloud of Gaussians is looked at: the views that it learns from, those that are held out, and the pictures."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sds3d.cameras.orbit import orbit_cameras
from sds3d.interfaces import Cameras
from sds3d.mathx.harmonics import sh_colors
from sds3d.mesh.splat_cloud import GaussianCloud
from sds3d.ops.splat import SplatImage, rasterize_gaussians
from sds3d.rng import Stream
from sds3d.slices import Slice

ELEVATION_DEG = (-10.0, 65.0)
RADIUS_M, FOV_DEG = 3.3, 40.0
SUPERSAMPLES = 4  # per side of a pixel of the reference
_VIEWS_AT_ONCE = 4


def scattered_cameras(count: int, size_px: int, rng: Stream) -> Cameras:
    """Views from everywhere that training looks from: even azimuths, elevations uniform in sine."""
    low, high = (torch.tensor(angle).deg2rad().sin() for angle in ELEVATION_DEG)
    azimuth = (torch.arange(count) + rng.fork("azimuth").uniform(count)) * (360.0 / count)
    elevation = (low + (high - low) * rng.fork("elevation").uniform(count)).asin().rad2deg()
    level = torch.ones(count)
    return orbit_cameras(azimuth, elevation, RADIUS_M * level, FOV_DEG * level, size_px)


def look(cloud: GaussianCloud, cameras: Cameras, background: Float[Tensor, "b 3"]) -> SplatImage:
    """The cloud before a background; with spherical harmonics every Gaussian shows each camera its own colour."""

    def seen(some: Cameras, behind: Tensor, color: Tensor) -> SplatImage:
        return rasterize_gaussians(
            cloud.means, cloud.quats_wxyz, cloud.scales, cloud.opacity, color, some, behind
        )

    if cloud.harmonics is None:
        return seen(cameras, background, cloud.color)
    views = []
    for index in range(len(cameras)):
        one = Slice(index, index + 1, len(cameras))
        toward = cloud.means - cameras.c2w[index, :3, 3].to(cloud.means)
        color = sh_colors(cloud.color, cloud.harmonics, F.normalize(toward, dim=-1))
        views.append(seen(one.of(cameras), background[one.rows], color))
    return SplatImage(
        rgb=torch.cat([view.rgb for view in views]),
        alpha=torch.cat([view.alpha for view in views]),
        depth=torch.cat([view.depth for view in views]),
    )


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Fixed pictures of a cloud before black, with their alpha, so that any background can stand behind."""

    cameras: Cameras
    rgb: Float[Tensor, "b 3 H W"]
    alpha: Float[Tensor, "b 1 H W"]

    @classmethod
    @torch.no_grad()
    def of(cls, cloud: GaussianCloud, cameras: Cameras, supersamples: int = 1) -> "Pictures":
        """What the cameras see; with supersamples s, means over s x s picture elements: hardly any aliasing."""
        shown = []
        for piece in Slice.whole(len(cameras)).pieces(_VIEWS_AT_ONCE):
            some = piece.of(cameras)
            black = cloud.means.new_zeros(len(piece), 3)
            image = look(cloud, some.resized(supersamples * some.width_px), black)
            shown.append(F.avg_pool2d(torch.cat([image.rgb, image.alpha], 1), supersamples))
        rgb, alpha = torch.cat(shown).split([3, 1], 1)
        return cls(cameras=cameras, rgb=rgb, alpha=alpha)

    def before(self, background: Float[Tensor, "b 3"]) -> Float[Tensor, "b 3 H W"]:
        """The pictures over these backgrounds."""
        return self.rgb + (1 - self.alpha) * background[:, :, None, None]

    def some(self, index: Tensor) -> "Pictures":
        """A selection."""
        tensors: dict[str, Any] = {
            name: value[index] for name, value in vars(self.cameras).items() if isinstance(value, Tensor)
        }
        return Pictures(
            cameras=replace(self.cameras, **tensors), rgb=self.rgb[index], alpha=self.alpha[index]
        )


def psnr(a: Pictures, b: Pictures) -> float:
    """Over all pixels, each picture before black and before white: no colour can hide before both."""
    errors = [
        (a.before(behind) - b.before(behind)).square().mean()
        for behind in (a.rgb.new_zeros(len(a.rgb), 3), a.rgb.new_ones(len(a.rgb), 3))
    ]
    mean = float(torch.stack(errors).mean())
    return 10 * float(torch.tensor(1 / max(mean, 1e-10)).log10())
