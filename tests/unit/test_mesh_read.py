"""Meshes from elsewhere: what is a mesh is read whole, and what is not, or asks for too much, is one message."""

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh

from sds3d.errors import InputError
from sds3d.interfaces import Surface
from sds3d.mesh.creases import split_at_creases
from sds3d.mesh.files import load_mesh
from sds3d.mesh.gltf import GlbWriter
from sds3d.mesh.read import READABLE, load_geometry
from sds3d.mesh.side_files import Limits
from sds3d.mesh.weld import same_places

BOX = trimesh.creation.box((1.0, 2.0, 3.0))
CUBE_OBJ = "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n"


def corners(vertices: Any, faces: Any) -> np.ndarray:
    """The triangles (f, 3, 3), sorted, as float32."""
    triangles = np.asarray(vertices, np.float32)[np.asarray(faces)].reshape(-1, 9)
    return triangles[np.lexsort(triangles.T)]


def gltf(**changes: Any) -> dict[str, Any]:
    """A triangle as glTF, with its buffer in x.bin, changed at the top level."""
    return {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
        "accessors": [{"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"}],
        "bufferViews": [{"buffer": 0, "byteLength": 36}],
        "buffers": [{"uri": "x.bin", "byteLength": 36}],
        **changes,
    }


def with_gltf(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "x.bin").write_bytes(np.eye(3, dtype="<f4").tobytes())
    (folder / "x.gltf").write_text(json.dumps(gltf(**changes)))
    return folder / "x.gltf"


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims to be this large and holds nothing."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [head, b"IDAT", b"IEND"]
    packed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("kind", READABLE)
