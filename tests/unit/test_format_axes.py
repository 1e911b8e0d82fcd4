"""Every mesh format puts the same colour at the same place: metres, +y up, the front towards +z.

The files are read here byte by byte, by readers that share no code with the package.
"""

import io
import json
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sds3d.mesh.files import EXPORTERS, export_mesh
from sds3d.mesh.textured import TexturedMesh

# A corner at the origin and one on each axis, at three distances: no turn and no mirror keeps all of them.
CORNERS = {
    "black": (0.0, 0.0, 0.0),
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 2.0, 0.0),
    "blue": (0.0, 0.0, 3.0),
}
COLORS = {"black": (0, 0, 0), "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
UVS = {"black": (0.125, 0.125), "red": (0.875, 0.125), "green": (0.125, 0.875), "blue": (0.875, 0.875)}
SIZE = 8

Points = dict[tuple[float, ...], tuple[int, ...] | None]  # colour by place; None where the format has none


@pytest.fixture
def mesh() -> TexturedMesh:
    texture = torch.zeros(SIZE, SIZE, 3, dtype=torch.uint8)
    for name, (u, v) in UVS.items():  # glTF counts v downwards
        row, column = int(v * SIZE) // 4 * 4, int(u * SIZE) // 4 * 4
        texture[row : row + 4, column : column + 4] = torch.tensor(COLORS[name], dtype=torch.uint8)
    return TexturedMesh(
        vertices=torch.tensor(list(CORNERS.values())),
        faces=torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]]),
        normals=torch.nn.functional.normalize(torch.tensor(list(CORNERS.values())) - 0.2, dim=1),
        uvs=torch.tensor(list(UVS.values())),
        texture=texture,
        roughness=0.5,
    )


def texel(png: bytes, u: float, v_down: float) -> tuple[int, ...]:
    image = Image.open(io.BytesIO(png)).convert("RGB")
    return image.getpixel((int(u * image.width), int(v_down * image.height)))


def numbers(text: str) -> list[float]:
    return [float(word) for word in re.findall(r"[-+0-9.e]+", text)]


def of_tree(tree: dict, body: bytes, picture: bytes) -> tuple[Points, np.ndarray]:
    def read(accessor: dict, kind: str, width: int) -> np.ndarray:
        start = tree["bufferViews"][accessor["bufferView"]].get("byteOffset", 0)
        return np.frombuffer(body, kind, accessor["count"] * width, start).reshape(-1, width)

    (primitive,) = tree["meshes"][0]["primitives"]
    accessors = tree["accessors"]
    places = read(accessors[primitive["attributes"]["POSITION"]], "<f4", 3)
    uvs = read(accessors[primitive["attributes"]["TEXCOORD_0"]], "<f4", 2)
    faces = read(accessors[primitive["indices"]], "<u2", 1).reshape(-1, 3)
    points: Points = {
        tuple(p): texel(picture, *uv) for p, uv in zip(places.tolist(), uvs.tolist(), strict=True)
    }
    return points, places[faces]


def of_glb(path: Path) -> tuple[Points, np.ndarray]:
    data = path.read_bytes()
    length = struct.unpack_from("<I", data, 12)[0]
    tree, body = json.loads(data[20 : 20 + length]), data[28 + length :]
    view = tree["bufferViews"][tree["images"][0]["bufferView"]]
    return of_tree(tree, body, body[view["byteOffset"] : view["byteOffset"] + view["byteLength"]])


def of_gltf(path: Path) -> tuple[Points, np.ndarray]:
    tree = json.loads(path.read_text())
    body = (path.parent / tree["buffers"][0]["uri"]).read_bytes()
    return of_tree(tree, body, (path.parent / tree["images"][0]["uri"]).read_bytes())


