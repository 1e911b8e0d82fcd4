"""Mesh scenes under image-based light: their own materials, and known ones for control networks."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sds3d.interfaces import Cameras, Material, Shading
from sds3d.ops.environment import shade_pbr
from sds3d.ops.skies import environment_on


def toward_eye(
    points: Float[Tensor, "n 3"], view: Int[Tensor, " n"], cameras: Cameras
) -> Float[Tensor, "n 3"]:
    """Unit vectors from surface points to the cameras of their views."""
    eye = cameras.c2w[:, :3, 3].to(points).index_select(0, view)
    return F.normalize(eye - points, dim=1)


def shade_environment(
    material: Material,
    normal: Float[Tensor, "n 3"],
    to_eye: Float[Tensor, "n 3"],
    view: Int[Tensor, " n"],
    shading: Shading,
) -> Float[Tensor, "n 3"]:
    """SRGB of surface points under the environment of a shading, turned as it stands for each view."""
    turn = shading.turn_deg
    return shade_pbr(
        environment_on(shading.environment, normal.device),
        material.base_color,
        material.metallic,
        material.roughness,
        normal,
        to_eye,
        turn_deg=0.0 if turn is None else turn.to(normal).index_select(0, view),
        intensity=shading.intensity,
        specular=shading.specular,
    )


@torch.no_grad()
def known_light(
    normal: Float[Tensor, "n 3"],
    to_eye: Float[Tensor, "n 3"],
    view: Int[Tensor, " n"],
    shading: Shading,
) -> Float[Tensor, "n k"]:
    """RGB of white surfaces of all known materials in place of the scene's own, one after the other."""
    one = torch.ones_like(normal[:, :1])
    shown = [
        shade_environment(
            Material(base_color=one.expand(-1, 3), metallic=metallic * one, roughness=roughness * one),
            normal,
            to_eye,
            view,
            shading,
        )
        for metallic, roughness in shading.known_materials
    ]
    return torch.cat(shown, 1)
