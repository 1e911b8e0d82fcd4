"""What textures carry beyond colour: fine normals on a coarse mesh, ambient occlusion, USDZ, placement."""

import io
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh
from torch.nn.functional import normalize

from sds3d.asset import AssetConfig, make_asset
from sds3d.config.load import override_layers
from sds3d.errors import ConfigError, ShapeError
from sds3d.interfaces import Material, Scene, Surface
from sds3d.job import load_job
from sds3d.mesh.bake import bake, find_texels
from sds3d.mesh.clean import vertex_normals
from sds3d.mesh.detail import fibonacci_sphere, fine_normals, sky_visibility
from sds3d.mesh.files import export_mesh, load_mesh
from sds3d.mesh.tangents import from_tangent_space, vertex_tangents
from sds3d.mesh.textured import TexturedMesh
from sds3d.mesh.unwrap import Atlas, unwrap
from tests.unit.test_mesh_asset import Mug

SIZE = 128


class Gray(Scene):
    """A material and nothing else."""

    def material(self, points):
        ones = torch.ones(len(points), 1)
        return Material(base_color=0.5 * ones.expand(-1, 3), metallic=0 * ones, roughness=ones)

    def render(self, cameras, shading, rng, *, progress=1.0):
        raise AssertionError

    def groups(self):
        return []

    def surface(self, cells_per_side, *, iso_factor=1.0):
        raise AssertionError


def surface_of(shape: trimesh.Trimesh) -> Surface:
    return Surface(
        vertices=torch.tensor(shape.vertices, dtype=torch.float32),
        faces=torch.tensor(shape.faces, dtype=torch.int64),
    )


def ball(subdivisions: int) -> Surface:
    return surface_of(trimesh.creation.icosphere(subdivisions=subdivisions))


def coarse_ball() -> tuple[Surface, torch.Tensor, Atlas, torch.Tensor]:
    surface = ball(2)
    normals, atlas = vertex_normals(surface), unwrap(ball(2), texture_px=SIZE, padding_px=2)
    mesh = TexturedMesh(
        vertices=surface.vertices[atlas.source],
        faces=atlas.faces,
        normals=normals[atlas.source],
        uvs=atlas.uvs,
    )
    return surface, normals, atlas, vertex_tangents(mesh)


def waves(points: torch.Tensor) -> torch.Tensor:
    """Unit normals of a rippled ball: what its shading shows, though the coarse ball is smooth."""
    return normalize(points + 0.3 * torch.sin(8.0 * points), dim=1)


def test_a_normal_texture_shows_the_fine_surface() -> None:
    """Read as a shader does, the texture has the fine normals within the step of 8 bits; vertex normals do not."""
    surface, normals, atlas, tangents = coarse_ball()
    fine = ball(5)
    # A real rippled surface, so that its vertex normals are what they are.
    rippled = Surface(
        vertices=fine.vertices * (1.0 + 0.05 * torch.sin(8.0 * fine.vertices[:, :1])), faces=fine.faces
    )
    made = bake(Gray(), surface, normals, atlas, texture_px=SIZE, fine=rippled, tangents=tangents)
    texels = find_texels(surface, normals, atlas, SIZE)
    assert made.normal is not None
    inside = made.normal.numpy()[texels.covered] / 127.5 - 1.0
    normal = texels.interpolate(normals[atlas.source], atlas.faces)
    tangent = texels.interpolate(tangents, atlas.faces)
    shown = from_tangent_space(torch.from_numpy(inside.astype(np.float32)), normal, tangent)
    tree = trimesh.Trimesh(rippled.vertices.numpy(), rippled.faces.numpy(), process=False)
    nearest = trimesh.proximity.ProximityQuery(tree).vertex(texels.points.numpy())[1]
    wanted = vertex_normals(rippled)[torch.from_numpy(nearest)]
    agreement = (shown * wanted).sum(1)
    assert agreement.mean() > 0.999
    assert (texels.normals * wanted).sum(1).mean() < 0.98


def test_a_mesh_as_fine_as_its_source_has_a_flat_normal_texture() -> None:
    surface, normals, atlas, tangents = coarse_ball()
    made = bake(Gray(), surface, normals, atlas, texture_px=SIZE, fine=ball(5), tangents=tangents)
    assert made.normal is not None
    blue = made.normal[..., 2].float()
    assert blue.min() > 245  # straight up but for the facets of the coarse ball


