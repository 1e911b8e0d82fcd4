"""Files: every format reloads as it was written, and writing is whole or not at all."""

import errno
import json
import os
import stat
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

from sds3d.errors import ConfigError, ExportError, InputError, ShapeError
from sds3d.interfaces import Surface
from sds3d.mesh import files as f
from sds3d.mesh.clean import measure, vertex_normals
from sds3d.mesh.gltf import read_metadata
from sds3d.mesh.textured import TexturedMesh, sample_texture
from sds3d.mesh.unwrap import unwrap


@pytest.fixture(scope="module")
def mesh() -> TexturedMesh:
    shape = trimesh.creation.torus(0.7, 0.25, major_sections=24, minor_sections=12)
    surface = Surface(
        vertices=torch.tensor(shape.vertices, dtype=torch.float32),
        faces=torch.tensor(shape.faces, dtype=torch.int64),
    )
    atlas = unwrap(surface, texture_px=64, padding_px=2)
    noise = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return TexturedMesh(
        vertices=surface.vertices[atlas.source],
        faces=atlas.faces,
        normals=vertex_normals(surface)[atlas.source],
        uvs=atlas.uvs,
        texture=noise,
        metallic=0.25,
        roughness=0.5,
    )


def corners(mesh: TexturedMesh, *fields: str) -> np.ndarray:
    """One row per face, its corners' values in a canonical order: equal for equal meshes in whatever order."""
    table = np.concatenate([np.asarray(getattr(mesh, field), np.float64) for field in fields], axis=1)
    rows = np.round(table, 5)[mesh.faces.numpy()]
    first = np.lexsort(rows.transpose(2, 0, 1)[::-1], axis=-1)[:, :1]
    rows = np.take_along_axis(rows, ((first + np.arange(3)) % 3)[..., None], axis=1).reshape(len(rows), -1)
    return rows[np.lexsort(rows.T[::-1])]


@pytest.mark.parametrize("kind", [kind for kind in f.EXPORTERS if kind != "usdz"])
def test_shape_reloads(mesh, tmp_path, kind):
    back = f.load_mesh(f.export_mesh(mesh, tmp_path, "x", (kind,))[kind])
    np.testing.assert_allclose(corners(back, "vertices"), corners(mesh, "vertices"), atol=2e-5)
    if kind != "stl":
        both = ("vertices", "normals")
        np.testing.assert_allclose(corners(back, *both), corners(mesh, *both), atol=2e-5)


@pytest.mark.parametrize("kind", ["glb", "gltf", "obj"])
def test_texture_and_coordinates_reload(mesh, tmp_path, kind):
    back = f.load_mesh(f.export_mesh(mesh, tmp_path, "x", (kind,))[kind])
    assert torch.equal(back.texture, mesh.texture)
    np.testing.assert_allclose(corners(back, "vertices", "uvs"), corners(mesh, "vertices", "uvs"), atol=2e-5)


@pytest.mark.parametrize("kind", ["glb", "gltf"])
def test_gltf_keeps_order_factors_and_sides(mesh, tmp_path, kind):
    back = f.load_mesh(f.export_mesh(mesh, tmp_path, "x", (kind,))[kind])
    assert torch.equal(back.vertices, mesh.vertices)
    assert torch.equal(back.faces, mesh.faces)
    assert torch.allclose(back.uvs, mesh.uvs, atol=1e-6)
    assert (back.metallic, back.roughness, back.closed) == (0.25, 0.5, True)


def test_ply_holds_the_texture_as_vertex_colors(mesh, tmp_path):
    back = f.load_mesh(f.export_mesh(mesh, tmp_path, "x", ("ply",))["ply"])
    _, group = f.welded(mesh)
    first = np.unique(group, return_index=True)[1]
    expected = sample_texture(mesh.texture, mesh.uvs[torch.from_numpy(first)]) * 255
    assert torch.allclose(back.colors.float(), expected, atol=0.51)


