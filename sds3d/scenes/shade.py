"""Diffuse shading of field scenes: one formula for points, ray samples and pixels."""

from jaxtyping import Float
from torch import Tensor

from sds3d.interfaces import Shading


def irradiance(
    normal: Float[Tensor, "*n 3"], light: Float[Tensor, "*#n 3"], ambient: float
) -> Float[Tensor, "*n 1"]:
    """What a white surface sends back: a + (1 - a) max(0, n.l), in [0, 1] for unit vectors.

    Source: Poole et al. 2022, DreamFusion, arXiv:2209.14988, with ambient and diffuse light summing to one.
    """
    return ambient + (1 - ambient) * (normal * light).sum(-1, keepdim=True).clamp_min(0)


def lamp_of(shading: Shading) -> Float[Tensor, "*#n 3"]:
    """The light directions of a lambertian or textureless shading. Raises ValueError where it has none."""
    if shading.mode == "pbr":
        raise ValueError("shading mode 'pbr' needs a scene with a material of its own: mesh or tetmesh")
    if shading.light is None:
        raise ValueError(f"shading mode {shading.mode!r} needs light directions, got light=None")
    return shading.light


def shade(
    albedo: Float[Tensor, "*n 3"], normal: Float[Tensor, "*n 3"], shading: Shading
) -> Float[Tensor, "*n 3"]:
    """Colour of surfaces: albedo (unlit), irradiance (textureless) or albedo times irradiance (lambertian).

    The last axis is rgb or xyz; `shading.light` must broadcast against `normal` (for b images of H x W pixels:
    light[:, None, None, :]). Textureless shading passes no gradient to the albedo. Raises ValueError where a lit
    mode comes without lights.
    """
    if shading.mode == "albedo":
        return albedo
    lit = irradiance(normal, lamp_of(shading), shading.ambient)
    return lit.expand_as(albedo) if shading.mode == "textureless" else albedo * lit
