"""From an optimised scene to files: surface -> clean -> unwrap -> bake -> write -> reload -> compare.

report = make_asset(scene, Path("out"), AssetConfig(formats=("glb", "stl")), {"prompt": "a red mug", "seed": 0})
report.files["glb"], report.fidelity.psnr_db
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d import __version__
from sds3d.cameras.orbit import turntable_cameras
from sds3d.errors import ConfigError
from sds3d.interfaces import Scene, Surface
from sds3d.mathx.pose import Pose
from sds3d.mesh.bake import bake
from sds3d.mesh.clean import MeshStats, clean, decimate, measure, vertex_normals
from sds3d.mesh.fidelity import Fidelity, compare
from sds3d.mesh.file_facts import FileFacts, facts_of
from sds3d.mesh.files import check_formats, check_stem, encode_mesh, load_mesh, write_formats
from sds3d.mesh.fit_iso import fitted_surface
from sds3d.mesh.splat_files import check_splat_formats
from sds3d.mesh.tangents import vertex_tangents
from sds3d.mesh.textured import TexturedMesh
from sds3d.mesh.unwrap import Atlas, own_atlas, unwrap
from sds3d.rng import Stream
from sds3d.scenes import MeshScene
from sds3d.scenes.file_mesh import FileMesh

Pivot = Literal["scene", "center", "base"]

# The first of these among the written formats is the file that fidelity is measured on.
TEXTURED_FORMATS = ("glb", "gltf", "obj", "ply")
ISO_PX = 96  # of the views that the iso value is fitted to


@dataclass(frozen=True, kw_only=True)
class AssetConfig:
    """How a scene becomes an asset. Every field is checked when the record is made."""

    formats: tuple[str, ...] = ("glb",)  # any of glb, gltf, obj, ply, stl
    splat_formats: tuple[str, ...] = ("ply",)  # any of ply, splat, spz, glb; for Gaussian scenes
    name: str = "asset"  # file name without extension
    cells_per_side: int = 96  # resolution of the iso-surface
    max_faces: int = 8000
    smooth_rounds: int = 5  # Taubin rounds against staircases; 0 = none
    min_piece_frac: float = 0.02  # pieces below this share of the largest one's area are dropped
    texture_px: int = 512  # power of two
    normal_map: bool = True  # a tangent-space normal texture with what decimation took away
    occlusion: bool = False  # ambient occlusion in the red channel beside metallic and roughness
    size_m: float | None = None  # longest side of the file's object; None = as the scene has it
    pivot: Pivot = "scene"  # where the file's origin lies: as in the scene, at the centre, or below the base
    padding_px: int = 4  # texels between charts, about
    bake_depths_m: tuple[float, ...] = (
        0.0,
    )  # below the surface, along the normal; colours there are averaged
    compare_views: int = 16  # azimuths for the fidelity report; 0 = no pictures are compared
    compare_px: int = 256

    def __post_init__(self) -> None:
        """Raise ConfigError for a value that cannot work."""
        check_formats(self.formats)
        check_splat_formats(self.splat_formats)
        check_stem(self.name)
        if self.name == "splats":
            raise ConfigError("name 'splats' is that of the Gaussians' files; choose another")
        _check_range("cells_per_side", self.cells_per_side, 8, 1024)
        _check_range("max_faces", self.max_faces, 100, 10_000_000)
        _check_range("smooth_rounds", self.smooth_rounds, 0, 100)
        _check_range("min_piece_frac", self.min_piece_frac, 0.0, 1.0)
        _check_range("texture_px", self.texture_px, 128, 4096)
        if self.texture_px & (self.texture_px - 1):
            raise ConfigError(f"texture_px is {self.texture_px}; expected a power of two from 128 to 4096")
        _check_range("padding_px", self.padding_px, 0, 64)
        if self.size_m is not None:
            _check_range("size_m", self.size_m, 1e-4, 1e4)
        if not self.bake_depths_m:
            raise ConfigError("bake_depths_m is empty; expected at least one depth, e.g. [0.0]")
        _check_range("compare_views", self.compare_views, 0, 1000)
        _check_range("compare_px", self.compare_px, 16, 2048)


def _check_range(field: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{field} is {value}; expected a value from {low} to {high}")


@dataclass(frozen=True, kw_only=True)
class AssetReport:
    """What was written, and how good it is."""

    files: Mapping[str, Path]  # the main file of each format
    mesh: MeshStats  # of the closed surface, before the seams were cut
    charts: int
    fidelity: Fidelity | None  # None if no view was asked for, or no written format holds colours
    facts: FileFacts  # of the file itself
    seconds: Mapping[str, float]  # wall time per stage
    pose: Pose = field(default_factory=Pose.identity)  # from the scene's metres to the file's

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON report; all that is known of the file stands under `fidelity`."""
        plain = asdict(self)
        del plain["pose"]
        compared = plain["fidelity"] or dict.fromkeys(spec.name for spec in fields(Fidelity))
        plain["fidelity"] = compared | plain.pop("facts")
        return {**plain, "files": {name: str(path) for name, path in self.files.items()}}