def test_every_format_gives_the_same_triangles(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"box.{kind}"
    if kind == "gltf":
        for name, data in trimesh.exchange.gltf.export_gltf(trimesh.Scene(BOX)).items():
            (tmp_path / name.replace("model.gltf", "box.gltf")).write_bytes(data)
    else:
        BOX.export(path)
    for mesh in (load_mesh(path), load_geometry(path)):
        assert np.array_equal(corners(mesh.vertices, mesh.faces), corners(BOX.vertices, BOX.faces))
        assert torch.allclose(mesh.normals.norm(dim=1), torch.ones(len(mesh.normals)))


def test_a_mesh_without_normals_is_split_at_its_edges_and_nowhere_else(tmp_path: Path) -> None:
    BOX.export(tmp_path / "box.stl")
    box = load_geometry(tmp_path / "box.stl")
    assert len(box.vertices) == 24
    flat = torch.linalg.cross(
        box.vertices[box.faces[:, 1]] - box.vertices[box.faces[:, 0]],
        box.vertices[box.faces[:, 2]] - box.vertices[box.faces[:, 0]],
    )
    flat = torch.nn.functional.normalize(flat, dim=1)
    assert torch.allclose(box.normals[box.faces], flat[:, None].expand(-1, 3, -1), atol=1e-6)
    ball = trimesh.creation.icosphere(subdivisions=3)
    ball.export(tmp_path / "ball.stl")
    ball_mesh = load_geometry(tmp_path / "ball.stl")
    assert len(ball_mesh.vertices) == len(ball.vertices)
    assert torch.allclose(ball_mesh.normals, ball_mesh.vertices, atol=0.01)


def test_a_fan_of_very_many_faces_is_smoothed_as_one() -> None:
    cone = trimesh.creation.cone(radius=1.0, height=1.0, sections=200)
    surface = Surface(
        vertices=torch.tensor(cone.vertices, dtype=torch.float32), faces=torch.tensor(cone.faces)
    )
    source, faces, normals = split_at_creases(surface, torch.arange(len(cone.vertices)))
    tip = int(cone.vertices[:, 2].argmax())
    assert int((source == tip).sum()) == 1
    assert torch.equal(source[faces], surface.faces)
    assert torch.allclose(normals[source == tip], torch.tensor([[0.0, 0.0, 1.0]]), atol=1e-5)


def test_same_places_agree_with_brute_force() -> None:
    points = np.random.default_rng(0).integers(0, 3, (60, 3)).astype(np.float64)
    first, group = same_places(points)
    assert np.array_equal(points[first][group], points)
    assert len(first) == len({tuple(point) for point in points.tolist()})
    assert np.array_equal(first, np.sort(first))
    assert all(tuple(points[i]) not in {tuple(p) for p in points[:i]} for i in first)


def test_parts_of_a_scene_are_placed_and_mirrored_ones_turned_right_side_out(tmp_path: Path) -> None:
    scene = trimesh.Scene()
    scene.add_geometry(BOX, transform=trimesh.transformations.translation_matrix([5, 0, 0]))
    scene.add_geometry(BOX, transform=np.diag([-1.0, 2.0, 1.0, 1.0]))
    scene.export(tmp_path / "two.glb")
    whole = load_geometry(tmp_path / "two.glb")
    solid = trimesh.Trimesh(whole.vertices.numpy(), whole.faces.numpy())
    assert len(whole.faces) == 24
    assert solid.volume == pytest.approx(6.0 + 12.0)
    assert float(whole.vertices[:, 0].max()) == pytest.approx(5.5)
    with pytest.raises(InputError, match="holds 2 meshes, expected exactly 1"):
        load_mesh(tmp_path / "two.glb")


def test_a_file_may_name_others_in_its_folder_also_percent_coded(tmp_path: Path) -> None:
    path = with_gltf(tmp_path / "a b", buffers=[{"uri": "parts/my%20file.bin", "byteLength": 36}])
    (path.parent / "parts").mkdir()
    (path.parent / "x.bin").rename(path.parent / "parts" / "my file.bin")
    assert torch.equal(load_geometry(path).vertices, torch.eye(3))


@pytest.mark.parametrize(
    "uri",
    [
        "../secret.bin",
        "%2e%2e/secret.bin",
        "..\\secret.bin",
        "parts/../../secret.bin",
        "/etc/passwd",
        "C:\\secret.bin",
        "file:///etc/passwd",
        "http://localhost:9/x.bin",
        "link.bin",
        "folder/secret.bin",
    ],
)
def test_no_reference_leads_out_of_the_folder(uri: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(np.eye(3, dtype="<f4").tobytes())
    path = with_gltf(tmp_path / "inside", buffers=[{"uri": uri, "byteLength": 36}])
    (path.parent / "link.bin").symlink_to(secret)
    (path.parent / "folder").symlink_to(tmp_path)
    with pytest.raises(
        InputError, match=r"x\.gltf: names '.*only files in its own folder|outside its own folder"
    ):
        load_geometry(path)


@pytest.mark.parametrize(
    ("obj", "mtl"),
    [
        ("mtllib ../../etc/passwd\n" + CUBE_OBJ, ""),
        ("mtllib /etc/passwd\n" + CUBE_OBJ, ""),
        ("mtllib x.mtl\nusemtl a\n" + CUBE_OBJ, "newmtl a\nmap_Kd /etc/passwd\n"),
        ("mtllib x.mtl\nusemtl a\n" + CUBE_OBJ, "newmtl a\nmap_Kd ../../../etc/passwd\n"),
    ],
)
@pytest.mark.parametrize("load", [load_mesh, load_geometry])
def test_materials_of_an_obj_stay_in_its_folder(obj: str, mtl: str, load: Any, tmp_path: Path) -> None:
    (tmp_path / "x.obj").write_text(obj)
    (tmp_path / "x.mtl").write_text(mtl)
    with pytest.raises(InputError, match=r"x\.obj: names '.*own folder"):
        load(tmp_path / "x.obj")


def test_an_obj_whose_material_is_missing_is_a_mesh_without_material(tmp_path: Path) -> None:
    (tmp_path / "x.obj").write_text("mtllib gone.mtl\nusemtl a\n" + CUBE_OBJ)
    assert len(load_mesh(tmp_path / "x.obj").faces) == 1


def test_a_ply_may_not_name_a_texture_elsewhere(tmp_path: Path) -> None:
    trimesh.creation.box().export(tmp_path / "x.ply")
    data = (tmp_path / "x.ply").read_bytes()
    (tmp_path / "x.ply").write_bytes(
        data.replace(b"\nelement", b"\ncomment TextureFile /etc/passwd\nelement", 1)
    )
    with pytest.raises(InputError, match="an absolute path"):
        load_mesh(tmp_path / "x.ply")


HUGE = 10**12
TREE = {"nodes": [{"mesh": 0, "children": [1]}, {"children": [0]}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accessors": [{"componentType": 5126, "count": HUGE, "type": "VEC3"}]}, "declares arrays of"),
        (
            {"bufferViews": [{"buffer": 0, "byteLength": 36}, {"buffer": 0, "byteLength": 1 << 40}]},
            "arrays",
        ),
        (
            {"accessors": [{"bufferView": 0, "componentType": 5126, "count": -3, "type": "VEC3"}]},
            "is no size",
        ),
        ({"nodes": [{"mesh": 0}] * 10_001}, "holds 10001 nodes; the limit is 10000"),
        (TREE, "nodes form a circle"),
        ({"nodes": [{"mesh": 0, "children": [1, 1]}, {}]}, "two parents"),
        ({"nodes": [{"mesh": 0, "children": [7]}]}, "does not exist"),
        ({"extensionsRequired": ["KHR_draco_mesh_compression"]}, "needs the glTF extension KHR_draco"),
        (
            {"accessors": [{"componentType": 5126, "count": 3, "type": "VEC3", "sparse": {"count": 1}}]},
            "sparse accessors",
        ),
        ({"meshes": [{"primitives": [{"attributes": {"POSITION": 9}}]}]}, "cannot be read as a mesh"),
        ({"accessors": "none"}, "cannot be read as a mesh"),
        ({"buffers": [{"uri": "gone.bin", "byteLength": 36}]}, "'gone.bin', which it names, is not in"),
        ({"images": [{"uri": "big.png"}], "materials": [{}]}, "60000 x 60000 pixels|more than"),
        ({"images": [{"uri": "wide.png"}], "materials": [{}]}, "9000 x 9000 pixels"),
    ],
)
def test_what_a_gltf_declares_is_held_against_the_limits(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = with_gltf(tmp_path, **changes)
    (tmp_path / "big.png").write_bytes(png_of(60_000, 60_000))
    (tmp_path / "wide.png").write_bytes(png_of(9000, 9000))
    with pytest.raises(InputError, match=message) as caught:
        load_geometry(path)
    assert str(path) in str(caught.value)


def test_a_mesh_counts_as_often_as_it_is_drawn(tmp_path: Path) -> None:
    path = with_gltf(tmp_path, nodes=[{"mesh": 0}] * 50, scenes=[{"nodes": list(range(50))}])
    with pytest.raises(InputError, match="declares 50 faces; the limit is 49"):
        load_geometry(path, Limits(faces=49))
    assert len(load_geometry(path, Limits(faces=50)).faces) == 50


def test_pictures_inside_a_glb_are_looked_at_before_they_are_unpacked(tmp_path: Path) -> None:
    writer = GlbWriter()
    writer.floats(np.eye(3), bounds=True)
    picture = png_of(20_000, 20_000)
    writer.views.append({"buffer": 0, "byteOffset": len(writer.body), "byteLength": len(picture)})
    writer.body += picture
    tree = {key: value for key, value in gltf().items() if key not in ("accessors", "bufferViews", "buffers")}
    tree |= {"images": [{"bufferView": 1, "mimeType": "image/png"}]}
    (tmp_path / "x.glb").write_bytes(writer.finish(tree))
    with pytest.raises(InputError, match=r"more than 67108864 pixels|20000 x 20000 pixels"):
        load_mesh(tmp_path / "x.glb")


PLY = "ply\nformat {} 1.0\nelement vertex {}\nproperty float x\nproperty float y\nproperty float z\n{}end_header\n"
FACES = "element face {}\nproperty list uchar int vertex_indices\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.glb", b"", "cannot be read"),
        ("short.glb", b"glTF" + struct.pack("<II", 2, 4000), "cannot be read"),
        ("huge.glb", b"glTF" + struct.pack("<IIII", 2, 28, 0xFFFFFFF0, 0x4E4F534A) + b"{}", "cannot be read"),
        ("deep.gltf", b"[" * 100_000, "cannot be read"),
        ("list.gltf", b"[]", "cannot be read"),
        ("empty.obj", b"", "holds 0 meshes"),
        ("points.obj", b"v 0 0 0\nv 1 0 0\n", "holds 0 meshes"),
        ("words.obj", b"f a b c\nv x y z\n", "cannot be read|holds 0 meshes|has no faces"),
        ("outside.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", "cannot be read|name vertices outside"),
        ("nan.obj", b"v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "has 1 of 3 vertices that are not finite"),
        ("inf.off", b"OFF\n3 1 0\ninf 0 0\n1 0 0\n0 1 0\n3 0 1 2\n", "has 1 of 3 vertices"),
        ("far.off", b"OFF\n3 1 0\n1e30 0 0\n1 0 0\n0 1 0\n3 0 1 2\n", "reaches 1e\\+30 from its origin"),
        ("huge.off", b"OFF\n999999999999 1 0\n0 0 0\n", "cannot be read"),
        ("none.off", b"OFF\n3 0 0\n0 0 0\n1 0 0\n0 1 0\n", "cannot be read|has no faces|holds 0 meshes"),
        ("huge.stl", b"x" * 80 + struct.pack("<I", 0xFFFFFFFF) + b"y" * 50, "cannot be read|holds 0 meshes"),
        ("none.stl", b"x" * 80 + struct.pack("<I", 0), "holds 0 meshes|has no faces"),
        ("text.stl", b"solid nothing", "cannot be read|holds 0 meshes|is empty|has no faces"),
        ("huge.ply", (PLY.format("binary_little_endian", 10**15, "")).encode() + b"1" * 36, "cannot be read"),
        ("cloud.ply", (PLY.format("ascii", 2, "")).encode() + b"0 0 0\n1 0 0\n", "holds 0 meshes|no faces"),
        (
            "outside.ply",
            (PLY.format("ascii", 3, FACES.format(1))).encode() + b"0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n",
            "name vertices outside 0..2|cannot be read",
        ),
        ("endless.ply", b"ply\nformat ascii 1.0\n", "cannot be read"),
        ("x.zip", b"PK", "unknown format; known formats: glb, gltf, obj, ply, stl, off"),
        ("x.pkl", b"\x80\x04.", "unknown format"),
        ("x", b"", "unknown format"),
    ],
)
@pytest.mark.parametrize("load", [load_mesh, load_geometry])
def test_what_is_no_mesh_is_one_message(
    name: str, content: bytes, message: str, load: Any, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(
        InputError, match=message.replace("holds 0 meshes", "holds (0 meshes|no mesh)")
    ) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["glb", "ply", "stl"])
def test_a_file_that_ends_too_early_is_refused(kind: str, cut: float, tmp_path: Path) -> None:
    BOX.export(tmp_path / f"box.{kind}")
    data = (tmp_path / f"box.{kind}").read_bytes()
    (tmp_path / f"box.{kind}").write_bytes(data[: int(cut * len(data))])
    with pytest.raises(InputError):
        load_mesh(tmp_path / f"box.{kind}")


def test_limits_are_stated_and_hold(tmp_path: Path) -> None:
    BOX.export(tmp_path / "box.stl")
    with pytest.raises(InputError, match="has 12 faces; the limit is 11"):
        load_mesh(tmp_path / "box.stl", Limits(faces=11))
    with pytest.raises(InputError, match="has 36 vertices; the limit is 35"):
        load_mesh(tmp_path / "box.stl", Limits(vertices=35))
    (tmp_path / "long.obj").write_bytes(b"# " + bytes(2 << 20) + b"\n" + CUBE_OBJ.encode())
    with pytest.raises(InputError, match="is larger than 1 MiB"):
        load_mesh(tmp_path / "long.obj", Limits(file_mib=1))
    (tmp_path / "x.mtl").write_bytes(bytes(2 << 20))
    (tmp_path / "small.obj").write_text("mtllib x.mtl\n" + CUBE_OBJ)
    with pytest.raises(InputError, match="is larger than 1 MiB, with the files"):
        load_mesh(tmp_path / "small.obj", Limits(file_mib=1))


def test_only_plain_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "folder.obj").mkdir()
    os.mkfifo(tmp_path / "pipe.obj")
    for name in ("folder.obj", "pipe.obj", "gone.obj"):
        with pytest.raises(InputError, match="no such file"):
            load_mesh(tmp_path / name)
