"""From a mesh file to a mesh scene that textures it: read, placed before the cameras, and given back as it was."""

from dataclasses import replace
from pathlib import Path

import torch

from sds3d.errors import InputError
from sds3d.interfaces import Surface
from sds3d.mathx.pose import UpAxis, fitting, upright
from sds3d.mesh.clean import decimate
from sds3d.mesh.gltf import encode_glb
from sds3d.mesh.read import load_geometry, with_creases
from sds3d.mesh.textured import TexturedMesh
from sds3d.mesh.unwrap import fault_of_uvs
from sds3d.mesh.weld import same_places
from sds3d.rng import Stream
from sds3d.scenes import MeshScene
from sds3d.scenes.file_mesh import FileMesh

START_FILE = "start.glb"  # the mesh that a run folder keeps, in the file's own axes and units


def read_given(path: Path, *, max_faces: int, keep_uvs: bool) -> tuple[TexturedMesh, str | None]:
    """The geometry of a mesh file, and what had to be done to it in words, or None.

    A mesh of more than `max_faces` is simplified; nothing else changes where its points and faces are.

    Raises:
        InputError: the file cannot be read, or its texture coordinates are asked for and no use.
    """
    mesh = load_geometry(path)
    if keep_uvs:
        fault = "are missing" if mesh.uvs is None else fault_of_uvs(mesh.uvs, mesh.faces)
        if fault is not None:
            raise InputError(f"{path}: its texture coordinates {fault}; leave out keep_uvs to get new ones")
    else:
        mesh = replace(mesh, uvs=None)
    count = len(mesh.faces)
    if count <= max_faces:
        return mesh, None
    if keep_uvs:
        raise InputError(
            f"{path}: has {count} faces, and start.mesh_faces is {max_faces}; raise it, or leave out keep_uvs"
        )
    first, group = same_places(mesh.vertices.numpy())
    joined = Surface(vertices=mesh.vertices[first], faces=torch.from_numpy(group)[mesh.faces])
    smaller = decimate(joined, int(0.98 * max_faces))
    if not 0 < len(smaller.faces) <= max_faces:
        raise InputError(
            f"{path}: has {count} faces, and no way was found to simplify it to start.mesh_faces = {max_faces}; "
            "raise that, or simplify the mesh elsewhere"
        )
    bare = TexturedMesh(
        vertices=smaller.vertices, faces=smaller.faces, normals=torch.zeros_like(smaller.vertices)
    )
    note = (
        f"{path.name}: simplified from {count} to {len(smaller.faces)} faces (start.mesh_faces = {max_faces})"
    )
    return with_creases(bare), note


def encode_given(mesh: TexturedMesh) -> bytes:
    """The contents of `START_FILE`; reading it gives the same mesh again."""
    return encode_glb(mesh, {})


def scene_from(
    mesh: TexturedMesh,
    config: MeshScene.Config,
    rng: Stream,
    *,
    up: UpAxis = "y",
    front_deg: float = 0.0,
    reach_m: float = 0.94,
) -> MeshScene:
    """A grey scene of this mesh: upright, facing +z, the farthest point `reach_m` from the middle of its box.

    Its asset will have the mesh's own vertices, faces, normals and, if it has any, texture coordinates.

    Raises:
        InputError: all its points are one.
    """
    try:
        pose = fitting(mesh.vertices, upright(up, front_deg), reach_m)
    except ValueError as error:
        raise InputError(f"the mesh cannot be placed: {error}") from error
    first, group = same_places(mesh.vertices.numpy())
    source = torch.from_numpy(group)
    file = FileMesh(
        source=source,
        faces=mesh.faces,
        normals=pose.directions(mesh.normals),
        uvs=mesh.uvs,
        positions=mesh.vertices,
        pose=pose,
    )
    surface = Surface(vertices=pose.points(mesh.vertices[first]), faces=source[mesh.faces])
    return MeshScene(config, surface, rng.fork("scene"), file)
