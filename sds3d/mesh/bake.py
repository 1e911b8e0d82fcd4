"""Textures of a surface: ask the scene for its material at the point behind every texel."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from sds3d.errors import ExportError
from sds3d.interfaces import Material, Scene, Surface
from sds3d.mathx.brdf import bent_normal
from sds3d.mesh.detail import fine_normals, sky_visibility
from sds3d.mesh.tangents import to_tangent_space
from sds3d.mesh.unwrap import Atlas
from sds3d.ops.raster_numba import uv_buffer

CHUNK = 1 << 16  # points per call of Scene.material
VARIES = 2.0 / 255.0  # a property that stays within this of its mean is written as a factor, not as a texture


@dataclass(frozen=True, kw_only=True)
class Texels:
    """The n covered texels of a square texture and the surface points behind their centres."""

    covered: Bool[np.ndarray, "H W"]
    points: Float[Tensor, "n 3"]  # world metres, in the order of np.nonzero(covered)
    normals: Float[Tensor, "n 3"]  # unit, outward
    face: Int[Tensor, " n"]
    weights: Float[Tensor, "n 3"]  # of the face's corners

    def interpolate(self, values: Float[Tensor, "w k"], faces: Int[Tensor, "f 3"]) -> Float[Tensor, "n k"]:
        """Values at the corners of `faces`, as a rasteriser interpolates them."""
        return (values[faces[self.face]] * self.weights[..., None]).sum(1)


@dataclass(frozen=True, kw_only=True)
class Baked:
    """Textures and factors of a metallic-roughness material."""

    base_color: UInt8[Tensor, "H W 3"]  # sRGB
    metallic_roughness: (
        UInt8[Tensor, "H W 3"] | None
    )  # as glTF: red occlusion, green roughness, blue metallic
    metallic: float
    roughness: float
    normal: UInt8[Tensor, "H W 3"] | None = None  # tangent space, (n + 1) / 2
    occluded: bool = False  # whether the red channel above means something


def bake(
    scene: Scene,
    surface: Surface,
    normals: Float[Tensor, "v 3"],
    atlas: Atlas,
    *,
    texture_px: int,
    inward_m: tuple[float, ...] = (0.0,),
    fine: Surface | None = None,
    tangents: Float[Tensor, "w 4"] | None = None,
    occlusion: bool = False,
) -> Baked:
    """Textures of `scene` on `surface`; every texel outside the charts takes the colour of the nearest chart texel.

    `inward_m` are the depths below the surface (metres, along the inward normal) at which the material is asked;
    their plain mean is baked. A density field's colour is best defined a little inside, where the field is dense:
    what a camera sees is itself a mean over such depths. `tangents` (of the atlas's vertices) and `fine` or a material
    with bumps give a normal texture, with the finer surface's normals where there is one.
    """
    texels = find_texels(surface, normals, atlas, texture_px)
    material = _mean_material(scene, texels, inward_m)
    nearest = _nearest_covered(texels.covered)
    metallic, roughness = material.metallic, material.roughness
    flat = max(_spread(metallic), _spread(roughness)) <= VARIES and not occlusion
    shine = detail = None
    if not flat:
        sky = torch.ones_like(roughness)
        if occlusion:
            sky = sky_visibility(surface, texels.points, texels.normals)
        shine = _fill(torch.cat([sky, roughness, metallic], dim=1), texels.covered, nearest)
    if tangents is not None and (fine is not None or material.bump is not None):
        bent = _tangent_normals(fine, normals, atlas, tangents, texels, material.bump)
        detail = _fill(bent, texels.covered, nearest)
    return Baked(
        base_color=_fill(material.base_color, texels.covered, nearest),
        metallic_roughness=shine,
        metallic=float(metallic.mean().clamp(0, 1)) if flat else 1.0,
        roughness=float(roughness.mean().clamp(0, 1)) if flat else 1.0,
        normal=detail,
        occluded=occlusion,
    )


def _tangent_normals(
    fine: Surface | None,
    normals: Float[Tensor, "v 3"],
    atlas: Atlas,
    tangents: Float[Tensor, "w 4"],
    texels: Texels,
    bump: Float[Tensor, "n 3"] | None,
) -> Float[Tensor, "n 3"]:
    """The fine surface's normals, bent by the material's bumps, in the coarse one's frames, coded into [0, 1]."""
    wanted = texels.normals if fine is None else fine_normals(fine, texels.points, texels.normals)
    if bump is not None:
        wanted = bent_normal(wanted, bump)
    normal = texels.interpolate(normals[atlas.source], atlas.faces)
    inside = to_tangent_space(wanted, normal, texels.interpolate(tangents, atlas.faces))
    # A normal that leans out of its surface is an error of the match, and shaders break on it.
    inside = functional.normalize(torch.cat([inside[:, :2], inside[:, 2:].clamp(min=0.2)], dim=1), dim=1)
    return 0.5 * inside + 0.5


def find_texels(surface: Surface, normals: Float[Tensor, "v 3"], atlas: Atlas, texture_px: int) -> Texels:
    """The texels whose centre lies in a chart, and where on the surface they lie."""
    face_id, weights = _rasterize_uv(atlas.uvs, atlas.faces, texture_px)
    covered = face_id >= 0
    if not covered.any():
        raise ExportError(f"bake: no texel of the {texture_px} px texture lies in a chart")
    face = torch.from_numpy(face_id[covered])
    at = torch.from_numpy(weights[covered])
    corners = surface.faces[face]
    return Texels(
        covered=covered,
        points=(surface.vertices[corners] * at[..., None]).sum(1),
        normals=functional.normalize((normals[corners] * at[..., None]).sum(1), dim=1),
        face=face,
        weights=at,
    )


def _rasterize_uv(
    uvs: Float[Tensor, "w 2"], faces: Int[Tensor, "f 3"], texture_px: int
) -> tuple[np.ndarray, np.ndarray]:
    corners = uvs[faces].double().numpy() * texture_px
    face_id = np.full((texture_px, texture_px), -1, np.int64)
    weights = np.zeros((texture_px, texture_px, 3), np.float32)
    uv_buffer(corners, face_id, weights)
    return face_id, weights


@torch.no_grad()
def _mean_material(scene: Scene, texels: Texels, inward_m: tuple[float, ...]) -> Material:
    names = ("base_color", "metallic", "roughness", "bump")
    total: dict[str, list[Tensor]] = {name: [] for name in names}
    device = next(scene.parameters(), texels.points).device
    for start in range(0, len(texels.points), CHUNK):
        part = slice(start, start + CHUNK)
        points, normals = texels.points[part].to(device), texels.normals[part].to(device)
        asked = [scene.material(points - depth * normals) for depth in inward_m]
        for name in names:
            found = [getattr(material, name) for material in asked]
            if found[0] is not None:
                total[name].append(torch.stack([values.cpu() for values in found]).mean(0))
    means = {name: torch.cat(parts) for name, parts in total.items() if parts}
    base_color = means["base_color"]
    bad = int((~torch.isfinite(base_color)).any(1).sum())
    if bad:
        raise ExportError(f"bake: the scene's material is not finite at {bad} of {len(base_color)} texels")
    return Material(**means)


def _spread(values: Float[Tensor, "n 1"]) -> float:
    return float((values - values.mean()).abs().max())


def _nearest_covered(covered: Bool[np.ndarray, "H W"]) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the nearest covered texel, for every texel."""
    rows, columns = ndimage.distance_transform_edt(~covered, return_distances=False, return_indices=True)
    return rows, columns


def _fill(
    values: Float[Tensor, "n 3"], covered: Bool[np.ndarray, "H W"], nearest: tuple[np.ndarray, np.ndarray]
) -> UInt8[Tensor, "H W 3"]:
    """Values of the covered texels as an 8-bit image without any empty texel.

    Filling the whole image, not only a rim, is what keeps small mip levels clean: they average far across borders.
    """
    image = np.zeros((*covered.shape, 3), np.uint8)
    image[covered] = np.rint(values.clamp(0, 1).numpy() * 255.0).astype(np.uint8)
    return torch.from_numpy(image[nearest])
