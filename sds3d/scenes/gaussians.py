"""`GaussianScene`: coloured 3D Gaussians, splatted, with members that come and go during the run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sds3d.config.option import option
from sds3d.errors import ConfigError, NoSurfaceError
from sds3d.interfaces import Cameras, Material, Optimizer, ParamGroup, Render, Scene, Shading, Surface
from sds3d.mathx import penalty
from sds3d.mesh.isosurface import marching_cubes
from sds3d.ops.depth_normals import depth_normals
from sds3d.ops.splat import rasterize_gaussians
from sds3d.ops.splat_depth import median_depth
from sds3d.ops.splat_reference import BLUR_PX2
from sds3d.rng import Stream
from sds3d.scenes.gaussian_adapt import Rows, grow, relocate
from sds3d.scenes.gaussian_density import Palette, make_palette, solid_lattice
from sds3d.scenes.gaussian_start import random_values
from sds3d.scenes.shade import shade

PARAMETERS = ("means", "log_scales", "quats", "opacity_logits", "color_logits")
_STATISTICS = ("gradient_sum", "gradient_count")
_PIXEL_M = 0.0375  # of a 64 px view at 3.3 m and 40 deg, for a scene that was never trained
_SURFACE = 1 - math.sqrt(0.5)  # opacity from outside at which the solid begins, see `gaussian_density`


@dataclass(frozen=True)
class _View:
    """What one render keeps for `adapt`."""

    progress: float
    pixel_m: Float[Tensor, ""]  # side of a pixel at the origin


class GaussianScene(Scene):
    """g Gaussians around the origin: mean, scales, rotation, opacity, and one colour for all directions.

    Colours and opacities are sigmoids of logits, scales are exponentials. Rendering draws no random numbers. Lit
    modes shade each pixel with the normal of the rendered depth.
    """

    penalty_names = ("opacity", "entropy", "scale", "anisotropy")

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`kind: gaussians`."""

        count: int = option(4000, help="Gaussians at the start", ge=4, le=10_000_000)
        cap: int = option(12_000, help="most Gaussians at any time", ge=4, le=10_000_000)
        start: Literal["ball", "sphere"] = option(
            "ball", help="where they start: in a ball or on its surface"
        )
        start_radius_m: float = option(0.5, help="radius of that ball", ge=0.01, le=10.0)
        start_opacity: float = option(0.1, help="opacity at the start", ge=0.001, le=0.999)
        bound_m: float = option(
            1.05, help="Gaussians farther than this from the origin die", ge=0.01, le=100.0
        )
        adapt_every_steps: int = option(50, help="steps between changes of the set", ge=1, le=1_000_000)
        adapt_from_frac: float = option(0.1, help="progress from which the set changes", ge=0.0, le=1.0)
        adapt_until_frac: float = option(0.7, help="progress from which the set is final", ge=0.0, le=1.0)
        grow_frac: float = option(
            0.15,
            help="share of new Gaussians per change, made of those with the largest gradients",
            ge=0.0,
            le=1.0,
        )
        split_above_m: float = option(
            0.05, help="larger ones are split, smaller ones cloned", ge=0.0, le=10.0
        )
        dead_opacity: float = option(0.02, help="less opaque ones die", ge=0.0, le=1.0)
        dead_scale_m: float = option(0.25, help="larger ones die", ge=0.0, le=100.0)
        dead: Literal["relocate", "remove"] = option(
            "relocate", help="what becomes of dead ones: moved onto opaque ones, or removed"
        )
        lr_means: float = option(0.005, help="learning rate of positions (m)", ge=0.0, le=10.0)
        lr_log_scales: float = option(0.02, help="learning rate of log scales", ge=0.0, le=10.0)
        lr_quats: float = option(0.01, help="learning rate of quaternions", ge=0.0, le=10.0)
        lr_opacity_logits: float = option(0.05, help="learning rate of opacity logits", ge=0.0, le=10.0)
        lr_color_logits: float = option(0.05, help="learning rate of colour logits", ge=0.0, le=10.0)

        def __post_init__(self) -> None:
            if self.cap < self.count:
                raise ConfigError(f"scene: cap ({self.cap}) is smaller than count ({self.count})")

    means: nn.Parameter
    log_scales: nn.Parameter
    quats: nn.Parameter
    opacity_logits: nn.Parameter
    color_logits: nn.Parameter
    gradient_sum: Tensor
    gradient_count: Tensor
    pixel_m: Tensor  # of the last training view: how wide the Gaussians were when they were fitted

    def __init__(self, config: Config, rng: Stream) -> None:
        super().__init__()
        self.config = config
        values = random_values(config, rng)
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value))
        for name in _STATISTICS:
            self.register_buffer(name, torch.zeros(len(values["means"])))
        self.register_buffer("pixel_m", torch.zeros(()))
        self._made_palette: tuple[object, Palette] | None = None
        self._adapt_rng = rng.fork("adapt")

    def start_from(self, values: Mapping[str, Tensor]) -> None:
        """Take raw parameters by name (see `gaussian_start`), of any number of Gaussians, as the start."""
        count = len(values["means"])
        fresh = {name: torch.zeros(count) for name in _STATISTICS}
        self.load_state_dict({**values, **fresh, "pixel_m": self.pixel_m})

    @property
    def scales(self) -> Float[Tensor, "g 3"]:
        """Standard deviations along the Gaussians' axes, in metres."""
        return self.log_scales.exp()

    @property
    def opacity(self) -> Float[Tensor, " g"]:
        """Opacity in the middle of each splat."""
        return torch.sigmoid(self.opacity_logits)

    @property
    def color(self) -> Float[Tensor, "g 3"]:
        """Colours in sRGB."""
        return torch.sigmoid(self.color_logits)

    def render(self, cameras: Cameras, shading: Shading, rng: Stream, *, progress: float = 1.0) -> Render:
        """Render b views over `shading.background`, or black."""
        background = shading.background
        if background is None:
            background = self.means.new_zeros(len(cameras), 3)
        plain = shading.mode == "albedo"
        image = rasterize_gaussians(
            self.means,
            self.quats,
            self.scales,
            self.opacity,
            self.color,
            cameras,
            background if plain else torch.zeros_like(background),
        )
        rgb = albedo = image.rgb
        normal = None
        if not plain or "normal" in shading.also:
            normal = depth_normals(image.depth, image.alpha, cameras)
        if not plain:
            if shading.light is None:
                raise ConfigError(f"shading mode {shading.mode!r} needs light directions")
            assert normal is not None
            behind = (1 - image.alpha) * background[:, :, None, None]
            albedo = image.rgb + behind
            rgb = _light(image.rgb, image.alpha, normal, shading) + behind
        own = _View(progress, (cameras.radius / cameras.intrinsics[:, 1, 1]).mean())
        return Render(
            rgb=rgb, alpha=image.alpha, depth=image.depth, normal=normal, albedo=albedo, private=own
        )

    def groups(self) -> Sequence[ParamGroup]:
        """One group per kind of parameter."""
        return [
            ParamGroup(name=name, params=[getattr(self, name)], lr=getattr(self.config, f"lr_{name}"))
            for name in PARAMETERS
        ]

    def penalties(self, view: Render) -> Mapping[str, Float[Tensor, ""]]:
        """Of the image: `opacity`, `entropy`. Of the set: `scale` (mean, m), `anisotropy` (mean log max/min scale)."""
        spread = self.log_scales.amax(-1) - self.log_scales.amin(-1)
        return {
            "opacity": penalty.opacity(view.alpha).mean(),
            "entropy": penalty.binary_entropy(view.alpha).mean(),
            "scale": self.scales.mean(),
            "anisotropy": spread.mean(),
        }

    def adapt(self, view: Render, optimizer: Optimizer, step: int) -> None:
        """Gather positional gradients; on its steps, move or remove the dead and grow where gradients are large.

        Published thresholds on the gradient belong to one loss and its scale. Here the `grow_frac` with the largest
        mean gradient since the last change are chosen, which any guidance rule may scale as it likes.
        """
        own, config = _of(view), self.config
        self._gather_gradients()
        self.pixel_m.copy_(own.pixel_m)
        if step == 0 or step % config.adapt_every_steps:
            return
        if not config.adapt_from_frac <= own.progress < config.adapt_until_frac:
            return
        with torch.no_grad():
            rows = self._adapted(self._adapt_rng.at(step))
        self._replace(rows, optimizer)

    def _gather_gradients(self) -> None:
        gradient = self.means.grad
        if gradient is None:
            return
        norm = gradient.norm(dim=-1)
        # A step with non-finite gradients was skipped by the optimiser; it says nothing here either.
        norm = torch.where(torch.isfinite(norm).all(), norm, torch.zeros_like(norm))
        self.gradient_sum += norm
        self.gradient_count += norm > 0

    def _adapted(self, rng: Stream) -> Rows:
        config = self.config
        rows = Rows.of({name: getattr(self, name).detach().clone() for name in PARAMETERS})
        busy = self.gradient_sum / self.gradient_count.clamp_min(1)
        dead = (
            (self.opacity < config.dead_opacity)
            | (self.scales.amax(-1) > config.dead_scale_m)
            | (self.means.norm(dim=-1) > config.bound_m)
        )
        if config.dead == "relocate":
            rows = relocate(rows, dead, rng.fork("relocate"))
            busy = torch.where(rows.fresh, 0.0, busy)
        elif not bool(dead.all()):
            kept = (~dead).nonzero().squeeze(-1)
            rows, busy = rows.take(kept), busy[kept]
        count = len(rows.gather)
        wanted = min(round(config.grow_frac * count), config.cap - count, int((busy > 0).sum()))
        if wanted > 0:
            chosen = torch.argsort(busy, descending=True, stable=True)[:wanted]
            rows = grow(rows, chosen, config.split_above_m, rng.fork("grow"))
        return rows

    def _replace(self, rows: Rows, optimizer: Optimizer) -> None:
        for name in PARAMETERS:
            old: nn.Parameter = getattr(self, name)
            new = nn.Parameter(rows.values[name].contiguous())
            optimizer.replace(name, old, new, rows.gather, rows.fresh)
            setattr(self, name, new)
        for name in _STATISTICS:
            setattr(self, name, torch.zeros_like(rows.values["opacity_logits"]))
        self._made_palette = None

    def surface(self, cells_per_side: int, *, iso_factor: float = 1.0) -> Surface:
        """The boundary of what is hidden from all sides, closed; see `gaussian_density`.

        Raises NoSurfaceError when nothing is more than half opaque.
        """
        with torch.no_grad():
            seen = self.opacity >= self.config.dead_opacity
            reach = (self.means.norm(dim=-1) + 3 * self.scales.amax(-1))[seen]
        half = self.config.bound_m
        if len(reach):
            # A few stray ones do not set the resolution.
            half = min(half, 1.05 * float(reach.double().quantile(0.995)))
        pixel = float(self.pixel_m) or _PIXEL_M
        solid = solid_lattice(
            self.means,
            self.quats,
            self.scales,
            self.opacity,
            half_extent=half,
            cells_per_side=cells_per_side,
            blur_m=math.sqrt(BLUR_PX2) * pixel,
        )
        if not float(solid.max()) > _SURFACE:
            raise NoSurfaceError(
                f"the scene is empty: its most hidden point is {float(solid.max()):.0%} opaque from outside, a surface "
                f"needs {_SURFACE:.0%}. Train longer, or lower the weight of the opacity penalty."
            )
        return marching_cubes(solid, iso_factor * _SURFACE, half)

    def surface_depth(self, cameras: Cameras) -> tuple[Float[Tensor, "b 1 H W"], Float[Tensor, "b 1 H W"]]:
        """(depth at which each ray is half opaque, alpha), see `median_depth`; without gradient."""
        return median_depth(self.means, self.quats, self.scales, self.opacity, cameras)

    def material(self, points: Float[Tensor, "n 3"]) -> Material:
        """Base colour of the Gaussians around each point; dielectric, roughness 0.6."""
        with torch.no_grad():
            color = self._palette().colors_at(points)
        return Material(
            base_color=color,
            metallic=torch.zeros_like(color[:, :1]),
            roughness=torch.full_like(color[:, :1], 0.6),
        )

    def _palette(self) -> Palette:
        """Made anew only when a parameter changed: baking asks for millions of points in pieces."""
        state = tuple((id(t), t._version, t.device) for t in (*self.parameters(), self.pixel_m))
        if self._made_palette is None or self._made_palette[0] != state:
            pixel = float(self.pixel_m) or _PIXEL_M
            made = make_palette(self.means, self.quats, self.scales, self.opacity, self.color, pixel)
            self._made_palette = (state, made)
        return self._made_palette[1]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take on the number of Gaussians of the state; the parameters stay the same objects."""
        for name in (*PARAMETERS, *_STATISTICS):
            stored, own = state_dict.get(prefix + name), getattr(self, name)
            if stored is not None and stored.shape[1:] == own.shape[1:] and len(stored) != len(own):
                own.data = own.new_zeros(stored.shape)
                own.grad = None
        self._made_palette = None
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _of(view: Render) -> _View:
    if not isinstance(view.private, _View):
        raise TypeError("this render was not made by a GaussianScene")
    return view.private


def _light(rgb: Tensor, alpha: Tensor, normal: Tensor, shading: Shading) -> Tensor:
    """Premultiplied colours under the light; one row per pixel, which is what `shade` broadcasts over."""
    assert shading.light is not None
    views, _, height, width = rgb.shape
    albedo, facing = (x.movedim(1, -1).reshape(-1, 3) for x in (rgb / alpha.clamp_min(1e-4), normal))
    light = shading.light.to(rgb).repeat_interleave(height * width, 0)
    lit = shade(albedo, facing, replace(shading, light=light, background=None))
    return alpha * lit.view(views, height, width, 3).movedim(-1, 1)
