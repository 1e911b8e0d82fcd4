"""Image-based light: a lat-long map of the world's radiance, prefiltered for every roughness.

Directions are world frame (+y up). Row 0 of a map is the zenith; its columns go with the azimuth of the cameras
(0 = +z in the middle of the first column's left edge, 90 degrees = +x).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sds3d.mathx.brdf import MIN_ROUGHNESS, base_reflectance, ggx, split_sum
from sds3d.mathx.color import to_linear, to_srgb

LEVELS, ROWS = 6, 32  # roughness levels of the prefiltered light, and their rows
PADDING = 1  # columns repeated across the seam
_POLE = 1e-12  # squared distance from the y axis below which a direction has no azimuth

Turn = float | Float[Tensor, " n"]  # degrees about +y: one for all points, or one each


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Light from all sides, ready to be looked up. Scale is such that a white matte ball has about its own colour."""

    radiance: Float[Tensor, "h w 3"]  # linear
    specular: Float[Tensor, "1 3 l r c"]  # GGX-prefiltered at roughness 0 .. 1, columns padded
    irradiance: Float[Tensor, "1 3 r c"]  # cosine-filtered and divided by pi, columns padded

    def to(self, device: torch.device | str) -> "Environment":
        """The same light on another device."""
        return Environment(**{name: value.to(device) for name, value in vars(self).items()})

    def diffuse(self, normal: Float[Tensor, "n 3"], turn_deg: Turn = 0.0) -> Float[Tensor, "n 3"]:
        """What a white matte surface with this normal sends back, linear."""
        grid = _coordinates(normal, turn_deg, self.irradiance.shape[-1])
        return F.grid_sample(self.irradiance, grid[None, None], padding_mode="border", align_corners=False)[
            0, :, 0
        ].T

    def reflection(
        self, direction: Float[Tensor, "n 3"], roughness: Float[Tensor, "n 1"], turn_deg: Turn = 0.0
    ) -> Float[Tensor, "n 3"]:
        """Prefiltered light from a direction, linear; trilinear in direction and roughness."""
        flat = _coordinates(direction, turn_deg, self.specular.shape[-1])
        level = roughness.clamp(0.0, 1.0) * (LEVELS - 1)
        deep = (level + 0.5) / LEVELS * 2.0 - 1.0
        grid = torch.cat([flat, deep], dim=1)[None, None, None]
        found = F.grid_sample(self.specular, grid, padding_mode="border", align_corners=False)
        return found[0, :, 0, 0].T


def make_environment(radiance: Float[Tensor, "h w 3"], *, white: float | None = 0.8) -> Environment:
    """Prefilter a linear lat-long map. `white` scales it so that the mean irradiance is this; None keeps it."""
    small = _resized(radiance.float(), ROWS)
    directions, area = lat_long_directions(ROWS)
    flat = small.reshape(-1, 3)
    if white is not None:
        mean = float((flat.mean(1) * area).sum() / (4.0 * math.pi))
        if mean <= 0.0:
            raise ValueError("make_environment: the map is black")
        flat, radiance = flat * (white / mean), radiance * (white / mean)
    cosine = (directions @ directions.T).clamp(min=0.0)
    irradiance = _weighted(cosine, area, flat)
    levels = [flat]
    for level in range(1, LEVELS):
        # n = v = r, the split-sum assumption: h lies half-way between reflection and light.
        alpha = torch.tensor(max(level / (LEVELS - 1), MIN_ROUGHNESS) ** 2)
        n_dot_h = ((1.0 + directions @ directions.T) / 2.0).clamp(0.0, 1.0).sqrt()
        lobe = ggx(n_dot_h, alpha) * cosine
        levels.append(_weighted(lobe, area, flat))
    maps = torch.stack(levels).reshape(LEVELS, ROWS, 2 * ROWS, 3)
    return Environment(
        radiance=radiance.float(),
        specular=_padded(maps.permute(3, 0, 1, 2))[None],
        irradiance=_padded(irradiance.reshape(ROWS, 2 * ROWS, 3).permute(2, 0, 1))[None],
    )


