"""Files of a finished asset: the table of formats, whole-or-nothing writing, and reading back."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import trimesh
from torch import Tensor

from sds3d.errors import ConfigError, ExportError
from sds3d.mesh.checks import check_mesh
from sds3d.mesh.gltf import Metadata, encode_glb, encode_gltf, png_bytes, read_metadata
from sds3d.mesh.read import load_mesh
from sds3d.mesh.textured import TexturedMesh, sample_texture
from sds3d.mesh.usdz import encode_usdz
from sds3d.mesh.weld import same_places

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
    return write_formats(folder, encode_mesh(mesh, stem, formats, metadata or {}))


def encode_mesh(
    mesh: TexturedMesh, stem: str, formats: Sequence[str], metadata: Metadata
) -> dict[str, Files]:
    """The files of every format.

    Raises:
        ConfigError: unknown formats, or a name that is no file name. ExportError: no file can hold this mesh.
    """
    check_formats(formats)
    check_stem(stem)
    check_mesh(mesh.vertices, mesh.faces, "export: the mesh")
    return {name: EXPORTERS[name](mesh, stem, metadata) for name in formats}


def write_formats(folder: Path, contents: Mapping[str, Files]) -> dict[str, Path]:
    """Write what `encode_mesh` made, whole or not at all; returns the main file of each format."""
    write_files(folder, {file: data for files in contents.values() for file, data in files.items()})
    return {name: folder / next(iter(files)) for name, files in contents.items()}


def check_stem(stem: str) -> None:
    """Raise ConfigError unless `stem` can begin a file name on every system."""
    if not stem or any(letter in '<>:"/\\|?* ' or letter < " " for letter in stem) or stem[0] == ".":
        raise ConfigError(f"{stem!r} cannot be a file name; use letters, digits, '-', '_' and '.'")


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


def load_glb(path: Path) -> tuple[TexturedMesh, dict[str, object]]:
    """Mesh and metadata of a glb or gltf file."""
    return load_mesh(path), read_metadata(Path(path).read_bytes())


def welded(mesh: TexturedMesh) -> tuple[np.ndarray, np.ndarray]:
    """Distinct positions (w, 3), and for each vertex of the mesh its row there: the mesh before the seams were cut."""
    vertices = mesh.vertices.detach().cpu().numpy()
    first, group = same_places(vertices)
    return vertices[first], group


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


def _rows(keyword: str, values: np.ndarray) -> list[str]:
    return [keyword + " " + " ".join(f"{value:.9g}" for value in row) for row in values.tolist()]


def _text(lines: list[str]) -> bytes:
    return ("\n".join(lines) + "\n").encode()
