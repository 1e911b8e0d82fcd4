"""Degenerate meshes through the export chain: a whole file that reads back equal, or one error and no file."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sds3d.asset import AssetConfig, make_asset
from sds3d.errors import InputError, Sds3dError
from sds3d.given import scene_from
from sds3d.interfaces import Surface
from sds3d.mesh.bake import bake
from sds3d.mesh.clean import clean, decimate, measure, vertex_normals
from sds3d.mesh.files import export_mesh, load_mesh
from sds3d.mesh.read import load_geometry, with_creases
from sds3d.mesh.textured import TexturedMesh
from sds3d.mesh.unwrap import unwrap
from sds3d.ops.hashgrid import HashGridConfig
from sds3d.rng import Stream
from sds3d.scenes import MeshScene
from sds3d.scenes.texture import TextureConfig

TINY = MeshScene.Config(texture=TextureConfig(encoding=HashGridConfig(levels=2, log2_rows=6), hidden=4))
SMALL = AssetConfig(texture_px=128, compare_views=2, compare_px=32, max_faces=100, normal_map=False)
OFTEN = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
SELDOM = settings(OFTEN, max_examples=12)

SOLIDS = {
    "ball": trimesh.creation.icosphere(subdivisions=1),
    "box": trimesh.creation.box(),
    "two": trimesh.util.concatenate(
        [
            trimesh.creation.box(),
            trimesh.creation.box(transform=trimesh.transformations.translation_matrix([3, 0, 0])),
        ]
    ),
    "ring": trimesh.creation.torus(0.6, 0.2, major_sections=8, minor_sections=6),
}
FIN = (
    np.array([[0, 0, 0], [0, 1, 0], [1, 0, 0], [-1, 0, 0], [0, 0, 1]], float),
    np.array([[0, 1, 2], [0, 1, 3], [0, 1, 4]]),  # three faces at one edge
)
SCALES = [1e-30, 1e-12, 1e-4, 1.0, 1e4, 1e12, 1e17, 1e25]


@dataclass(frozen=True)
class Rough:
    """A mesh as it may come: arrays, not checked."""

    vertices: np.ndarray
    faces: np.ndarray

    def surface(self) -> Surface:
        return Surface(
            vertices=torch.tensor(self.vertices, dtype=torch.float32).reshape(-1, 3),
            faces=torch.tensor(self.faces, dtype=torch.int64).reshape(-1, 3),
        )

    def is_inside(self) -> bool:
        """Whether all faces name vertices that are there."""
        return bool(((self.faces >= 0) & (self.faces < len(self.vertices))).all())


@st.composite
def bases(draw: st.DrawFn) -> Rough:
    """Nothing, one triangle, a fin, a solid, or a soup of triangles on a few points of a grid."""
    kind = draw(st.sampled_from(["empty", "points", "triangle", "fin", "solid", "soup"]))
    if kind in ("empty", "points"):
        return Rough(np.zeros((0 if kind == "empty" else 4, 3)), np.zeros((0, 3), int))
    if kind == "triangle":
        return Rough(np.eye(3), np.array([[0, 1, 2]]))
    if kind == "fin":
        return Rough(*FIN)
    if kind == "solid":
        solid = SOLIDS[draw(st.sampled_from(sorted(SOLIDS)))]
        return Rough(np.array(solid.vertices), np.array(solid.faces))
    count = draw(st.integers(1, 10))
    coordinate = st.integers(-2, 2).map(float)
    points = draw(st.lists(st.tuples(coordinate, coordinate, coordinate), min_size=count, max_size=count))
    corner = st.integers(0, count - 1)
    faces = draw(st.lists(st.tuples(corner, corner, corner), min_size=1, max_size=14))
    return Rough(np.array(points), np.array(faces))


@st.composite
def meshes(draw: st.DrawFn) -> Rough:
    """A base with faces repeated, turned over, collapsed or left out, scaled, shifted, and with wrong numbers in it."""
    base = draw(bases())
    vertices, faces = base.vertices.copy(), base.faces.copy()
    if len(faces):
        picks = draw(st.lists(st.integers(0, len(faces) - 1), max_size=4))
        done = draw(st.sampled_from(["nothing", "repeat", "turn", "collapse", "leave out"]))
        if done == "repeat":
            faces = np.concatenate([faces, faces[picks]])
        elif done == "turn":
            faces[picks] = faces[picks][:, ::-1]
        elif done == "collapse":
            faces[picks, 1] = faces[picks, 0]
        elif done == "leave out":
            faces = np.delete(faces, picks, axis=0)
    with np.errstate(over="ignore"):
        vertices = (vertices * draw(st.sampled_from(SCALES))).astype(np.float32)
        vertices = vertices + np.float32(draw(st.sampled_from([0.0, 0.0, 1.0, 1e6])))
    wrong = draw(st.sampled_from([None, None, None, np.nan, np.inf, "outside"]))
    if wrong == "outside" and len(faces):
        faces[0, 0] = draw(st.sampled_from([-1, len(vertices), 10**6]))
    elif wrong is not None and wrong != "outside" and len(vertices):
        vertices[draw(st.integers(0, len(vertices) - 1)), 1] = wrong
    return Rough(vertices, faces)


@contextmanager
def whole_or_nothing() -> Iterator[Path]:
    """A folder; should one of our errors be raised, the folder must be as it was: with one file, and no other."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "asset.glb").write_bytes(b"as it was")
        failure: Sds3dError | None = None
        try:
            yield folder
        except Sds3dError as error:
            failure = error
        if failure is None:
            assert not list(folder.glob(".*")), "temporary files are left"
        else:
            assert "\n" not in str(failure)
            assert [path.name for path in folder.iterdir()] == ["asset.glb"]
            assert (folder / "asset.glb").read_bytes() == b"as it was"