def shade_pbr(
    environment: Environment,
    base_color: Float[Tensor, "n 3"],
    metallic: Float[Tensor, "n 1"],
    roughness: Float[Tensor, "n 1"],
    normal: Float[Tensor, "n 3"],
    to_eye: Float[Tensor, "n 3"],
    *,
    occlusion: Float[Tensor, "n 1"] | None = None,
    turn_deg: Turn = 0.0,
    intensity: float = 1.0,
    specular: float = 1.0,
) -> Float[Tensor, "n 3"]:
    """SRGB in [0, 1] of surface points under image-based light (split sum); differentiable in everything.

    `base_color` is sRGB, `normal` and `to_eye` are unit vectors; `turn_deg` turns the light about +y, `intensity`
    scales it. `specular` scales the reflection of non-metals (0 = matte). Highlights above white are compressed, not
    clipped, so that their gradient lives on.
    Source: Karis 2013; diffuse and specular parts as in the glTF 2.0 specification, appendix B.
    """
    albedo, f0 = base_reflectance(to_linear(base_color.clamp(0.0, 1.0)), metallic)
    n_dot_v = (normal * to_eye).sum(1, keepdim=True).clamp(1e-4, 1.0)
    reflected = F.normalize(2.0 * n_dot_v * normal - to_eye, dim=1)
    mirror = split_sum(roughness, n_dot_v, f0)
    if specular != 1.0:
        mirror = mirror * torch.lerp(torch.full_like(metallic, specular), torch.ones_like(metallic), metallic)
    # What is reflected at the surface does not reach the matte layer below it.
    matte = albedo * (1.0 - mirror)
    light = matte * environment.diffuse(normal, turn_deg)
    light = light + mirror * environment.reflection(reflected, roughness, turn_deg)
    if occlusion is not None:
        light = light * occlusion
    return to_srgb(compress(light * intensity))


def compress(light: Float[Tensor, "*n 3"], knee: float = 0.8) -> Float[Tensor, "*n 3"]:
    """Identity up to `knee`, then smoothly (once differentiable) towards 1."""
    over = (light - knee).clamp(min=0.0)
    room = 1.0 - knee
    return torch.where(light <= knee, light, knee + room * over / (over + room))


def lat_long_directions(rows: int) -> tuple[Float[Tensor, "n 3"], Float[Tensor, " n"]]:
    """(unit directions, solid angles) of the texels of a rows x 2 rows map, row by row."""
    edges = torch.linspace(0.0, math.pi, rows + 1, dtype=torch.float64)
    polar = (edges[:-1] + edges[1:]) / 2.0
    azimuth = (torch.arange(2 * rows, dtype=torch.float64) + 0.5) * (math.pi / rows)
    polar, azimuth = torch.meshgrid(polar, azimuth, indexing="ij")
    directions = torch.stack([polar.sin() * azimuth.sin(), polar.cos(), polar.sin() * azimuth.cos()], dim=-1)
    area = (edges[:-1].cos() - edges[1:].cos()) * (math.pi / rows)
    return directions.reshape(-1, 3).float(), area.repeat_interleave(2 * rows).float()


def _coordinates(direction: Tensor, turn_deg: Turn, width: int) -> Float[Tensor, "n 2"]:
    """Sampling coordinates in [-1, 1] of a padded map."""
    x, y, z = direction.unbind(-1)
    # Straight up or down there is no azimuth, and the slope of one would not be finite.
    pole = x.square() + z.square() < _POLE
    azimuth = torch.atan2(x.masked_fill(pole, 0.0), z.masked_fill(pole, 1.0))
    azimuth = azimuth - (turn_deg if isinstance(turn_deg, Tensor) else float(turn_deg)) * (math.pi / 180.0)
    share = torch.remainder(azimuth / (2.0 * math.pi), 1.0)
    inner = width - 2 * PADDING
    u = (share * inner + PADDING) / width
    v = torch.acos(y.clamp(-1.0 + 1e-6, 1.0 - 1e-6)) / math.pi
    return torch.stack([u, v], dim=-1) * 2.0 - 1.0


def _weighted(kernel: Tensor, area: Tensor, light: Tensor) -> Float[Tensor, "n 3"]:
    weights = kernel * area[None]
    return weights @ light / weights.sum(1, keepdim=True)


def _padded(maps: Tensor) -> Tensor:
    return torch.cat([maps[..., -PADDING:], maps, maps[..., :PADDING]], dim=-1)


def _resized(radiance: Float[Tensor, "h w 3"], rows: int) -> Float[Tensor, "r c 3"]:
    image = radiance.permute(2, 0, 1)[None]
    shrinks = radiance.shape[0] > rows
    found = F.interpolate(image, size=(rows, 2 * rows), mode="bilinear", antialias=shrinks)
    return found[0].permute(1, 2, 0).clamp(min=0.0)