def test_the_far_side_of_a_thin_wall_gives_no_normals() -> None:
    """Between two sheets, the one whose normals look the same way counts, though the other is nearer."""
    near, far = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]), torch.tensor([[0.0, 0, -0.1]] * 3)
    faces = torch.tensor([[0, 2, 1]])  # seen from below: normals -z
    below = Surface(vertices=near, faces=faces)
    up = torch.tensor([[0.0, 0.0, 1.0]])
    torch.testing.assert_close(fine_normals(below, torch.tensor([[0.2, 0.2, 0.01]]), up), up)
    both = Surface(
        vertices=torch.cat([near, near + far + torch.tensor([0.0, 0.0, 0.0])]),
        faces=torch.cat([faces, torch.tensor([[3, 4, 5]])]),
    )
    torch.testing.assert_close(fine_normals(both, torch.tensor([[0.2, 0.2, 0.01]]), up), up)


def test_directions_are_spread_evenly() -> None:
    towards = fibonacci_sphere(96)
    torch.testing.assert_close(towards.norm(dim=1), torch.ones(96))
    assert towards.mean(0).abs().max() < 0.01
    spread = towards.T @ towards / 96
    torch.testing.assert_close(spread, torch.eye(3) / 3.0, rtol=0, atol=0.01)


def test_a_ball_sees_all_its_sky_and_a_floor_under_it_half() -> None:
    surface = ball(4)
    visible = sky_visibility(surface, surface.vertices, vertex_normals(surface))
    assert visible.min() > 0.97
    # A point in the middle of one wall of a right-angled corner of two large squares sees half of its hemisphere
    # less than half blocked; deep in a corner of three, a quarter of the cosine-weighted sky stays.
    room = trimesh.creation.box((2.0, 2.0, 2.0))
    room.update_faces([not bool((np.abs(n - [0, 1, 0]) < 1e-6).all()) for n in room.face_normals])
    inside = Surface(
        vertices=torch.tensor(room.vertices, dtype=torch.float32), faces=torch.tensor(room.faces).flip(1)
    )
    floor = torch.tensor([[0.0, -0.999, 0.0]])
    seen = sky_visibility(inside, floor, torch.tensor([[0.0, 1.0, 0.0]]), directions=4000)
    # Form factor of the open square lid (side 2) from the floor's centre at distance 2: 4 corner factors.
    a = 0.5
    corner = 2 * (a / (1 + a * a) ** 0.5 * np.arctan(a / (1 + a * a) ** 0.5)) / (2 * np.pi)
    assert abs(float(seen) - 4 * corner) < 0.02


def test_occlusion_darkens_the_inside_of_a_mug(tmp_path) -> None:
    config = AssetConfig(
        cells_per_side=40,
        max_faces=2000,
        texture_px=128,
        compare_views=0,
        occlusion=True,
        formats=("glb", "obj"),
    )
    files = make_asset(Mug(), tmp_path, config).files
    mesh = load_mesh(files["glb"])
    assert mesh.occluded
    assert mesh.metallic_roughness is not None
    assert mesh.metallic_roughness[..., 1].float().mean() == pytest.approx(0.7 * 255, abs=1)
    sky = mesh.metallic_roughness[..., 0].float() / 255
    rows = (mesh.uvs * 128).long().clamp(0, 127)
    of_vertex = sky[rows[:, 1], rows[:, 0]]
    bottom = (
        (mesh.vertices[:, [0, 2]].norm(dim=1) < 0.25)
        & (mesh.vertices[:, 1] > -0.5)
        & (mesh.vertices[:, 1] < 0)
    )
    top_rim = mesh.vertices[:, 1] > 0.58
    assert of_vertex[bottom].mean() < 0.4
    assert of_vertex[top_rim].mean() > 0.7
    assert {path.name for path in tmp_path.iterdir()} >= {
        "asset_roughness.png",
        "asset_metallic.png",
        "asset_normal.png",
    }


def test_normals_and_tangents_come_back_from_the_file(tmp_path) -> None:
    config = AssetConfig(cells_per_side=40, max_faces=1000, texture_px=128, compare_views=0)
    mesh = load_mesh(make_asset(Mug(), tmp_path, config).files["glb"])
    assert mesh.normal_texture is not None
    assert mesh.normal_texture.shape == (128, 128, 3)
    plain = load_mesh(make_asset(Mug(), tmp_path, replace(config, normal_map=False)).files["glb"])
    assert plain.normal_texture is None
    with pytest.raises(ShapeError, match="needs tangents"):
        replace(plain, normal_texture=mesh.normal_texture)


