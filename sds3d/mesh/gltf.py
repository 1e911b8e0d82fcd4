"""Writing glTF 2.0: one mesh, one metallic-roughness material, embedded (GLB) or as .gltf + .bin + .png.

Written by hand rather than through a library: a scene of one primitive is a page of JSON, and so the sampler, the
buffer targets, the generator and the extras are exactly what the Khronos validator wants. `files.load_mesh` reads
the result back through trimesh, whose reader shares no code with this writer.
"""

import io
import json
import struct
from collections.abc import Mapping

import numpy as np
from PIL import Image
from torch import Tensor

from sds3d import __version__
from sds3d.errors import ConfigError, ExportError, InputError
from sds3d.mesh.textured import TexturedMesh

GENERATOR = f"sds3d {__version__}"

ARRAY_BUFFER, ELEMENT_ARRAY_BUFFER = 34962, 34963
FLOAT, UNSIGNED_SHORT, UNSIGNED_INT = 5126, 5123, 5125
LINEAR, LINEAR_MIPMAP_LINEAR, CLAMP_TO_EDGE = 9729, 9987, 33071
GLB_MAGIC, CHUNK_JSON, CHUNK_BIN = 0x46546C67, 0x4E4F534A, 0x004E4942

Metadata = Mapping[str, object]


def encode_glb(mesh: TexturedMesh, metadata: Metadata) -> bytes:
    """One self-contained binary file."""
    builder = _Builder(mesh, metadata)
    for name, image in _images(mesh).items():
        view = builder.add_view(png_bytes(image))
        builder.tree["images"].append({"name": name, "bufferView": view, "mimeType": "image/png"})
    return _glb(*builder.finish(uri=None))


def _glb(tree: dict, body: bytes) -> bytes:
    head = dump_json(tree)
    head += b" " * (-len(head) % 4)
    total = 12 + 8 + len(head) + 8 + len(body)
    return b"".join(
        [
            struct.pack("<III", GLB_MAGIC, 2, total),
            struct.pack("<II", len(head), CHUNK_JSON) + head,
            struct.pack("<II", len(body), CHUNK_BIN) + body,
        ]
    )


def read_glb_chunks(data: bytes) -> tuple[dict, bytes]:
    """The JSON tree and the binary body of a GLB. Raises struct.error or ValueError where it is none."""
    magic, version, total = struct.unpack_from("<III", data)
    if magic != GLB_MAGIC or version != 2 or total != len(data):
        raise ValueError("not a whole GLB of version 2")
    length = struct.unpack_from("<I", data, 12)[0]
    return json.loads(data[20 : 20 + length]), data[28 + length :]