@pytest.mark.parametrize("kind", ["ply", "stl", "obj"])
def test_formats_without_seams_are_closed(mesh, tmp_path, kind):
    assert not measure(Surface(vertices=mesh.vertices, faces=mesh.faces)).watertight  # because of the seams
    path = f.export_mesh(mesh, tmp_path, "x", (kind,))[kind]
    if kind == "obj":
        lines = path.read_text().splitlines()
        vertices = np.array([line.split()[1:] for line in lines if line.startswith("v ")], float)
        faces = (
            np.array([[c.split("/")[0] for c in s.split()[1:]] for s in lines if s.startswith("f ")], int) - 1
        )
    else:
        loaded = trimesh.load_mesh(path, process=kind == "stl")
        vertices, faces = loaded.vertices, loaded.faces
    stats = measure(
        Surface(vertices=torch.tensor(np.array(vertices)).float(), faces=torch.tensor(np.array(faces)))
    )
    assert stats.watertight
    assert stats.euler == 0
    assert stats.volume > 0


def test_unknown_format_lists_the_known(mesh, tmp_path):
    with pytest.raises(ConfigError, match="'fbx'; known formats: glb, gltf, obj, ply, stl"):
        f.export_mesh(mesh, tmp_path, "x", ("glb", "fbx"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stem", ["", "a/b", "..", "a b", "x\n", "C:x"])
def test_bad_stem_is_refused(mesh, tmp_path, stem):
    with pytest.raises(ConfigError, match="file name"):
        f.export_mesh(mesh, tmp_path, stem, ("glb",))


def test_metadata_round_trips_and_must_be_json(mesh, tmp_path):
    notes = {"prompt": "ein „roter“ Becher\n☕", "seed": 7, "nested": {"a": [1.5, None, True]}}
    for kind in ("glb", "gltf"):
        path = f.export_mesh(mesh, tmp_path, "x", (kind,), notes)[kind]
        assert read_metadata(path.read_bytes()) == notes
    for value in (float("nan"), Path("x"), {1, 2}):
        with pytest.raises(ConfigError, match="plain JSON"):
            f.export_mesh(mesh, tmp_path / "none", "x", ("glb",), {"bad": value})
    assert not (tmp_path / "none").exists()


def test_a_prompt_of_several_lines_cannot_break_an_obj(mesh, tmp_path):
    path = f.export_mesh(mesh, tmp_path, "x", ("obj",), {"prompt": "mug\nv 0 0 9", "empty": ""})["obj"]
    assert float(f.load_mesh(path).vertices.abs().max()) < 2


def test_glb_layout(mesh, tmp_path):
    data = f.export_mesh(mesh, tmp_path, "x", ("glb",))["glb"].read_bytes()
    assert struct.unpack("<4sII", data[:12]) == (b"glTF", 2, len(data))
    length = struct.unpack("<I", data[12:16])[0]
    tree = json.loads(data[20 : 20 + length])
    assert tree["asset"]["generator"].startswith("sds3d ")
    assert tree["samplers"]
    assert length % 4 == 0


def test_damaged_or_foreign_files_are_input_errors(mesh, tmp_path):
    good = f.export_mesh(mesh, tmp_path, "x", ("glb",))["glb"].read_bytes()
    for name, data in {
        "cut.glb": good[:200],
        "text.glb": b"hello",
        "empty.glb": b"",
        "x.gltf": b"[]",
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name):
            f.load_mesh(tmp_path / name)
        with pytest.raises(InputError):
            read_metadata(data)
    with pytest.raises(InputError, match="unknown format"):
        f.load_mesh(tmp_path / "x.png")
    with pytest.raises(InputError, match=r"gone\.glb"):
        f.load_mesh(tmp_path / "gone.glb")


def test_texture_without_coordinates_is_refused(mesh):
    with pytest.raises(ShapeError, match="uvs"):
        TexturedMesh(vertices=mesh.vertices, faces=mesh.faces, normals=mesh.normals, texture=mesh.texture)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    f.write_files(tmp_path, {"a": b"old"})

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f.os, step, full)
    with pytest.raises(ExportError, match="No space left on device"):
        f.write_files(tmp_path, {"a": b"new", "b": b"new"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old"}


@pytest.mark.skipif(sys.platform == "win32", reason="needs file size limits")
def test_a_real_write_failure_leaves_nothing(tmp_path):
    """The operating system itself refuses the second kilobyte."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        with pytest.raises(ExportError, match="File too large"):
            f.write_files(tmp_path, {"small": b"x", "big": b"x" * 5000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
def test_files_get_ordinary_permissions(tmp_path):
    f.write_files(tmp_path, {"a": b"x"})
    (tmp_path / "b").write_bytes(b"x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)
