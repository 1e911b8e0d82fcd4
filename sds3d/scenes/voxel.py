"""`VoxelScene`: a dense pyramid of voxel grids, the fastest scene on a CPU."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sds3d.config.option import option
from sds3d.errors import ConfigError
from sds3d.interfaces import Cameras, Material, ParamGroup, Render, Scene, Shading, Surface
from sds3d.mathx import penalty
from sds3d.mesh.isosurface import auto_iso, marching_cubes
from sds3d.ops.voxel import EMPTY_LOGIT, VoxelImage, march_voxels
from sds3d.ops.voxel_grid import assemble_levels, grid_variation
from sds3d.rng import Stream
from sds3d.scenes.shade import irradiance, lamp_of

_DENSITY_GAIN, _COLOR_GAIN = 3.0, 2.0  # logits per unit of a raw parameter: Adam moves both at a useful pace
_LOGIT_LIMIT = 6.0  # beyond, a voxel is empty or opaque whatever its logit, so its variation means nothing
_INWARD_CELLS = (0.0, 0.5, 1.0)  # where the colour under a surface point is looked up
_POINTS_PER_CHUNK = 1 << 18
_HARD_STEP = 0.5  # factor on the step of evaluation renders where matter ends within less than a voxel


@dataclass(frozen=True)
class _View:
    """What one render keeps for its penalties."""

    grid: Tensor
    hardness: float


class VoxelScene(Scene):
    """Density and colour on a sum of voxel grids from coarse to fine, in a cube around the origin.

    With h the sum of all levels, upsampled: density logit = k (blob + 3 h_0), colour = sigmoid(2 h_1..3). All levels
    start at zero, so the scene starts as a grey blob. The hardness k may grow during the run: no surface looks like a
    field that ends softly. Sample positions are jittered in training mode and fixed in evaluation mode. Lit modes shade
    each pixel once, by its mean normal.
    """

    penalty_names = ("opacity", "entropy", "tv_density", "tv_color")

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`kind: voxel`."""

        resolutions: tuple[int, ...] = option(
            (12, 24, 48), help="voxels per side of each level, rising", ge=2, le=256
        )
        half_extent_m: float = option(1.05, help="half the side of the cube that can hold matter", ge=0.01)
        density_scale: float = option(12.0, help="density (1/m) where softplus(logit) is 1", ge=0.0)
        step_voxels: float = option(
            1.0, help="distance between samples of a ray, in fine voxels", ge=0.1, le=4.0
        )
        blob_scale: float = option(10.0, help="slope of the first logits, per metre towards the centre")
        blob_radius_m: float = option(0.42, help="where the first logits cross zero", ge=0.0)
        blob_range: tuple[float, float] = option((-5.0, 3.0), help="clamp of the first logits")
        hardness: float = option(
            1.0,
            help="factor on density logits at the end of the run: how sharply matter ends",
            ge=1.0,
            le=1000.0,
        )
        harden_frac: tuple[float, float] = option(
            (0.3, 0.85),
            help="part of the run in which it grows from 1, evenly in its logarithm",
            ge=0.0,
            le=1.0,
        )
        lr: float = option(0.05, help="learning rate of the finest level", ge=0.0)
        lr_per_level: float = option(
            1.0, help="each coarser level learns faster by this factor", ge=0.1, le=10.0
        )
        roughness: float = option(0.6, help="glTF roughness of the exported material", ge=0.0, le=1.0)

    def __init__(self, config: Config, rng: Stream) -> None:
        """Nothing in the start is random: `rng` is there because all scenes are made alike."""
        super().__init__()
        if list(config.resolutions) != sorted(set(config.resolutions)) or not config.resolutions:
            raise ConfigError(
                f"scene.resolutions: got {list(config.resolutions)}, expected rising numbers, e.g. [12, 24, 48]"
            )
        if config.harden_frac[0] >= config.harden_frac[1]:
            raise ConfigError(
                f"scene.harden_frac: got {list(config.harden_frac)}, expected rising numbers, e.g. [0.3, 0.85]"
            )
        self.config = config
        self.levels = nn.ParameterList(torch.zeros(1, 4, n, n, n) for n in config.resolutions)
        axis = torch.linspace(-config.half_extent_m, config.half_extent_m, config.resolutions[-1])
        radius = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).norm(dim=0)
        blob = config.blob_scale * (config.blob_radius_m - radius)
        self.base: Tensor
        self.register_buffer("base", blob.clamp(*config.blob_range))

    @property
    def cell_m(self) -> float:
        """Distance between fine voxels."""
        return 2 * self.config.half_extent_m / (self.config.resolutions[-1] - 1)

    def hardness(self, progress: float) -> float:
        """The factor on density logits at this part of the run."""
        first, last = self.config.harden_frac
        way = min(max((progress - first) / (last - first), 0.0), 1.0)
        return float(self.config.hardness**way)

    def grid(self, *, progress: float = 1.0) -> Float[Tensor, "n n n 4"]:
        """Density logit and colour of every fine voxel, axes z, y, x, channel."""
        hardness = self.hardness(progress)
        return assemble_levels(
            list(self.levels),
            self.base * hardness,
            density_gain=_DENSITY_GAIN * hardness,
            color_gain=_COLOR_GAIN,
        )

    def render(self, cameras: Cameras, shading: Shading, rng: Stream, *, progress: float = 1.0) -> Render:
        """Render b views; all randomness is one number per ray from `rng`.

        Normals come with lit modes, in evaluation mode and on request. Raises ValueError where a lit mode has no
        lights.
        """
        size = (len(cameras), cameras.height_px, cameras.width_px)
        grid = self.grid(progress=progress)
        finer = _HARD_STEP if self.config.hardness > 1.0 and not self.training else 1.0
        background = shading.background
        if background is None:
            background = grid.new_zeros(len(cameras), 3)
        jitter = rng.uniform(*size, device=grid.device) if self.training else grid.new_full(size, 0.5)
        image = march_voxels(
            grid,
            cameras,
            background,
            half_extent=self.config.half_extent_m,
            step_m=finer * self.config.step_voxels * self.cell_m,
            density_scale=self.config.density_scale,
            jitter=jitter,
            with_normals=shading.mode != "albedo" or "normal" in shading.also or not self.training,
        )
        normal = None if image.normal is None else F.normalize(image.normal, dim=1, eps=1e-6)
        rgb = image.rgb if shading.mode == "albedo" else _lit(image, normal, shading, background)
        own = _View(grid, self.hardness(progress))
        return Render(
            rgb=rgb, alpha=image.alpha, depth=image.depth, normal=normal, albedo=image.rgb, private=own
        )

    def groups(self) -> Sequence[ParamGroup]:
        """One group per level."""
        coarser = range(len(self.levels) - 1, -1, -1)
        return [
            ParamGroup(name=f"voxel_{n}", params=[level], lr=self.config.lr * self.config.lr_per_level**up)
            for n, level, up in zip(self.config.resolutions, self.levels, coarser, strict=True)
        ]

    def penalties(self, view: Render) -> Mapping[str, Float[Tensor, ""]]:
        """Regularisers of one render.

        opacity: mean alpha. entropy: mean binary entropy of alpha (nats). tv_density: mean squared difference of
        neighbouring logits before the hardness, clamped to +- 6, summed over the axes. tv_color: the same of colours.
        """
        own = view.private
        if not isinstance(own, _View):
            raise TypeError("penalties() needs a Render made by this scene")
        tv_density, tv_color = grid_variation(own.grid, _LOGIT_LIMIT * own.hardness)
        return {
            "opacity": view.alpha.mean(),
            "entropy": penalty.binary_entropy(view.alpha).mean(),
            "tv_density": tv_density / own.hardness**2,
            "tv_color": tv_color,
        }

    @torch.no_grad()
    def surface(self, cells_per_side: int, *, iso_factor: float = 1.0) -> Surface:
        """Marching cubes on the trilinear logit at the level of an automatic iso (see `auto_iso`). Raises ExportError.

        The logit is what is linear between voxels; between densities that differ by orders of magnitude a straight line
        puts the surface almost onto the outer voxel.
        """
        logit = self.grid()[..., 0]
        size = (cells_per_side + 1,) * 3
        fine = F.interpolate(logit[None, None], size=size, mode="trilinear", align_corners=True)[0, 0]
        fine = fine.permute(2, 1, 0)  # x y z
        half = self.config.half_extent_m
        iso = iso_factor * auto_iso(self._density(fine), 2 * half / cells_per_side)
        level = self._logit(iso)
        return marching_cubes(fine, level, half, outside=min(float(fine.min()), level) - 1.0)

    @torch.no_grad()
    def material(self, points: Float[Tensor, "n 3"]) -> Material:
        """Colour at points on the surface, weighted by density over the voxel behind them: what renders show.

        On the surface itself half of the blended voxels are empty, and no render ever taught them a colour.
        """
        grid = self.grid()
        colors = [_under(grid, part, self) for part in points.to(grid).split(_POINTS_PER_CHUNK)]
        base_color = torch.cat([points.new_zeros(0, 3).to(grid), *colors])
        one = torch.ones_like(base_color[:, :1])
        return Material(base_color=base_color, metallic=0 * one, roughness=self.config.roughness * one)

    def _logit(self, density: float) -> float:
        """The logit of a density (1/m) above zero."""
        x = density / self.config.density_scale + math.log1p(math.exp(EMPTY_LOGIT))
        return x + math.log(-math.expm1(-x))

    def _density(self, logit: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """1/m, as the renderer sees it."""
        excess = F.softplus(logit) - math.log1p(math.exp(EMPTY_LOGIT))
        return self.config.density_scale * excess.clamp_min(0)


def _lit(
    image: VoxelImage,
    normal: Float[Tensor, "b 3 H W"] | None,
    shading: Shading,
    background: Float[Tensor, "b 3"],
) -> Float[Tensor, "b 3 H W"]:
    """The image under a light: what is in front of the background, times the irradiance."""
    assert normal is not None
    toward = lamp_of(shading)[:, None, None, :].to(normal)
    white = irradiance(normal.permute(0, 2, 3, 1), toward, shading.ambient).permute(0, 3, 1, 2)
    behind = (1 - image.alpha) * background[:, :, None, None]
    # Colours are already weighted by alpha; without texture the surface is white instead.
    front = image.alpha if shading.mode == "textureless" else image.rgb - behind
    return front * white + behind


def _lookup(
    grid: Float[Tensor, "z y x 4"], points: Float[Tensor, "n 3"], half: float
) -> Float[Tensor, "n 4"]:
    """Trilinear values at world points; beyond the cube those of its border."""
    volume = grid.permute(3, 0, 1, 2)[None]
    place = (points / half)[None, None, None]
    return F.grid_sample(volume, place, padding_mode="border", align_corners=True)[0, :, 0, 0].T


def _under(grid: Float[Tensor, "z y x 4"], points: Float[Tensor, "n 3"], scene: VoxelScene) -> Tensor:
    """Colour (n 3) averaged over a short way into the matter, weighted by density."""
    half, cell = scene.config.half_extent_m, scene.cell_m
    axes = 0.5 * cell * torch.eye(3).to(points)
    ahead = [
        _lookup(grid, points + axis, half)[:, 0] - _lookup(grid, points - axis, half)[:, 0] for axis in axes
    ]
    inward = F.normalize(torch.stack(ahead, -1), dim=-1)
    values = torch.stack([_lookup(grid, points + cell * way * inward, half) for way in _INWARD_CELLS])
    weight = scene._density(values[..., :1]) + 1e-6
    return (weight * values[..., 1:]).sum(0) / weight.sum(0)