def make_asset(
    scene: Scene, out_dir: Path, config: AssetConfig, metadata: Mapping[str, object] | None = None
) -> AssetReport:
    """Write a scene as a mesh with textures, read it back and compare it with the scene.

    `metadata` (prompt, seed, config hash: plain JSON values) goes into the file. Raises ExportError if the scene has
    no surface or a file cannot be written; then no file is left half-written.
    """
    clock = _Clock()
    shape = _file_shape(scene) if _file_of(scene) is not None else _made_shape(scene, config, clock)
    surface, normals, stats = shape.surface, shape.normals, shape.stats
    with clock("unwrap"):
        atlas = shape.atlas or unwrap(surface, texture_px=config.texture_px, padding_px=config.padding_px)
    bare = TexturedMesh(
        vertices=surface.vertices[atlas.source],
        faces=atlas.faces,
        normals=normals[atlas.source],  # made before the cut, so shading is smooth across seams
        uvs=atlas.uvs,
        closed=stats.watertight,
    )
    with clock("bake"):
        tangents = vertex_tangents(bare) if config.normal_map else None
        baked = bake(
            scene,
            surface,
            normals,
            atlas,
            texture_px=config.texture_px,
            inward_m=config.bake_depths_m,
            fine=shape.fine,
            tangents=tangents,
            occlusion=config.occlusion,
        )
    mesh = replace(
        bare,
        texture=baked.base_color,
        metallic_roughness=baked.metallic_roughness,
        occluded=baked.occluded,
        metallic=baked.metallic,
        roughness=baked.roughness,
        normal_texture=baked.normal,
        tangents=None if baked.normal is None else tangents,
    )
    with clock("write"):
        notes = {**(metadata or {}), "sds3d_version": __version__}
        placed, pose = _placed(mesh, atlas, scene, config)
        contents = encode_mesh(placed, config.name, config.formats, notes)
        files = write_formats(Path(out_dir), contents)
    with clock("compare"):
        weights = {name: sum(map(len, parts.values())) for name, parts in contents.items()}
        fidelity, facts = _examine_file(scene, placed, files, weights, config, pose)
    return AssetReport(
        files=files,
        mesh=stats,
        charts=atlas.charts,
        fidelity=fidelity,
        facts=facts,
        seconds=clock.seconds,
        pose=pose,
    )


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """What is unwrapped and baked, in the scene's metres."""

    surface: Surface
    normals: Float[Tensor, "v 3"]
    stats: MeshStats
    fine: Surface | None = None  # the surface before it was simplified, if it was
    atlas: Atlas | None = None  # the surface's own, if it is kept


def _made_shape(scene: Scene, config: AssetConfig, clock: "_Clock") -> _Shape:
    """The surface of a field: extracted, cleaned, simplified."""
    with clock("surface"):
        views = [turntable_cameras(8, ISO_PX), turntable_cameras(4, ISO_PX, 55.0)]
        raw = fitted_surface(scene, config.cells_per_side, views)
    with clock("clean"):
        fine = clean(raw, min_frac=config.min_piece_frac, smooth_rounds=config.smooth_rounds)
        surface = decimate(fine, config.max_faces)
        return _Shape(surface=surface, normals=vertex_normals(surface), stats=measure(surface), fine=fine)


def _file_of(scene: Scene) -> FileMesh | None:
    """The mesh file that a scene textures, if it does."""
    return scene.file if isinstance(scene, MeshScene) else None


def _file_shape(scene: Scene) -> _Shape:
    """The mesh of a file as it is: nothing is cleaned or simplified."""
    file = _file_of(scene)
    assert isinstance(scene, MeshScene)
    assert file is not None
    surface = file.surface(scene.vertices())
    return _Shape(
        surface=surface,
        normals=file.normals.cpu(),
        stats=measure(scene.surface(0)),
        atlas=own_atlas(surface, file.uvs.cpu()) if len(file.uvs) else None,
    )


def _placed(mesh: TexturedMesh, atlas: Atlas, scene: Scene, config: AssetConfig) -> tuple[TexturedMesh, Pose]:
    """The mesh in the file's axes, units and pivot, and the way there from the scene's."""
    file, pose = _file_of(scene), Pose.identity()
    if file is not None:
        pose = file.pose.inverse()
        mesh = mesh.moved(pose)
        if isinstance(scene, MeshScene) and not bool(scene.offset.any()):  # to the last bit as it was given
            mesh = replace(mesh, vertices=file.positions.cpu()[atlas.source])
    scale, offset = _placement(mesh, config)
    end = replace(Pose.identity(), scale=scale, shift=offset.double())
    return replace(mesh, vertices=mesh.vertices * scale + offset), pose.then(end)


def _placement(mesh: TexturedMesh, config: AssetConfig) -> tuple[float, Float[Tensor, " 3"]]:
    """(scale, offset) that the config asks for: p * scale + offset."""
    low, high = mesh.vertices.amin(0), mesh.vertices.amax(0)
    scale = 1.0 if config.size_m is None else config.size_m / float((high - low).max())
    if config.pivot == "scene":
        return scale, torch.zeros(3)
    origin = (low + high) / 2.0
    if config.pivot == "base":
        origin = torch.stack([origin[0], low[1], origin[2]])
    return scale, -origin * scale


def _examine_file(
    scene: Scene,
    placed: TexturedMesh,
    files: Mapping[str, Path],
    file_bytes: Mapping[str, int],
    config: AssetConfig,
    pose: Pose,
) -> tuple[Fidelity | None, FileFacts]:
    """Look at the file on disk, not at the mesh in memory: a wrong flip in a writer must show here."""
    written = next((name for name in (*TEXTURED_FORMATS, "stl") if name in files), None)
    mesh = placed if written is None else load_mesh(files[written])
    facts = facts_of(mesh, written, file_bytes)
    if written not in TEXTURED_FORMATS or config.compare_views == 0:
        return None, facts
    cameras = turntable_cameras(config.compare_views, config.compare_px)
    return compare(scene, mesh.moved(pose.inverse()), cameras, Stream(0, "fidelity")), facts


class _Clock:
    """Seconds per named stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)
