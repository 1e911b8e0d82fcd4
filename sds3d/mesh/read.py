"""Reading meshes from elsewhere: whatever the file is, the answer is a sound mesh or one InputError.

Nothing is fetched, unpacked or executed; files beside the mesh are read only from its own folder, and everything that
a file declares is held against `Limits` first.
"""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from PIL import Image
from torch import Tensor

from sds3d.errors import InputError
from sds3d.interfaces import Surface
from sds3d.mesh.checks import check_mesh
from sds3d.mesh.clean import vertex_normals
from sds3d.mesh.creases import split_at_creases
from sds3d.mesh.gltf_check import check_gltf
from sds3d.mesh.side_files import Limits, SideFiles
from sds3d.mesh.tangents import vertex_tangents
from sds3d.mesh.textured import TexturedMesh
from sds3d.mesh.weld import same_places

# What trimesh reads without further packages, archives left out.
READABLE = ("glb", "gltf", "obj", "ply", "stl", "off")
NORMAL_SLACK = 0.01  # normals whose length is farther from 1 are made anew


def load_mesh(path: Path, limits: Limits | None = None) -> TexturedMesh:
    """The one mesh of a file (glb, gltf, obj, ply, stl, off) with its material.

    Raises:
        InputError: the file cannot be read, is beyond the limits, or holds no mesh or more than one.
    """
    path = Path(path)
    parts = _parts(path, limits or Limits(), material=True)
    if len(parts) != 1:
        raise InputError(f"{path}: holds {len(parts)} meshes, expected exactly 1")
    return _checked(parts[0], path)


def load_geometry(path: Path, limits: Limits | None = None) -> TexturedMesh:
    """All triangles of a file as one mesh without material: places, normals, and uvs if all parts have them.

    Parts without normals get them, split at creases. Raises as `load_mesh`.
    """
    path = Path(path)
    parts = _parts(path, limits or Limits(), material=False)
    if not parts:
        raise InputError(f"{path}: holds no mesh; points and lines cannot be textured")
    starts = np.cumsum([0, *(len(part.vertices) for part in parts)])
    uvs = [part.uvs for part in parts if part.uvs is not None]
    whole = TexturedMesh(
        vertices=torch.cat([part.vertices for part in parts]),
        faces=torch.cat([part.faces + int(start) for part, start in zip(parts, starts, strict=False)]),
        normals=torch.cat([part.normals for part in parts]),
        uvs=torch.cat(uvs) if len(uvs) == len(parts) else None,
    )
    return _checked(whole, path)


def with_creases(mesh: TexturedMesh) -> TexturedMesh:
    """The mesh with normals made from its faces, its vertices split where they meet at an edge."""
    first, group = same_places(mesh.vertices.numpy())
    surface = Surface(vertices=mesh.vertices, faces=mesh.faces)
    if mesh.uvs is None:  # nothing but normals parts the vertices
        surface = Surface(vertices=mesh.vertices[first], faces=torch.from_numpy(group)[mesh.faces])
        group = np.arange(len(first))
    source, faces, normals = split_at_creases(surface, torch.from_numpy(group))
    return replace(
        mesh,
        vertices=surface.vertices[source],
        faces=faces,
        normals=normals,
        uvs=None if mesh.uvs is None else mesh.uvs[source],
    )


def _checked(mesh: TexturedMesh, path: Path) -> TexturedMesh:
    check_mesh(mesh.vertices, mesh.faces, f"{path}: the mesh", InputError)
    if mesh.uvs is not None and not bool(torch.isfinite(mesh.uvs).all()):
        raise InputError(f"{path}: the mesh has texture coordinates that are not finite")
    unusable = ~((mesh.normals.norm(dim=1) - 1.0).abs() < NORMAL_SLACK)
    if bool(unusable.any()):
        made = vertex_normals(Surface(vertices=mesh.vertices, faces=mesh.faces))
        return replace(mesh, normals=torch.where(unusable[:, None], made, mesh.normals))
    return mesh