class GlbWriter:
    """Float arrays in one buffer, for GLB files that are not a textured mesh."""

    def __init__(self) -> None:
        self.body = bytearray()
        self.views: list[dict] = []
        self.accessors: list[dict] = []

    def floats(self, array: np.ndarray, *, bounds: bool = False) -> int:
        """Append an (n, k) array as float32 vertex data; returns its accessor. `bounds` adds min and max."""
        data = np.ascontiguousarray(array, "<f4")
        accessor = {
            "bufferView": len(self.views),
            "componentType": FLOAT,
            "count": len(data),
            "type": {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4"}[data.shape[1]],
        }
        if bounds:
            accessor |= {"min": data.min(0).tolist(), "max": data.max(0).tolist()}
        self.views.append(
            {
                "buffer": 0,
                "byteOffset": len(self.body),
                "byteLength": data.nbytes,
                "target": ARRAY_BUFFER,
            }
        )
        self.body += data.tobytes()
        self.accessors.append(accessor)
        return len(self.accessors) - 1

    def finish(self, tree: Mapping[str, object]) -> bytes:
        """The file contents; `tree` is the JSON without accessors, views and buffers."""
        whole = {
            **tree,
            "accessors": self.accessors,
            "bufferViews": self.views,
            "buffers": [{"byteLength": len(self.body)}],
        }
        return _glb(whole, bytes(self.body))


def encode_gltf(mesh: TexturedMesh, stem: str, metadata: Metadata) -> dict[str, bytes]:
    """File contents by name: `stem`.gltf first, then .bin and one PNG per texture."""
    builder = _Builder(mesh, metadata)
    pictures = {}
    for name, image in _images(mesh).items():
        uri = f"{stem}_{name}.png"
        pictures[uri] = png_bytes(image)
        builder.tree["images"].append({"name": name, "uri": uri, "mimeType": "image/png"})
    tree, body = builder.finish(uri=f"{stem}.bin")
    return {f"{stem}.gltf": dump_json(tree), f"{stem}.bin": body, **pictures}


def read_metadata(data: bytes) -> dict[str, object]:
    """The `asset.extras` of GLB or glTF file contents."""
    try:
        if data[:4] == b"glTF":
            length = struct.unpack_from("<I", data, 12)[0]
            data = data[20 : 20 + length]
        return dict(json.loads(data)["asset"].get("extras", {}))
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise InputError(f"read_metadata: not a glTF 2.0 file ({error})") from error


def png_bytes(image: Tensor) -> bytes:
    """PNG file contents of an (H, W, 3) uint8 image."""
    out = io.BytesIO()
    Image.fromarray(image.cpu().numpy()).save(out, format="PNG", compress_level=6)
    return out.getvalue()


def dump_json(tree: object) -> bytes:
    """Compact UTF-8 JSON; a value that JSON cannot hold is the caller's metadata, hence a ConfigError."""
    try:
        return json.dumps(tree, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"glTF metadata must be plain JSON (text, finite numbers, lists, tables): {error}"
        ) from error


def _images(mesh: TexturedMesh) -> dict[str, Tensor]:
    images = {
        "base_color": mesh.texture,
        "metallic_roughness": mesh.metallic_roughness,
        "normal": mesh.normal_texture,
    }
    return {name: image for name, image in images.items() if image is not None}


class _Builder:
    """The JSON tree and the binary body, grown together."""

    def __init__(self, mesh: TexturedMesh, metadata: Metadata) -> None:
        self.body = bytearray()
        self.tree: dict = {
            "asset": {"version": "2.0", "generator": GENERATOR, "extras": dict(metadata)},
            "scene": 0,
            "scenes": [{"nodes": [0]}],
            "nodes": [{"name": "asset", "mesh": 0}],
            "meshes": [],
            "materials": [_material(mesh)],
            "accessors": [],
            "bufferViews": [],
            "images": [],
        }
        self._add_mesh(mesh)
        images = _images(mesh)
        if images:
            self.tree["samplers"] = [
                {
                    "magFilter": LINEAR,
                    "minFilter": LINEAR_MIPMAP_LINEAR,
                    "wrapS": CLAMP_TO_EDGE,
                    "wrapT": CLAMP_TO_EDGE,
                }
            ]
            self.tree["textures"] = [{"sampler": 0, "source": index} for index in range(len(images))]

    def add_view(self, data: bytes, target: int | None = None) -> int:
        """Append bytes, 4-byte aligned as accessors need; returns the index of the view."""
        view = {"buffer": 0, "byteOffset": len(self.body), "byteLength": len(data)}
        if target is not None:
            view["target"] = target
        self.body += data + bytes(-len(data) % 4)
        self.tree["bufferViews"].append(view)
        return len(self.tree["bufferViews"]) - 1

    def finish(self, uri: str | None) -> tuple[dict, bytes]:
        """The tree with its one buffer, and the body. glTF forbids empty lists, so they are left out."""
        buffer: dict = {"byteLength": len(self.body)}
        if uri is not None:
            buffer["uri"] = uri
        tree = {key: value for key, value in self.tree.items() if value != []}
        return {**tree, "buffers": [buffer]}, bytes(self.body)

    def _add_mesh(self, mesh: TexturedMesh) -> None:
        positions = _array(mesh.vertices)
        attributes = {"POSITION": self._add_accessor(positions, "VEC3", FLOAT, ARRAY_BUFFER)}
        self.tree["accessors"][0] |= {"min": positions.min(0).tolist(), "max": positions.max(0).tolist()}
        attributes["NORMAL"] = self._add_accessor(_array(mesh.normals), "VEC3", FLOAT, ARRAY_BUFFER)
        if mesh.uvs is not None:
            attributes["TEXCOORD_0"] = self._add_accessor(_array(mesh.uvs), "VEC2", FLOAT, ARRAY_BUFFER)
        elif mesh.colors is not None:
            raise ExportError(
                "glTF export writes textures, and this mesh has vertex colours only (read from a PLY?)"
            )
        if mesh.tangents is not None:
            attributes["TANGENT"] = self._add_accessor(_array(mesh.tangents), "VEC4", FLOAT, ARRAY_BUFFER)
        # The greatest index of a type means "restart" to some drivers, hence < 65535.
        small = len(positions) < 65535
        indices = mesh.faces.numpy().reshape(-1, 1).astype("<u2" if small else "<u4")
        kind = UNSIGNED_SHORT if small else UNSIGNED_INT
        primitive = {
            "attributes": attributes,
            "indices": self._add_accessor(indices, "SCALAR", kind, ELEMENT_ARRAY_BUFFER),
            "material": 0,
        }
        self.tree["meshes"].append({"name": "asset", "primitives": [primitive]})

    def _add_accessor(self, array: np.ndarray, shape: str, kind: int, target: int) -> int:
        view = self.add_view(np.ascontiguousarray(array).tobytes(), target)
        self.tree["accessors"].append(
            {"bufferView": view, "componentType": kind, "count": len(array), "type": shape}
        )
        return len(self.tree["accessors"]) - 1


def _material(mesh: TexturedMesh) -> dict:
    pbr: dict = {"metallicFactor": mesh.metallic, "roughnessFactor": mesh.roughness}
    material: dict = {"name": "asset", "pbrMetallicRoughness": pbr, "doubleSided": not mesh.closed}
    for index, name in enumerate(_images(mesh)):
        if name == "normal":
            material["normalTexture"] = {"index": index}
            continue
        key = {"base_color": "baseColorTexture", "metallic_roughness": "metallicRoughnessTexture"}[name]
        pbr[key] = {"index": index}
        if name == "metallic_roughness" and mesh.occluded:
            material["occlusionTexture"] = {"index": index}
    return material


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy().astype("<f4")
