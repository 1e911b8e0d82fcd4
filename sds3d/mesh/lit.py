"""A finished asset under image-based light: what a PBR viewer shows of the file."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from sds3d.interfaces import Cameras
from sds3d.mesh.tangents import from_tangent_space
from sds3d.mesh.textured import Pixels, TexturedMesh, base_color, render_colored, sample_texture
from sds3d.ops.environment import Environment, shade_pbr


def render_lit(
    mesh: TexturedMesh,
    cameras: Cameras,
    background: Float[Tensor, "b 3"],
    environment: Environment,
    *,
    turn_deg: float = 0.0,
    supersample: int = 2,
) -> tuple[Float[Tensor, "b 3 H W"], Float[Tensor, "b 1 H W"], Float[Tensor, "b 1 H W"]]:
    """Pictures (rgb, alpha, depth) with base colour, metallic, roughness, normals and occlusion of the file.

    `background` is sRGB; `turn_deg` turns the light about +y. Shadows are not cast.
    """

    def color(pixels: Pixels) -> Float[Tensor, "n 3"]:
        metallic, roughness, occlusion = surface_of(mesh, pixels)
        to_eye = functional.normalize(pixels.eye - pixels.mean(mesh.vertices), dim=1)
        normal = shading_normal(mesh, pixels)
        # A border is seen from behind: its other side is lit.
        flipped = torch.where((normal * to_eye).sum(1, keepdim=True) < -0.2, -normal, normal)
        return shade_pbr(
            environment,
            base_color(mesh, pixels),
            metallic,
            roughness,
            normal if mesh.closed else flipped,
            to_eye,
            occlusion=occlusion,
            turn_deg=turn_deg,
        )

    return render_colored(mesh, cameras, background, color, supersample=supersample)


def surface_of(
    mesh: TexturedMesh, pixels: Pixels
) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "n 1"], Float[Tensor, "n 1"] | None]:
    """(metallic, roughness, occlusion where there is one) of the samples."""
    ones = torch.ones(len(pixels.corners), 1)
    if mesh.metallic_roughness is None or mesh.uvs is None:
        return mesh.metallic * ones, mesh.roughness * ones, None
    found = sample_texture(mesh.metallic_roughness, pixels.mean(mesh.uvs))
    occlusion = found[:, :1] if mesh.occluded else None
    return mesh.metallic * found[:, 2:], mesh.roughness * found[:, 1:2], occlusion


def shading_normal(mesh: TexturedMesh, pixels: Pixels) -> Float[Tensor, "n 3"]:
    """Unit world normals: interpolated, and bent by the normal texture where there is one."""
    normal = pixels.mean(mesh.normals)
    if mesh.normal_texture is None or mesh.tangents is None or mesh.uvs is None:
        return functional.normalize(normal, dim=1)
    inside = 2.0 * sample_texture(mesh.normal_texture, pixels.mean(mesh.uvs)) - 1.0
    return from_tangent_space(inside, normal, pixels.mean(mesh.tangents))