def of_obj(path: Path) -> tuple[Points, np.ndarray]:
    rows = [line.split() for line in path.read_text().splitlines() if line]
    places, uvs = ([numbers(" ".join(row[1:])) for row in rows if row[0] == key] for key in ("v", "vt"))
    material = path.with_suffix(".mtl").read_text()
    found = re.search(r"^map_Kd (.+)$", material, re.MULTILINE)
    assert found is not None
    picture = (path.parent / found[1]).read_bytes()
    points: Points = {}
    faces = []
    for row in rows:
        if row[0] == "f":
            corners = [[int(number) - 1 for number in corner.split("/")[:2]] for corner in row[1:]]
            faces.append([places[v] for v, _ in corners])
            for v, vt in corners:
                points[tuple(places[v])] = texel(
                    picture, uvs[vt][0], 1.0 - uvs[vt][1]
                )  # OBJ counts v upwards
    return points, np.array(faces)


def of_ply(path: Path) -> tuple[Points, np.ndarray]:
    head, body = path.read_bytes().split(b"end_header\n", 1)
    sizes = {"float": "<f4", "uchar": "u1", "int": "<i4", "uint": "<u4"}
    names = re.findall(r"property (float|uchar) (\w+)", head.decode())
    table = np.dtype([(name, sizes[kind]) for kind, name in names])
    vertices = np.frombuffer(body, table, 4)
    listed = re.search(r"property list uchar (u?int) ", head.decode())
    assert listed is not None
    row = np.dtype([("count", "u1"), ("corners", sizes[listed[1]], 3)])
    faces = np.frombuffer(body, row, 4, vertices.nbytes)["corners"]
    places = np.stack([vertices[axis] for axis in "xyz"], 1)
    colors = np.stack([vertices[channel] for channel in ("red", "green", "blue")], 1).tolist()
    return {tuple(p): tuple(c) for p, c in zip(places.tolist(), colors, strict=True)}, places[faces]


def of_stl(path: Path) -> tuple[Points, np.ndarray]:
    data = path.read_bytes()
    row = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
    faces = np.frombuffer(data, row, struct.unpack_from("<I", data, 80)[0], 84)["corners"]
    return dict.fromkeys(map(tuple, faces.reshape(-1, 3).tolist())), faces


def of_usdz(path: Path) -> tuple[Points, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        layer = archive.read("asset.usda").decode()
        picture = archive.read("textures/base_color.png")
    assert "metersPerUnit = 1\n" in layer
    assert 'upAxis = "Y"\n' in layer

    def field(name: str) -> list[float]:
        return numbers(layer.split(f"{name} = [")[1].split("]")[0])

    places = np.array(field("point3f[] points")).reshape(-1, 3)
    uvs = np.array(field("primvars:st")).reshape(-1, 2).tolist()
    faces = np.array(field("faceVertexIndices"), int).reshape(-1, 3)
    points: Points = {
        tuple(p): texel(picture, u, 1.0 - v_up) for p, (u, v_up) in zip(places.tolist(), uvs, strict=True)
    }
    return points, places[faces]


READERS = {"glb": of_glb, "gltf": of_gltf, "obj": of_obj, "ply": of_ply, "stl": of_stl, "usdz": of_usdz}


def test_every_format_has_a_reader_here() -> None:
    assert READERS.keys() == EXPORTERS.keys()


@pytest.mark.parametrize("kind", sorted(READERS))
def test_places_colours_and_windings_of_the_bytes_on_disk(
    mesh: TexturedMesh, tmp_path: Path, kind: str
) -> None:
    points, faces = READERS[kind](export_mesh(mesh, tmp_path, "x", (kind,))[kind])
    wanted: Points = {CORNERS[name]: None if kind == "stl" else COLORS[name] for name in CORNERS}
    assert points == wanted
    # Counter-clockwise seen from outside: the signed volume of the tetrahedron is +1, in cubic metres.
    a, b, c = (faces[:, corner].astype(np.float64) for corner in range(3))
    assert (a * np.cross(b, c)).sum() / 6.0 == pytest.approx(1.0)
