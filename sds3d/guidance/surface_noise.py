"""Noise that sticks to the surface of the object."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.config.ramp import Ramp
from sds3d.interfaces import Cameras, NoiseSource, Render
from sds3d.moment import Moment
from sds3d.ops.surface_noise import surface_noise
from sds3d.rng import Stream, derive_seed

CELL_PX = 0.6  # default side of a cell, in pixels of the noise


def unshuffle_factor(channels: int) -> int:
    """F where x has 3 f^2 channels, as an RGB image has after pixel-unshuffling by f; otherwise 1, a latent."""
    factor = math.isqrt(channels // 3)
    return factor if channels == 3 * factor**2 else 1


class SurfaceNoise(NoiseSource):
    """White in every view, attached to the surface between views: G(p) = sum_A W(A) / sqrt(count).

    Works for every scene, since it needs only depth and alpha. Once per step the noise is renewed a little, with
    the covariance of eps <- sqrt(1 - gamma) eps + sqrt(gamma) n: gamma 0 keeps it for the whole run (an ODE), gamma 1
    makes it fresh at every step (SDS). The noise texture is a function of seed and age, so its state is four numbers.

    Where x is a pixel-unshuffled image the noise is made at image resolution and then unshuffled, a permutation: it
    sticks to the surface to the pixel, not to the 4 x 4 block.

    Source: Yan et al. 2025 (Consistent Flow Distillation, arXiv:2501.05445); cells and renewal are our own, see
    `sds3d.ops.surface_noise`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of surface noise."""

        gamma: Ramp = option(
            Ramp(start=0.01, end=1e-4, over_frac=(0.2, 0.4)),
            help="share of the noise's variance renewed per step; 0 = never, 1 = fresh noise",
            ge=0.0,
            le=1.0,
        )
        background: Literal["fixed", "fresh"] = option(
            "fixed",
            help="beside the object: one image for all views, renewed like the surface, or new per step",
        )
        alpha_min: float = option(0.1, help="pixels less opaque than this see no surface", ge=1e-3, le=1.0)
        cell_m: float = option(
            0.0, help="side of a noise cell in metres; 0 = 0.6 pixels of x at the world's centre", ge=0.0
        )
        samples: int = option(3, help="surface samples along a pixel's side", ge=1, le=16)
        pixel_unshuffle: int = option(
            0, help="by which x is an unshuffled image; 0 = f where x has 3 f^2 channels, else 1", ge=0, le=64
        )

    age: Tensor
    renewals: Tensor
    last_step: Tensor
    cell_m: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("age", torch.zeros((), dtype=torch.float64))
        self.register_buffer("renewals", torch.zeros((), dtype=torch.int64))  # times that gamma was 1
        self.register_buffer("last_step", torch.full((), -1))
        self.register_buffer("cell_m", torch.full((), config.cell_m, dtype=torch.float64))

    def sample(
        self, shape: tuple[int, int, int, int], view: Render, cameras: Cameras, now: Moment, stream: Stream
    ) -> Float[Tensor, "b c h w"]:
        """N(0, I) per view; the same cell of the surface brings the same number to every view of the step."""
        factor = self.config.pixel_unshuffle or unshuffle_factor(shape[1])
        views, fine = shape[0], (shape[1] // factor**2, shape[2] * factor, shape[3] * factor)
        self._renew(now)
        if self.cell_m == 0.0:
            self.cell_m.fill_(CELL_PX * _pixel_m(cameras, fine[1]))
        alpha, depth = view.alpha.detach()[:, 0], view.depth.detach()[:, 0]
        solid = (alpha >= self.config.alpha_min) & (depth > 0)
        noise, covered = surface_noise(
            torch.where(solid, depth / alpha.clamp(min=self.config.alpha_min), 0.0),
            cameras,
            fine,
            cell_m=float(self.cell_m),
            samples=self.config.samples,
            seed=derive_seed(stream.seed, stream.name, "surface", int(self.renewals)),
            age=float(self.age),
        )
        if self.config.background == "fresh":
            noise = torch.where(
                covered[:, None], noise, stream.normal(views, *fine, device=noise.device).to(noise)
            )
        return F.pixel_unshuffle(noise, factor) if factor > 1 else noise

    def _renew(self, now: Moment) -> None:
        """Age by one step, once per step however many rules ask."""
        if int(self.last_step) == now.step:
            return
        gamma = self.config.gamma.at(now) if int(self.last_step) >= 0 else 0.0
        self.last_step.fill_(now.step)
        if gamma >= 1.0:
            self.renewals.add_(1)
            self.age.zero_()
        else:
            self.age.sub_(0.5 * math.log1p(-gamma))


def _pixel_m(cameras: Cameras, rows: int) -> float:
    """Height of a pixel of the noise at the distance of the world's centre, mean over the views."""
    half = torch.tan(torch.deg2rad(cameras.fov_deg.double()) / 2.0)
    return float((2.0 * cameras.radius.double() * half).mean()) / rows
