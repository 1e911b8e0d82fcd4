"""From triangles and a material function to a `Render`: what all mesh scenes share."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sds3d.interfaces import Cameras, Material, Render, Shading
from sds3d.mathx.mesh_penalty import face_normals
from sds3d.ops.antialias import antialias, find_crossings
from sds3d.ops.mesh_edges import MeshEdges
from sds3d.ops.mesh_raster import Pixels, look, rasterize, to_clip
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
    turned to the camera. Raises ValueError where a lit mode comes without lights.
    """
    size = (cameras.height_px, cameras.width_px)
    clip = to_clip(vertices, cameras)
    face_id = rasterize(clip.detach(), faces, size, use_nvdiffrast=use_nvdiffrast)
    pixels = look(clip, faces, face_id)
    points = pixels.interpolate(vertices).detach()
    normal = _normals(pixels, vertices, faces)
    material = surface_attributes(points)
    color = _lit(material, normal, pixels, shading)
    ones = torch.ones_like(pixels.depth)[:, None]
    image = pixels.image(torch.cat([color, ones, pixels.depth[:, None], normal], 1))
    crossings = find_crossings(clip.detach(), faces, edges, face_id, image[:, 4].detach())
    rgb, alpha, depth, world = antialias(image, clip, crossings).split([3, 1, 1, 3], 1)
    # A pixel between several silhouettes may be blended more than once.
    alpha = alpha.clamp(0, 1)
    background = shading.background
    if background is not None:
        rgb = rgb + (1 - alpha) * background.to(rgb)[:, :, None, None]
    render = Render(
        rgb=rgb.clamp(0, 1),
        alpha=alpha,
        depth=depth.clamp_min(0),
        normal=F.normalize(world, dim=1, eps=1e-6),
    )
    return SurfaceView(render=render, points=points)


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
    return shade(material.base_color, normal, replace(shading, light=light, background=None))
