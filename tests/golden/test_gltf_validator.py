"""Exported glTF under the Khronos validator: no errors, no warnings, no hints.

Needs node and the npm package gltf-validator, either in SDS3D_GLTF_VALIDATOR (a node_modules folder) or installed by
npm install --no-save --prefix .cache/gltf-validator gltf-validator@2.0.0-dev.3.10
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import trimesh

from sds3d.interfaces import Surface
from sds3d.mesh.clean import vertex_normals
from sds3d.mesh.files import export_mesh
from sds3d.mesh.splat_cloud import GaussianCloud
from sds3d.mesh.splat_files import encode_splat_glb
from sds3d.mesh.textured import TexturedMesh
from sds3d.mesh.unwrap import unwrap
from sds3d.rng import Stream

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "js" / "validate_gltf.cjs"
MODULES = Path(os.environ.get("SDS3D_GLTF_VALIDATOR", ROOT / ".cache" / "gltf-validator" / "node_modules"))

if shutil.which("node") is None:
    pytest.skip("node is not installed", allow_module_level=True)
if not (MODULES / "gltf-validator").is_dir():
    pytest.skip(f"npm package gltf-validator is not in {MODULES}", allow_module_level=True)


def issues(*files: Path) -> dict[str, list[dict]]:
    done = subprocess.run(
        ["node", str(SCRIPT), str(MODULES), *map(str, files)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def ball(*, shiny: bool = False, closed: bool = True, faces: int = 3) -> TexturedMesh:
    shape = trimesh.creation.icosphere(subdivisions=faces)
    surface = Surface(
        vertices=torch.tensor(shape.vertices, dtype=torch.float32), faces=torch.tensor(shape.faces)
    )
    atlas = unwrap(surface, texture_px=128, padding_px=2)
    texture = (torch.arange(128 * 128 * 3) % 256).to(torch.uint8).reshape(128, 128, 3)
    return TexturedMesh(
        vertices=surface.vertices[atlas.source],
        faces=atlas.faces,
        normals=vertex_normals(surface)[atlas.source],
        uvs=atlas.uvs,
        texture=texture,
        metallic_roughness=texture if shiny else None,
        roughness=0.6,
        closed=closed,
    )


@pytest.mark.parametrize("kind", ["glb", "gltf"])
@pytest.mark.parametrize("options", [{}, {"shiny": True, "closed": False}], ids=["plain", "shiny"])
def test_validator_has_nothing_to_say(tmp_path, kind, options):
    notes = {"prompt": "a “red” mug\n", "seed": 1, "nested": {"list": [1, None]}}
    path = export_mesh(ball(**options), tmp_path, "ball", (kind,), notes)[kind]
    assert issues(path) == {str(path): []}


def test_large_mesh_with_wide_indices_is_valid(tmp_path):
    mesh = ball(faces=4)
    copies = 65535 // len(mesh.vertices) + 1
    faces = torch.cat([mesh.faces + i * len(mesh.vertices) for i in range(copies)])
    big = TexturedMesh(
        vertices=mesh.vertices.repeat(copies, 1),
        faces=faces,
        normals=mesh.normals.repeat(copies, 1),
        uvs=mesh.uvs.repeat(copies, 1),
        texture=mesh.texture,
    )
    assert len(big.vertices) >= 65535
    path = export_mesh(big, tmp_path, "big", ("glb",))["glb"]
    assert issues(path) == {str(path): []}


SPLAT_SEMANTICS = ("ROTATION", "SCALE", "OPACITY", "SH_DEGREE_0_COEF_0")


def test_gaussians_are_valid_but_for_what_the_validator_does_not_know(tmp_path):
    """It has no KHR_gaussian_splatting: exactly its four attributes and its name are unknown to it."""
    stream = Stream(0, "cloud")
    cloud = GaussianCloud(
        means=stream.fork("m").normal(20, 3),
        quats_wxyz=stream.fork("q").normal(20, 4),
        scales=0.01 + stream.fork("s").uniform(20, 3),
        opacity=stream.fork("o").uniform(20),
        color=stream.fork("c").uniform(20, 3),
    )
    path = tmp_path / "splats.glb"
    path.write_bytes(encode_splat_glb(cloud, {"prompt": "a red mug"}))
    found = issues(path)[str(path)]
    invalid = [one for one in found if one["code"] == "MESH_PRIMITIVE_INVALID_ATTRIBUTE"]
    place = "/meshes/0/primitives/0/attributes/KHR_gaussian_splatting:"
    assert sorted(one["pointer"] for one in invalid) == sorted(place + name for name in SPLAT_SEMANTICS)
    assert [one["code"] for one in found if one not in invalid] == ["UNSUPPORTED_EXTENSION"]


def test_the_validator_is_really_asked(tmp_path):
    """Guards this file: normals that are not unit length must be reported as errors."""
    mesh = ball()
    broken = TexturedMesh(
        vertices=mesh.vertices, faces=mesh.faces, normals=mesh.normals * 2, uvs=mesh.uvs, texture=mesh.texture
    )
    path = export_mesh(broken, tmp_path, "bad", ("glb",))["glb"]
    assert {found["code"] for found in issues(path)[str(path)]} == {"ACCESSOR_VECTOR3_NON_UNIT"}
