"""`NerfScene`: a density field rendered by ray marching through an occupancy grid."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sds3d import ops
from sds3d.interfaces import Cameras, Material, Optimizer, ParamGroup, Render, Scene, Shading, Surface
from sds3d.mathx import penalty
from sds3d.mesh.isosurface import auto_iso, marching_cubes
from sds3d.ops.occupancy import OccupancyGrid
from sds3d.ops.volume import RaySamples, accumulate, camera_rays, composite_samples, sphere_interval
from sds3d.rng import Stream
from sds3d.scenes.hashgrid import HashGridField, HashGridFieldConfig, init_network
from sds3d.scenes.lazy import Lazy
from sds3d.scenes.shade import shade

_NORMAL_WEIGHT = 1e-3  # samples that weigh less do not show in a pixel's normal
_POINTS_PER_CHUNK = 1 << 18  # bounds the memory of evaluations without gradient
_TV_POINTS = 2048


@dataclass(frozen=True)
class _View:
    """What one render keeps for its penalties."""

    samples: RaySamples
    weights: Float[Tensor, " n"]
    points: Float[Tensor, "n 3"]
    directions: Float[Tensor, "n 3"]
    rng: Stream
    progress: float
    normals: tuple[Tensor, Tensor] | None  # (indices of the heavy samples, their unit normals)


class NerfScene(Scene):
    """A hash-grid density field in a ball around the origin, alpha-composited over a background.

    Rendering is stratified in training mode and samples bin centres in evaluation mode. Lit modes shade each
    pixel once, from the mean albedo and the mean normal along its ray.
    """

    penalty_names = ("opacity", "entropy", "orientation", "distortion", "tv_density")

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`kind: nerf`."""

        field: HashGridFieldConfig = field(default_factory=HashGridFieldConfig)
        half_extent_m: float = 1.05  # radius of the ball that can hold matter
        samples_per_ray: int = 64
        occupancy_cells: int = 32  # per side
        occupancy_every_steps: int = 16
        occupancy_warmup_steps: int = 256  # until then every cell is refreshed
        occupancy_threshold: float = 0.01  # optical depth of one step below which a cell may be skipped
        normals: Literal["finite_difference", "analytic"] = "finite_difference"
        normal_step_m: float = 0.03  # half width of the central difference; about two of the finest cells
        background: Literal["black", "learned"] = "black"  # where the shading gives none
        lr_background: float = 0.001

    def __init__(self, config: Config, rng: Stream) -> None:
        super().__init__()
        self.config = config
        self.field = HashGridField(config.field, config.half_extent_m, rng.fork("field"))
        self.occupancy = OccupancyGrid(config.half_extent_m, config.occupancy_cells)
        self.environment: nn.Sequential | None = None
        if config.background == "learned":
            self.environment = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
            init_network(self.environment, rng.fork("environment"))
        self._occupancy_rng = rng.fork("occupancy")

    @property
    def step_m(self) -> float:
        """Length of one step across the middle of the ball."""
        return 2 * self.config.half_extent_m / self.config.samples_per_ray

    def render(self, cameras: Cameras, shading: Shading, rng: Stream, *, progress: float = 1.0) -> Render:
        """Render b views; all randomness is the jitter of the samples, one number per ray, from `rng`."""
        size = (len(cameras), cameras.height_px, cameras.width_px)
        origins, directions, cosine = camera_rays(
            cameras.c2w, cameras.intrinsics, cameras.width_px, cameras.height_px
        )
        origins, directions = origins.reshape(-1, 3), directions.reshape(-1, 3)
        samples = self._march(origins, directions, rng)
        toward = directions[samples.ray]
        points = origins[samples.ray] + samples.at[:, None] * toward
        density, albedo = self.field.density_color(points, progress=progress)
        weights = composite_samples(density, samples)
        layers = torch.cat([torch.ones_like(albedo[:, :1]), samples.at[:, None], albedo], 1)
        alpha, distance, color = accumulate(weights, layers, samples.ray, samples.rays).split([1, 1, 3], 1)
        depth = distance * cosine.reshape(-1, 1)
        normals, normal = None, None
        behind = (1 - alpha) * self._background(directions, shading, size)
        albedo_rgb = rgb = color + behind
        if shading.mode != "albedo" or "normal" in shading.also:
            normals, normal = self._normals(points, weights, samples, progress)
        if shading.mode != "albedo":
            assert normal is not None
            opaque = alpha.clamp_min(1e-4)
            rgb = alpha * shade(color / opaque, normal, _per_pixel(shading, size)) + behind
        return Render(
            rgb=_image(rgb, size),
            alpha=_image(alpha, size),
            depth=_image(depth, size),
            normal=None if normal is None else _image(normal, size),
            albedo=_image(albedo_rgb, size),
            private=_View(samples, weights, points, toward, rng, progress, normals),
        )

    def groups(self) -> Sequence[ParamGroup]:
        """Encoding, network and, where learned, background."""
        groups = list(self.field.groups())
        if self.environment is not None:
            params = list(self.environment.parameters())
            groups.append(ParamGroup(name="background", params=params, lr=self.config.lr_background))
        return groups

    def adapt(self, view: Render, optimizer: Optimizer, step: int) -> None:
        """Refresh the occupancy grid on its steps."""
        progress = _of(view).progress
        self.occupancy.update(
            step,
            lambda points: self.field.density(points, progress=progress) * self.step_m,
            self._occupancy_rng.at(step),
            every=self.config.occupancy_every_steps,
            warmup_steps=self.config.occupancy_warmup_steps,
            threshold=self.config.occupancy_threshold,
        )

    def penalties(self, view: Render) -> Mapping[str, Float[Tensor, ""]]:
        """All of `penalty_names`; a value is computed only when it is looked up."""
        own = _of(view)
        return Lazy(
            {
                "opacity": lambda: penalty.opacity(view.alpha).mean(),
                "entropy": lambda: penalty.binary_entropy(view.alpha).mean(),
                "orientation": lambda: self._orientation(view, own),
                "distortion": lambda: _distortion(own),
                "tv_density": lambda: self._total_variation(own),
            }
        )

    def surface(self, cells_per_side: int, *, iso_factor: float = 1.0) -> Surface:
        """Marching cubes on the density at an automatic iso. Raises ExportError when the field is empty."""
        half = self.config.half_extent_m
        axis = torch.linspace(-half, half, cells_per_side + 1, device=self.field.encoding.table.device)
        points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(-1, 3)
        with torch.no_grad():
            density = torch.cat([self.field.density(chunk) for chunk in points.split(_POINTS_PER_CHUNK)])
        density = density.view(cells_per_side + 1, cells_per_side + 1, cells_per_side + 1)
        iso = iso_factor * auto_iso(density, 2 * half / cells_per_side)
        return marching_cubes(density, iso, half)

    def material(self, points: Float[Tensor, "n 3"]) -> Material:
        """The field's colour as base colour; dielectric, roughness 0.6."""
        with torch.no_grad():
            chunks = points.split(_POINTS_PER_CHUNK)
            color = torch.cat([self.field.density_color(chunk)[1] for chunk in chunks])
        return Material(
            base_color=color,
            metallic=torch.zeros_like(color[:, :1]),
            roughness=torch.full_like(color[:, :1], 0.6),
        )

    def normals(self, points: Float[Tensor, "n 3"], *, progress: float = 1.0) -> Float[Tensor, "n 3"]:
        """Unit normals -grad sigma / |grad sigma|, differentiable in the parameters.

        "finite_difference": central, six densities per point; coarse where the surface is much thinner than
        `normal_step_m`. "analytic": autograd through the reference encoding, exact but several times slower on
        a CPU (the numba twin has no gradient in the points).
        """
        if self.config.normals == "analytic":
            with torch.enable_grad(), ops.use("reference"):
                at = points.detach().requires_grad_(True)
                density = self.field.density(at, progress=progress)
                (gradient,) = torch.autograd.grad(density.sum(), at, create_graph=True)
        else:
            shift = torch.eye(3, device=points.device) * self.config.normal_step_m
            around = torch.cat([points[:, None] + shift, points[:, None] - shift], 1)  # n 6 3
            ahead, behind = (
                self.field.density(around.reshape(-1, 3), progress=progress).view(-1, 2, 3).unbind(1)
            )
            gradient = ahead - behind
        return nn.functional.normalize(-gradient, dim=-1, eps=1e-8)

    def _march(self, origins: Tensor, directions: Tensor, rng: Stream) -> RaySamples:
        near, far, hit = sphere_interval(origins, directions, self.config.half_extent_m)
        rays = origins.shape[0]
        offset = rng.uniform(rays, device=origins.device) if self.training else origins.new_full((rays,), 0.5)
        return self.occupancy.march(
            origins, directions, near, far, hit, offset, slots=self.config.samples_per_ray, step_m=self.step_m
        )

    def _heavy_normals(self, points: Tensor, weights: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        heavy = (weights.detach() > _NORMAL_WEIGHT).nonzero()[:, 0]
        return heavy, self.normals(points[heavy], progress=progress)

    def _normals(
        self, points: Tensor, weights: Tensor, samples: RaySamples, progress: float
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """(heavy sample indices and normals, unit mean normal of every ray)."""
        heavy, normals = self._heavy_normals(points, weights, progress)
        mean = accumulate(weights[heavy], normals, samples.ray[heavy], samples.rays)
        return (heavy, normals), nn.functional.normalize(mean, dim=-1, eps=1e-8)

    def _background(self, directions: Tensor, shading: Shading, size: tuple[int, int, int]) -> Tensor:
        if shading.background is not None:
            return _spread(shading.background, size)
        if self.environment is None:
            return directions.new_zeros(1, 3)
        x, y, z = directions.unbind(-1)
        basis = torch.stack([x, y, z, x * y, y * z, x * z, x * x - y * y, 3 * z * z - 1], -1)
        return torch.sigmoid(self.environment(basis))

    def _orientation(self, view: Render, own: _View) -> Tensor:
        heavy, normals = own.normals or self._heavy_normals(own.points, own.weights, own.progress)
        total = penalty.orientation(own.weights[heavy], normals, own.directions[heavy]).sum()
        return total / (view.alpha.detach() > 0).sum().clamp_min(1)

    def _total_variation(self, own: _View) -> Tensor:
        rng = own.rng.fork("tv")
        device = self.field.encoding.table.device
        points = (rng.uniform(_TV_POINTS, 3, device=device) * 2 - 1) * self.config.half_extent_m
        shift = torch.eye(3, device=device) * self.step_m
        stencil = torch.cat([points[:, None], points[:, None] + shift], 1).reshape(-1, 3)
        density = self.field.density(stencil, progress=own.progress).view(-1, 4)
        return penalty.total_variation(density[:, 0], density[:, 1:]).mean()


def _of(view: Render) -> _View:
    if not isinstance(view.private, _View):
        raise TypeError("this render was not made by a NerfScene")
    return view.private


def _image(values: Float[Tensor, "r c"], size: tuple[int, int, int]) -> Float[Tensor, "b c h w"]:
    return values.view(*size, -1).permute(0, 3, 1, 2)


def _spread(per_view: Float[Tensor, "b c"], size: tuple[int, int, int]) -> Float[Tensor, "r c"]:
    return per_view.repeat_interleave(size[1] * size[2], 0)


def _per_pixel(shading: Shading, size: tuple[int, int, int]) -> Shading:
    """The same shading with one light per pixel, which is what `shade` broadcasts against."""
    if shading.light is None:
        return shading
    return replace(shading, light=_spread(shading.light, size), background=None)


def _distortion(own: _View) -> Tensor:
    samples = own.samples
    middle, delta = 0.5 * (samples.start + samples.end), samples.end - samples.start
    weights = samples.dense(own.weights)
    return penalty.distortion(weights, samples.dense(middle), samples.dense(delta)).mean()
