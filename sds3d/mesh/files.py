"""Files of a finished asset: the table of formats, whole-or-nothing writing, and reading back."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from PIL import Image
from torch import Tensor

from sds3d.errors import ConfigError, ExportError, InputError
from sds3d.interfaces import Surface
from sds3d.mesh.clean import vertex_normals
from sds3d.mesh.gltf import Metadata, encode_glb, encode_gltf, png_bytes, read_metadata
from sds3d.mesh.tangents import vertex_tangents
from sds3d.mesh.textured import TexturedMesh, sample_texture
from sds3d.mesh.usdz import encode_usdz

Files = dict[str, bytes]  # contents by file name; the first is the one that a user opens
Exporter = Callable[[TexturedMesh, str, Metadata], Files]


def _glb(mesh: TexturedMesh, stem: str, metadata: Metadata) -> Files:
    return {f"{stem}.glb": encode_glb(mesh, metadata)}


def _gltf(mesh: TexturedMesh, stem: str, metadata: Metadata) -> Files:
    return encode_gltf(mesh, stem, metadata)


def _obj(mesh: TexturedMesh, stem: str, metadata: Metadata) -> Files:
    """Positions and normals are shared across texture seams, as in the surface: the OBJ opens as one closed mesh."""
    vertices, group = welded(mesh)
    picture = f"{stem}_base_color.png"
    files: Files = {}
    lines = [
        f"# {key}: {str(value).splitlines()[0] if str(value) else ''}" for key, value in metadata.items()
    ]
    lines += [f"mtllib {stem}.mtl", "o asset", "usemtl asset"]
    lines += _rows("v", vertices)
    first = np.unique(group, return_index=True)[1]
    lines += _rows("vn", mesh.normals.numpy()[first])
    faces = mesh.faces.numpy()
    shared = group[faces] + 1
    if mesh.texture is not None and mesh.uvs is not None:
        lines += _rows("vt", mesh.uvs.numpy() * [1.0, -1.0] + [0.0, 1.0])  # OBJ counts v upwards
        triples = np.stack([shared, faces + 1, shared], axis=2).tolist()
        lines += ["f " + " ".join(f"{v}/{vt}/{vn}" for v, vt, vn in row) for row in triples]
        files[picture] = png_bytes(mesh.texture)
    else:
        lines += ["f " + " ".join(f"{v}//{v}" for v in row) for row in shared.tolist()]
    material = ["newmtl asset", "Ka 0 0 0", "Kd 1 1 1", f"Pm {mesh.metallic:.6g}", f"Pr {mesh.roughness:.6g}"]
    if mesh.texture is not None:
        material.append(f"map_Kd {picture}")
    for keyword, name, image in _obj_maps(mesh):
        files[f"{stem}_{name}.png"] = png_bytes(image)
        material.append(f"{keyword} {stem}_{name}.png")
    return {f"{stem}.obj": _text(lines), f"{stem}.mtl": _text(material), **files}


def _obj_maps(mesh: TexturedMesh) -> list[tuple[str, str, Tensor]]:
    """Keyword, name and picture of the PBR maps, one grey picture per quantity as MTL readers expect."""
    maps = []
    if mesh.metallic_roughness is not None:
        roughness, metallic = mesh.metallic_roughness[..., 1:2], mesh.metallic_roughness[..., 2:3]
        maps = [
            ("map_Pr", "roughness", roughness.expand(-1, -1, 3)),
            ("map_Pm", "metallic", metallic.expand(-1, -1, 3)),
        ]
    if mesh.normal_texture is not None:
        maps.append(("norm", "normal", mesh.normal_texture))
    return maps


def _usdz(mesh: TexturedMesh, stem: str, metadata: Metadata) -> Files:
    return {f"{stem}.usdz": encode_usdz(mesh, metadata)}


def _ply(mesh: TexturedMesh, stem: str, metadata: Metadata) -> Files:
    plain = _plain(mesh, colors=True)
    return {f"{stem}.ply": trimesh.exchange.ply.export_ply(plain, encoding="binary", vertex_normal=True)}


def _stl(mesh: TexturedMesh, stem: str, metadata: Metadata) -> Files:
    return {f"{stem}.stl": trimesh.exchange.stl.export_stl(_plain(mesh, colors=False))}


EXPORTERS: dict[str, Exporter] = {
    "glb": _glb,  # everything in one file; the recommended format
    "gltf": _gltf,  # the same as .gltf + .bin + .png
    "obj": _obj,  # .obj + .mtl + .png
    "ply": _ply,  # vertex colours, closed; no texture
    "stl": _stl,  # shape only, closed; for printing
    "usdz": _usdz,  # for AR viewers; written only, not read back
}


def check_formats(formats: Sequence[str]) -> None:
    """Raise ConfigError unless all formats are known and there is at least one."""
    unknown = [name for name in formats if name not in EXPORTERS]
    if unknown or not formats:
        what = f"unknown format {unknown[0]!r}" if unknown else "no format given"
        raise ConfigError(f"export: {what}; known formats: {', '.join(EXPORTERS)}")


def export_mesh(
    mesh: TexturedMesh, folder: Path, stem: str, formats: Sequence[str], metadata: Metadata | None = None
) -> dict[str, Path]:
    """Write a mesh in all formats, whole or not at all; returns the main file of each format."""
    check_formats(formats)
    if not stem or any(letter in '<>:"/\\|?* ' or letter < " " for letter in stem) or stem[0] == ".":
        raise ConfigError(f"export: {stem!r} cannot be a file name; use letters, digits, '-', '_' and '.'")
    contents = {name: EXPORTERS[name](mesh, stem, metadata or {}) for name in formats}
    write_files(folder, {file: data for files in contents.values() for file, data in files.items()})
    return {name: folder / next(iter(files)) for name, files in contents.items()}


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write all files or none: first to temporary files beside them, then renamed one by one.

    A full disk or a kill leaves either the old files or the new ones, and no half-written file under a real name.
    Raises ExportError with the operating system's reason.
    """
    waiting: list[tuple[str, Path]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in contents.items():
            descriptor, temporary = tempfile.mkstemp(prefix=".sds3d-", suffix=".tmp", dir=folder)
            waiting.append((temporary, folder / name))
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
        for temporary, final in waiting:
            os.replace(temporary, final)
    except OSError as error:
        raise ExportError(
            f"cannot write {', '.join(contents)} to {folder}: {error.strerror or error}"
        ) from error
    finally:
        for temporary, _ in waiting:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _umask() -> int:
    """The process's file mode mask; mkstemp makes private files, an export should not be one."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def load_mesh(path: Path) -> TexturedMesh:
    """Read any exported file (glb, gltf, obj, ply, stl) back from disk. Raises InputError if it cannot be read."""
    path = Path(path)
    readable = [name for name in EXPORTERS if name != "usdz"]
    if path.suffix.lower().lstrip(".") not in readable:
        raise InputError(f"{path}: unknown format; known formats: {', '.join(readable)}")
    try:
        # Not maintain_order: it would give each shared OBJ position one texture coordinate only.
        found = trimesh.load_scene(path, process=False)
    except Exception as error:
        raise InputError(f"{path}: cannot be read as a mesh ({type(error).__name__}: {error})") from error
    meshes = [geometry for geometry in found.geometry.values() if isinstance(geometry, trimesh.Trimesh)]
    if len(meshes) != 1:
        raise InputError(f"{path}: holds {len(meshes)} meshes, expected exactly 1")
    return _from_trimesh(meshes[0])


def load_glb(path: Path) -> tuple[TexturedMesh, dict[str, object]]:
    """Mesh and metadata of a glb or gltf file."""
    return load_mesh(path), read_metadata(Path(path).read_bytes())


def welded(mesh: TexturedMesh) -> tuple[np.ndarray, np.ndarray]:
    """Distinct positions (w, 3), and for each vertex of the mesh its row there: the mesh before the seams were cut."""
    vertices = mesh.vertices.detach().cpu().numpy()
    _, first, group = np.unique(vertices, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    rank = np.argsort(order, kind="stable")
    return vertices[first[order]], rank[group.reshape(-1)]


def _plain(mesh: TexturedMesh, *, colors: bool) -> trimesh.Trimesh:
    """The welded mesh for formats without texture, with vertex colours if asked."""
    vertices, group = welded(mesh)
    first = np.unique(group, return_index=True)[1]
    color = _vertex_colors(mesh)[first] if colors else None
    return trimesh.Trimesh(
        vertices=vertices,
        faces=group[mesh.faces.numpy()],
        vertex_normals=mesh.normals.numpy()[first],
        vertex_colors=color,
        process=False,
    )


def _vertex_colors(mesh: TexturedMesh) -> np.ndarray:
    if mesh.texture is not None and mesh.uvs is not None:
        return np.rint(sample_texture(mesh.texture, mesh.uvs).numpy() * 255.0).astype(np.uint8)
    return mesh.colors.numpy() if mesh.colors is not None else np.full((len(mesh.vertices), 3), 255, np.uint8)


def _from_trimesh(mesh: trimesh.Trimesh) -> TexturedMesh:
    vertices = torch.from_numpy(np.ascontiguousarray(mesh.vertices, dtype=np.float32))
    faces = torch.from_numpy(np.ascontiguousarray(mesh.faces, dtype=np.int64))
    if "vertex_normals" in mesh._cache:
        normals = torch.from_numpy(np.ascontiguousarray(mesh.vertex_normals, dtype=np.float32))
    else:
        normals = vertex_normals(Surface(vertices=vertices, faces=faces))
    plain = TexturedMesh(vertices=vertices, faces=faces, normals=normals)
    visual: Any = mesh.visual
    if visual.kind == "vertex":
        return replace(plain, colors=torch.from_numpy(np.ascontiguousarray(visual.vertex_colors[:, :3])))
    if visual.kind != "texture" or visual.uv is None:
        return plain
    uvs = np.asarray(visual.uv, np.float64) * [1.0, -1.0] + [0.0, 1.0]  # trimesh counts v upwards
    material = visual.material
    pbr = material if isinstance(material, trimesh.visual.material.PBRMaterial) else material.to_pbr()
    mapped = replace(plain, uvs=torch.from_numpy(uvs.astype(np.float32)))
    detail = _pixels(pbr.normalTexture)
    return replace(
        mapped,
        normal_texture=detail,
        tangents=None if detail is None else vertex_tangents(mapped),
        texture=_pixels(pbr.baseColorTexture),
        metallic_roughness=_pixels(pbr.metallicRoughnessTexture),
        occluded=pbr.occlusionTexture is not None,
        metallic=float(pbr.metallicFactor if pbr.metallicFactor is not None else 1.0),
        roughness=float(pbr.roughnessFactor if pbr.roughnessFactor is not None else 1.0),
        closed=not pbr.doubleSided,
    )


def _pixels(image: Image.Image | None) -> Tensor | None:
    return None if image is None else torch.from_numpy(np.array(image.convert("RGB")))


def _rows(keyword: str, values: np.ndarray) -> list[str]:
    return [keyword + " " + " ".join(f"{value:.9g}" for value in row) for row in values.tolist()]


def _text(lines: list[str]) -> bytes:
    return ("\n".join(lines) + "\n").encode()
