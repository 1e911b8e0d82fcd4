"""The glTF metallic-roughness surface under light from all sides: GGX, and its split-sum table.

alpha = roughness^2 throughout. Source: Karis 2013, Real Shading in Unreal Engine 4; glTF 2.0 specification,
appendix B; Heitz 2014 for the height-correlated Smith masking.
"""

import math
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

DIELECTRIC_F0 = 0.04  # reflectance of a non-metal seen straight on
MIN_ROUGHNESS = 0.04  # below, highlights are smaller than any environment map resolves


def ggx(n_dot_h: Float[Tensor, "*n"], alpha: Float[Tensor, "*#n"]) -> Float[Tensor, "*n"]:
    """D(h) = alpha^2 / (pi ((n.h)^2 (alpha^2 - 1) + 1)^2): density of microfacet normals."""
    a2 = alpha.square()
    return a2 / (math.pi * (n_dot_h.square() * (a2 - 1.0) + 1.0).square())


def smith_visibility(
    n_dot_l: Float[Tensor, "*n"], n_dot_v: Float[Tensor, "*#n"], alpha: Float[Tensor, "*#n"]
) -> Float[Tensor, "*n"]:
    """G / (4 n.l n.v), height-correlated Smith masking of GGX."""
    a2 = alpha.square()
    from_light = n_dot_v * (n_dot_l.square() * (1.0 - a2) + a2).sqrt()
    from_view = n_dot_l * (n_dot_v.square() * (1.0 - a2) + a2).sqrt()
    return 0.5 / (from_light + from_view).clamp(min=1e-7)


def base_reflectance(
    base: Float[Tensor, "*n 3"], metallic: Float[Tensor, "*n 1"]
) -> tuple[Float[Tensor, "*n 3"], Float[Tensor, "*n 3"]]:
    """(diffuse albedo, f0) of linear base colour: metals have no diffuse part and a coloured reflection."""
    return base * (1.0 - metallic), DIELECTRIC_F0 + (base - DIELECTRIC_F0) * metallic


@lru_cache(maxsize=4)
def split_sum_table(size: int = 32, samples: int = 512) -> Float[Tensor, "2 s s"]:
    """(scale, bias) of f0 over (roughness, n.v): the integral of the BRDF over a white sky is f0 * scale + bias.

    Rows are roughness, columns n.v, both at texel centres of [0, 1]. Importance-sampled with a Hammersley set.
    """
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    alpha = centre.clamp(min=MIN_ROUGHNESS).square()[:, None, None]
    n_dot_v = centre[None, :, None]
    k = torch.arange(samples, dtype=torch.float64)
    u, v = (k + 0.5) / samples, _radical_inverse(samples)
    cos_h = ((1.0 - u) / (1.0 + (alpha.square() - 1.0) * u)).sqrt()
    sin_h = (1.0 - cos_h.square()).clamp(min=0.0).sqrt()
    sin_v = (1.0 - n_dot_v.square()).sqrt()
    v_dot_h = (sin_v * sin_h * (2.0 * math.pi * v).cos() + n_dot_v * cos_h).clamp(min=1e-9)
    n_dot_l = 2.0 * v_dot_h * cos_h - n_dot_v
    above = n_dot_l > 0
    shadowed = smith_visibility(n_dot_l.clamp(min=1e-9), n_dot_v, alpha)
    weight = torch.where(above, 4.0 * shadowed * n_dot_l.clamp(min=0.0) * v_dot_h / cos_h, 0.0)
    fresnel = (1.0 - v_dot_h) ** 5
    scale, bias = ((weight * part).mean(-1) for part in (1.0 - fresnel, fresnel))
    return torch.stack([scale, bias]).float()


def split_sum(
    roughness: Float[Tensor, "n 1"], n_dot_v: Float[Tensor, "n 1"], f0: Float[Tensor, "n 3"]
) -> Float[Tensor, "n 3"]:
    """Reflectance of a white sky: f0 * scale + bias, differentiable in all arguments."""
    table = _table_on(roughness.device, roughness.dtype)
    grid = torch.cat([n_dot_v, roughness], dim=1) * 2.0 - 1.0
    found = torch.nn.functional.grid_sample(
        table[None], grid[None, None], mode="bilinear", padding_mode="border", align_corners=False
    )[0, :, 0]
    return f0 * found[0][:, None] + found[1][:, None]


def bent_normal(normal: Float[Tensor, "n 3"], bump: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
    """The unit normal n + b - (b.n) n: only the part of the bump along the surface counts."""
    along = bump - (bump * normal).sum(-1, keepdim=True) * normal
    return torch.nn.functional.normalize(normal + along, dim=-1)


@lru_cache(maxsize=8)
def _table_on(device: torch.device, dtype: torch.dtype) -> Float[Tensor, "2 s s"]:
    return split_sum_table().to(device, dtype)


def _radical_inverse(count: int) -> Float[Tensor, " n"]:
    """Van der Corput points of base 2."""
    index = torch.arange(count)
    bits = [((index >> bit) & 1).double() * 0.5 ** (bit + 1) for bit in range(32)]
    return torch.stack(bits).sum(0)