def tiny_scene(surface: Surface) -> MeshScene:
    return MeshScene(TINY, surface, Stream(0, "test"))


@OFTEN
@given(meshes())
def test_step_by_step_the_file_holds_what_was_made(rough: Rough) -> None:
    with whole_or_nothing() as folder:
        surface = decimate(clean(rough.surface(), smooth_rounds=1), 60)
        stats, normals = measure(surface), vertex_normals(surface)
        assert stats.faces <= 61
        atlas = unwrap(surface, texture_px=128, padding_px=2)
        baked = bake(tiny_scene(surface), surface, normals, atlas, texture_px=128)
        mesh = TexturedMesh(
            vertices=surface.vertices[atlas.source],
            faces=atlas.faces,
            normals=normals[atlas.source],
            uvs=atlas.uvs,
            texture=baked.base_color,
            closed=stats.watertight,
        )
        files = export_mesh(mesh, folder, "asset", ("glb", "gltf", "obj", "ply", "stl", "usdz"))
        for kind in ("glb", "gltf"):
            back = load_mesh(files[kind])
            assert torch.equal(back.vertices, mesh.vertices)
            assert torch.equal(back.faces, mesh.faces)
            assert torch.equal(back.texture, mesh.texture)
            assert torch.allclose(back.uvs, mesh.uvs, atol=1e-6)
        for kind in ("obj", "ply", "stl"):
            back = load_mesh(files[kind])
            assert torch.equal(back.vertices[back.faces], mesh.vertices[mesh.faces])


@SELDOM
@given(meshes())
def test_an_asset_is_whole_or_not_there(rough: Rough) -> None:
    assume(rough.is_inside())  # a scene is made of faces that are there
    with whole_or_nothing() as folder:
        report = make_asset(tiny_scene(rough.surface()), folder, SMALL)
        back = load_mesh(report.files["glb"])
        assert len(back.faces) == report.mesh.faces > 0
        assert bool(torch.isfinite(back.vertices).all())


@SELDOM
@given(meshes())
def test_a_given_mesh_comes_back_as_it_was_or_not_at_all(rough: Rough) -> None:
    surface = rough.surface()
    with whole_or_nothing() as folder:
        plain = TexturedMesh(
            vertices=surface.vertices, faces=surface.faces, normals=torch.zeros_like(surface.vertices)
        )
        path = folder.parent / f"{folder.name}.obj"
        lines = [f"v {x:.9g} {y:.9g} {z:.9g}" for x, y, z in plain.vertices.tolist()]
        lines += [f"f {a + 1} {b + 1} {c + 1}" for a, b, c in plain.faces.tolist()]
        path.write_text("\n".join(lines))
        try:
            mesh = load_geometry(path)
        finally:
            path.unlink()
        report = make_asset(scene_from(mesh, TINY, Stream(0, "test")), folder, SMALL)
        back = load_mesh(report.files["glb"])
        assert torch.equal(back.vertices[back.faces], mesh.vertices[mesh.faces])
        if bool((surface.faces >= 0).all()):  # OBJ counts negative numbers from the end
            assert torch.equal(back.vertices[back.faces], surface.vertices[surface.faces])


@OFTEN
@given(meshes())
def test_normals_are_made_for_any_mesh_and_no_face_moves(rough: Rough) -> None:
    surface = rough.surface()
    assume(len(surface.faces) > 0 and rough.is_inside() and bool(torch.isfinite(surface.vertices).all()))
    plain = TexturedMesh(
        vertices=surface.vertices, faces=surface.faces, normals=torch.zeros_like(surface.vertices)
    )
    made = with_creases(plain)
    assert torch.equal(made.vertices[made.faces], surface.vertices[surface.faces])
    assert torch.allclose(made.normals.norm(dim=1), torch.ones(len(made.normals)), atol=1e-4)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Whole files of every format that holds everything in one."""
    folder = tmp_path_factory.mktemp("files")
    contents = {}
    for kind in ("glb", "obj", "ply", "stl", "off"):
        trimesh.creation.icosphere(subdivisions=1).export(folder / f"ball.{kind}")
        contents[kind] = (folder / f"ball.{kind}").read_bytes()
    return contents


@settings(OFTEN, max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(["glb", "obj", "ply", "stl", "off"]),
    cut=st.floats(0.0, 1.0),
    edits=st.lists(st.tuples(st.floats(0.0, 0.999), st.binary(min_size=1, max_size=8)), max_size=5),
)
def test_a_damaged_file_is_read_or_refused(
    kind: str, cut: float, edits: list[tuple[float, bytes]], files: dict[str, bytes], tmp_path: Path
) -> None:
    data = bytearray(files[kind])
    for place, change in edits:
        # Half of the edits go into the first bytes, where headers are.
        at = int(place * len(data)) if place < 0.5 else int((place - 0.5) * 300)
        data[at : at + len(change)] = change
    path = tmp_path / f"x.{kind}"
    path.write_bytes(bytes(data[: int(cut * len(data))]) if cut < 0.7 else bytes(data))
    with suppress(InputError):
        mesh = load_geometry(path)
        assert bool(torch.isfinite(mesh.vertices).all())
        assert 0 <= int(mesh.faces.min()) <= int(mesh.faces.max()) < len(mesh.vertices)