def _parts(path: Path, limits: Limits, *, material: bool) -> list[TexturedMesh]:
    """The triangle meshes of a file where its scene places them, within the limits."""
    kind = path.suffix.lower().lstrip(".")
    if kind not in READABLE:
        raise InputError(f"{path}: unknown format; known formats: {', '.join(READABLE)}")
    if not path.is_file():
        raise InputError(f"{path}: cannot be read as a mesh (no such file)")
    side = SideFiles(path, limits)
    try:
        data = side.read(path)
        if kind in ("glb", "gltf"):
            check_gltf(data, side)
        # Not maintain_order: it would give each shared OBJ position one texture coordinate only.
        found = trimesh.load_scene(io.BytesIO(data), file_type=kind, resolver=side, process=False)
        if side.refusal is not None:  # trimesh goes on without
            raise side.refusal
        return [
            _from_trimesh(mesh, place, path, material=material)
            for mesh, place in _placed(found, path, limits)
        ]
    except InputError:
        raise
    except Exception as error:
        if side.refusal is not None:
            raise side.refusal from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{path}: cannot be read as a mesh ({reason[:300]})") from error


def _placed(scene: trimesh.Scene, path: Path, limits: Limits) -> list[tuple[trimesh.Trimesh, np.ndarray]]:
    """Every mesh as often as it is drawn, and where (4 4)."""
    placed = []
    for node in scene.graph.nodes_geometry:
        matrix, name = scene.graph[node]
        mesh = scene.geometry[name]
        if isinstance(mesh, trimesh.Trimesh):
            placed.append((mesh, np.asarray(matrix, np.float64)))
    for what, count, most in (
        ("faces", sum(len(mesh.faces) for mesh, _ in placed), limits.faces),
        ("vertices", sum(len(mesh.vertices) for mesh, _ in placed), limits.vertices),
    ):
        if count > most:
            raise InputError(f"{path}: has {count} {what}; the limit is {most}")
    return placed


def _from_trimesh(mesh: trimesh.Trimesh, place: np.ndarray, path: Path, *, material: bool) -> TexturedMesh:
    points, turn = np.asarray(mesh.vertices, np.float64).reshape(-1, 3), place[:3, :3]
    moved = not np.array_equal(place, np.eye(4))
    if moved:
        points = points @ turn.T + place[:3, 3]
    vertices = torch.from_numpy(np.ascontiguousarray(points, dtype=np.float32))
    faces = torch.from_numpy(np.ascontiguousarray(mesh.faces, dtype=np.int64).reshape(-1, 3))
    if moved and np.linalg.det(turn) < 0:  # a mirror turns faces inside out
        faces = faces.flip(1)
    check_mesh(vertices, faces, f"{path}: the mesh", InputError)
    has_normals = "vertex_normals" in mesh._cache
    if has_normals:
        given = np.asarray(mesh.vertex_normals, np.float64)
        given = given @ np.linalg.inv(turn) if moved else given
        normals = torch.from_numpy(np.ascontiguousarray(given, dtype=np.float32))
        normals = torch.nn.functional.normalize(normals, dim=1) if moved else normals
    else:
        normals = vertex_normals(Surface(vertices=vertices, faces=faces))
    plain = _colored(TexturedMesh(vertices=vertices, faces=faces, normals=normals), mesh.visual, material)
    return plain if has_normals or material else with_creases(plain)


def _colored(plain: TexturedMesh, visual: Any, material: bool) -> TexturedMesh:
    if visual.kind == "vertex" and material:
        return replace(plain, colors=torch.from_numpy(np.ascontiguousarray(visual.vertex_colors[:, :3])))
    if visual.kind != "texture" or visual.uv is None or len(visual.uv) != len(plain.vertices):
        return plain
    uvs = np.asarray(visual.uv, np.float64)[:, :2] * [1.0, -1.0] + [0.0, 1.0]  # trimesh counts v upwards
    mapped = replace(plain, uvs=torch.from_numpy(uvs.astype(np.float32)))
    return _with_material(mapped, visual.material) if material else mapped


def _with_material(mapped: TexturedMesh, material: Any) -> TexturedMesh:
    pbr = material if isinstance(material, trimesh.visual.material.PBRMaterial) else material.to_pbr()
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
