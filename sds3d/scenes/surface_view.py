"""From triangles and a material function to a `Render`: what all mesh scenes share."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sds3d.interfaces import Cameras, Material, Render, Shading
from sds3d.mathx.brdf import bent_normal
from sds3d.mathx.mesh_penalty import face_normals
from sds3d.ops.antialias import antialias, find_crossings
from sds3d.ops.mesh_edges import MeshEdges
from sds3d.ops.mesh_raster import Pixels, look, rasterize, to_clip
from sds3d.scenes.pbr import known_light, shade_environment, toward_eye
from sds3d.scenes.shade import shade

_NORMAL_FLOOR = 1e-12  # square metres


@dataclass(frozen=True, kw_only=True)
class SurfaceView:
    """A render of a mesh, and the visible points it was made of."""

    render: Render
    points: Float[Tensor, "n 3"]  # visible surface points, without gradient


def render_surface(
    vertices: Float[Tensor, "v 3"],
    faces: Int[Tensor, "f 3"],
    edges: MeshEdges,
    surface_attributes: Callable[[Float[Tensor, "n 3"]], Material],
    cameras: Cameras,
    shading: Shading,
    *,
    use_nvdiffrast: bool = False,
) -> SurfaceView:
    """Rasterise, look up the material at every visible point, shade, and antialias the silhouettes.

    Differentiable in the vertices (depth, normals, light, silhouettes) and in the material. Colours do not depend on
    the vertices through the points at which the material is asked. Normals are smooth, and of faces seen from behind
    turned to the camera; bumps of the material bend the light, not `Render.normal`. Raises ValueError where a lit
    mode comes without lights.
    """
    size = (cameras.height_px, cameras.width_px)
    clip = to_clip(vertices, cameras)
    face_id = rasterize(clip.detach(), faces, size, use_nvdiffrast=use_nvdiffrast)
    pixels = look(clip, faces, face_id)
    points = pixels.interpolate(vertices).detach()
    normal = _normals(pixels, vertices, faces)
    material = surface_attributes(points)
    light = None
    if shading.mode == "pbr":
        to_eye = toward_eye(points, pixels.view, cameras)
        bent = _bent(normal, material)
        color = shade_environment(material, bent, to_eye, pixels.view, shading)
        if shading.known_materials:
            light = pixels.image(known_light(normal, to_eye, pixels.view, shading))
    else:
        color = _lit(material, normal, pixels, shading)
    ones = torch.ones_like(pixels.depth)[:, None]
    unlit = shading.mode == "albedo"
    extra = [] if unlit or "albedo" not in shading.also else [material.base_color]
    image = pixels.image(torch.cat([color, ones, pixels.depth[:, None], normal, *extra], 1))
    crossings = find_crossings(clip.detach(), faces, edges, face_id, image[:, 4].detach())
    rgb, alpha, depth, world, albedo = antialias(image, clip, crossings).split(
        [3, 1, 1, 3, 3 * len(extra)], 1
    )
    # A pixel between several silhouettes may be blended more than once.
    alpha = alpha.clamp(0, 1)
    rgb = _over(rgb, alpha, shading)
    return SurfaceView(
        render=Render(
            rgb=rgb,
            alpha=alpha,
            depth=depth.clamp_min(0),
            normal=F.normalize(world, dim=1, eps=1e-6),
            albedo=_over(albedo, alpha, shading) if extra else rgb if unlit else None,
            light=light,
        ),
        points=points,
    )


def vertex_normals(vertices: Float[Tensor, "v 3"], faces: Int[Tensor, "f 3"]) -> Float[Tensor, "v 3"]:
    """Unit normals, the mean of the faces around weighted by their area; differentiable."""
    normals = face_normals(vertices, faces)
    total = torch.zeros_like(vertices).index_add(
        0, faces.reshape(-1), normals.repeat_interleave(3, 0, output_size=3 * len(faces))
    )
    return F.normalize(total, dim=-1, eps=_NORMAL_FLOOR)


def _normals(pixels: Pixels, vertices: Tensor, faces: Tensor) -> Float[Tensor, "n 3"]:
    normal = F.normalize(pixels.interpolate(vertex_normals(vertices, faces)), dim=-1, eps=1e-6)
    return torch.where(pixels.front[:, None], normal, -normal)


def _lit(
    material: Material, normal: Float[Tensor, "n 3"], pixels: Pixels, shading: Shading
) -> Float[Tensor, "n 3"]:
    if shading.light is None:
        return shade(material.base_color, normal, shading)
    light = shading.light.to(normal).index_select(0, pixels.view)
    lamp = replace(shading, light=light, background=None, turn_deg=None)
    return shade(material.base_color, _bent(normal, material), lamp)


def _bent(normal: Float[Tensor, "n 3"], material: Material) -> Float[Tensor, "n 3"]:
    return normal if material.bump is None else bent_normal(normal, material.bump)


def _over(
    premultiplied: Float[Tensor, "b 3 H W"], alpha: Float[Tensor, "b 1 H W"], shading: Shading
) -> Float[Tensor, "b 3 H W"]:
    """A picture over the background of the shading."""
    if shading.background is None:
        return premultiplied.clamp(0, 1)
    behind = shading.background.to(premultiplied)[:, :, None, None]
    return (premultiplied + (1 - alpha) * behind).clamp(0, 1)
