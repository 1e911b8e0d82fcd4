"""What a glTF file declares, held against the limits before anything is made of it.

A few hundred bytes can declare an array of a terabyte, a mesh drawn a million times, or a node that is its own parent.
"""

import base64
import binascii
import json
import struct
from collections.abc import Iterator
from typing import Any

from sds3d.mesh.gltf import CHUNK_BIN, GLB_MAGIC
from sds3d.mesh.side_files import MIB, SideFiles

COMPONENT_BYTES = {5120: 1, 5121: 1, 5122: 2, 5123: 2, 5125: 4, 5126: 4}
SHAPES = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
TRIANGLES = 4
# Required extensions that change nothing about the geometry; others mean that it would come out wrong.
HARMLESS = ("KHR_materials_", "KHR_texture_", "KHR_lights_", "EXT_texture_", "MSFT_")


def check_gltf(data: bytes, side: SideFiles) -> None:
    """Raise InputError for a file that declares what it cannot hold, or more than the limits of `side`.

    Any of KeyError, TypeError, ValueError, IndexError, AttributeError, struct.error tells of a damaged file.
    """
    tree, body = _tree(data)
    unknown = [name for name in tree.get("extensionsRequired", []) if not str(name).startswith(HARMLESS)]
    if unknown:
        side.refuse(f"needs the glTF extension {unknown[0]}, which cannot be read; export it without")
    _check_arrays(tree, side)
    _check_nodes(tree, side)
    _check_faces(tree, side)
    for index, picture in enumerate(_embedded(tree, body)):
        side.check_picture(picture, f"image {index}")


def _tree(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The JSON of a .glb or .gltf, and the binary chunk of the former."""
    if data[:4] != b"glTF":
        return json.loads(data), b""
    if len(data) < 20:
        raise ValueError(f"it ends after {len(data)} bytes")
    magic, version, total = struct.unpack_from("<III", data)
    length, _ = struct.unpack_from("<II", data, 12)
    if magic != GLB_MAGIC or version != 2 or total > len(data) or 20 + length > len(data):
        raise ValueError(f"not a whole GLB of version 2: {len(data)} bytes of {total}")
    tree, body, at = json.loads(data[20 : 20 + length]), b"", 20 + length
    if at + 8 <= len(data):
        size, kind = struct.unpack_from("<II", data, at)
        body = data[at + 8 : at + 8 + size] if kind == CHUNK_BIN else b""
    return tree, body


def _count(value: Any) -> int:
    """A size as the file declares it; ValueError for anything but a whole number from 0 on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{str(value)[:40]!r} is no size")
    return value


def _check_arrays(tree: dict[str, Any], side: SideFiles) -> None:
    """Views may overlap and accessors repeat: what counts is what they unpack to."""
    budget = 4 * side.limits.file_mib * MIB
    total = sum(_count(view["byteLength"]) for view in tree.get("bufferViews", []))
    for accessor in tree.get("accessors", []):
        if "sparse" in accessor:
            side.refuse("holds sparse accessors, which cannot be read; export it without")
        size = COMPONENT_BYTES[accessor["componentType"]] * SHAPES[accessor["type"]]
        total += _count(accessor["count"]) * size
    if total > budget:
        side.refuse(f"declares arrays of {total / MIB:.0f} MiB; the limit is {budget // MIB} MiB")


def _check_nodes(tree: dict[str, Any], side: SideFiles) -> None:
    """Nodes are trees: every node has one parent at most and none is its own ancestor."""
    nodes = tree.get("nodes", [])
    if len(nodes) > side.limits.nodes:
        side.refuse(f"holds {len(nodes)} nodes; the limit is {side.limits.nodes}")
    parent: dict[int, int] = {}
    for index, node in enumerate(nodes):
        for child in node.get("children", []):
            if child in parent or not 0 <= _count(child) < len(nodes):
                side.refuse(f"node {child} has two parents or does not exist")
            parent[child] = index
    for index in range(len(nodes)):
        steps, at = 0, index
        while at in parent:
            at, steps = parent[at], steps + 1
            if at == index or steps > 200:
                side.refuse("nodes form a circle, or lie more than 200 deep")


def _check_faces(tree: dict[str, Any], side: SideFiles) -> None:
    """Faces and vertices, each mesh as often as it is drawn."""
    accessors, meshes = tree.get("accessors", []), tree.get("meshes", [])
    drawn = [0] * len(meshes)
    for node in tree.get("nodes", []):
        if "mesh" in node:
            drawn[_count(node["mesh"])] += 1
    faces = vertices = 0
    for mesh, times in zip(meshes, drawn, strict=True):
        for primitive in mesh["primitives"]:
            if primitive.get("mode", TRIANGLES) < TRIANGLES:
                continue
            corners = _count(accessors[_count(primitive["attributes"]["POSITION"])]["count"])
            vertices += max(times, 1) * corners
            indices = primitive.get("indices")
            named = corners if indices is None else _count(accessors[_count(indices)]["count"])
            faces += max(times, 1) * named // (3 if primitive.get("mode", TRIANGLES) == TRIANGLES else 1)
    for what, count, most in (
        ("faces", faces, side.limits.faces),
        ("vertices", vertices, side.limits.vertices),
    ):
        if count > most:
            side.refuse(f"declares {count} {what}; the limit is {most}")


def _embedded(tree: dict[str, Any], body: bytes) -> Iterator[bytes]:
    """Pictures inside the file itself. Those in other files are looked at when they are read."""
    buffers = [_data_uri(buffer.get("uri", "")) for buffer in tree.get("buffers", [])]
    for image in tree.get("images", []):
        if "bufferView" in image:
            view = tree["bufferViews"][_count(image["bufferView"])]
            whole = buffers[_count(view["buffer"])] or body
            start = _count(view.get("byteOffset", 0))
            yield whole[start : start + _count(view["byteLength"])]
        else:
            yield _data_uri(image.get("uri", ""))


def _data_uri(uri: str) -> bytes:
    head, comma, text = uri.partition("base64,")
    if not comma or not head.startswith("data:"):
        return b""
    try:
        return base64.b64decode(text)
    except binascii.Error as error:
        raise ValueError(f"a data URI is damaged: {error}") from error