@pytest.mark.parametrize("pivot", ["scene", "center", "base"])
def test_placement_moves_the_file_and_not_its_likeness(tmp_path, pivot: str) -> None:
    config = AssetConfig(
        cells_per_side=40,
        max_faces=1000,
        texture_px=128,
        compare_views=4,
        compare_px=48,
        pivot=pivot,
        size_m=0.1,
    )
    report = make_asset(Mug(), tmp_path, config)
    low, high = (part(load_mesh(report.files["glb"]).vertices, 0).values for part in (torch.min, torch.max))
    assert float((high - low).max()) == pytest.approx(0.1, rel=1e-5)
    centre = (low + high) / 2
    if pivot == "center":
        torch.testing.assert_close(centre, torch.zeros(3), rtol=0, atol=1e-6)
    if pivot == "base":
        torch.testing.assert_close(
            torch.stack([centre[0], low[1], centre[2]]), torch.zeros(3), rtol=0, atol=1e-6
        )
    assert report.fidelity.psnr_db > 24


def test_placement_options_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"export\.pivot.*top.*scene, center, base"):
        load_job("default", override_layers(["export.pivot=top"]))
    with pytest.raises(ConfigError, match=r"size_m is 0\.0; expected"):
        AssetConfig(size_m=0.0)


def test_a_usdz_is_an_aligned_uncompressed_zip_with_the_layer_first(tmp_path) -> None:
    config = AssetConfig(
        cells_per_side=40, max_faces=500, texture_px=128, compare_views=0, occlusion=True, formats=("usdz",)
    )
    path = make_asset(Mug(), tmp_path, config, {"prompt": 'a "red" mug\\'}).files["usdz"]
    data = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        assert names[0] == "asset.usda"
        assert sorted(names[1:]) == [
            f"textures/{n}.png" for n in ("base_color", "metallic_roughness", "normal")
        ]
        for entry in archive.infolist():
            assert entry.compress_type == zipfile.ZIP_STORED
            name_size, extra_size = (
                int.from_bytes(data[entry.header_offset + at : entry.header_offset + at + 2], "little")
                for at in (26, 28)
            )
            assert (entry.header_offset + 30 + name_size + extra_size) % 64 == 0
        layer = archive.read("asset.usda").decode()
    assert layer.startswith("#usda 1.0\n")
    assert 'upAxis = "Y"' in layer
    assert layer.count("@textures/") == 3


def test_a_usdz_is_what_openusd_reads(tmp_path) -> None:
    pxr = pytest.importorskip("pxr", reason="usd-core is not installed")
    from pxr import Usd, UsdGeom, UsdShade

    config = AssetConfig(
        cells_per_side=40, max_faces=500, texture_px=128, compare_views=0, formats=("usdz", "glb")
    )
    files = make_asset(Mug(), tmp_path, config, {"prompt": 'a "red" mug\\'}).files
    stage = Usd.Stage.Open(str(files["usdz"]))
    mesh = UsdGeom.Mesh(stage.GetPrimAtPath("/asset/mesh"))
    expected = load_mesh(files["glb"])
    np.testing.assert_allclose(np.array(mesh.GetPointsAttr().Get()), expected.vertices.numpy(), rtol=1e-6)
    assert np.array(mesh.GetFaceVertexIndicesAttr().Get()).tolist() == expected.faces.flatten().tolist()
    material = UsdShade.MaterialBindingAPI(mesh.GetPrim()).ComputeBoundMaterial()[0]
    shader = material.ComputeSurfaceSource()[0]
    assert shader.GetIdAttr().Get() == "UsdPreviewSurface"
    assert shader.GetInput("diffuseColor").HasConnectedSource()
    assert pxr is not None


def test_usdz_is_not_read_back(tmp_path) -> None:
    surface = ball(1)
    mesh = TexturedMesh(vertices=surface.vertices, faces=surface.faces, normals=vertex_normals(surface))
    path = export_mesh(mesh, tmp_path, "ball", ("usdz",))["usdz"]
    with pytest.raises(Exception, match="unknown format"):
        load_mesh(path)
