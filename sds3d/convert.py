"""From one scene to another: any scene becomes a tetrahedral mesh, a fixed mesh, or Gaussians on its surface."""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch

from sds3d.config.option import option
from sds3d.errors import ConfigError
from sds3d.interfaces import Scene, Surface
from sds3d.mathx.pose import UpAxis
from sds3d.mesh.splat_cloud import GaussianCloud
from sds3d.rng import Stream
from sds3d.scenes import SCENES, GaussianScene, MeshScene, TetMeshScene
from sds3d.scenes.file_mesh import FileMesh
from sds3d.scenes.gaussian_start import disc_values
from sds3d.scenes.gaussians import PARAMETERS
from sds3d.scenes.texture import TextureField
from sds3d.surfaces import SurfaceWay, sample_surface, surface_of

_BATCH = 1 << 11  # surface points per regression step
_POOL = 1 << 16  # surface points that the source is asked about, once
_SPREAD_M = 0.01  # points lie this far off the surface, so that the texture holds where the mesh moves


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """Where the scene comes from, other than from nothing: another run or a mesh file, turned into this kind."""

    run: str | None = option(
        None,
        help="run folder whose scene this run starts from; relative to this run's folder, else to here",
        path=True,
    )
    mesh: str | None = option(
        None,
        help="mesh file (glb, gltf, obj, ply, stl, off) that this run textures; the run folder keeps a copy",
        path=True,
    )
    up: UpAxis = option("y", help="axis of the mesh file that points up; the asset keeps the file's axes")
    front_deg: float = option(
        0.0, help="where its front is, counter-clockwise seen from above, 0 = +z (with up z: -y)"
    )
    reach_m: float = option(
        0.94, help="how far it reaches from the middle before the cameras; the asset keeps its size", ge=0.01
    )
    keep_uvs: bool = option(False, help="keep the mesh file's texture coordinates instead of making new ones")
    mesh_faces: int = option(
        200_000, help="a mesh file with more faces is simplified to these", ge=100, le=5_000_000
    )
    surface: SurfaceWay = option(
        "density",
        help="how its surface is taken: density = an iso-surface of its field, tsdf = fused from depth renders",
    )
    cells: int = option(96, help="cells per side of the surface that is taken from it", ge=8, le=512)
    max_faces: int = option(8000, help="faces of a mesh scene that is made from it", ge=100, le=1_000_000)
    texture_steps: int = option(
        200, help="steps in which a texture field learns its colours", ge=1, le=10_000
    )
    opacity: float = option(0.9, help="opacity of Gaussians that are put on it", ge=0.001, le=0.999)
    scatter_m: float = option(
        0.0, help="Gaussians lie up to this far off it (GaussianDreamer: 0.01)", ge=0.0, le=1.0
    )
    color_noise: float = option(
        0.0, help="up to this much is added to their colours (GaussianDreamer: 0.2)", ge=0.0, le=1.0
    )


def converted(scene: Scene, kind: str, config: Any, rng: Stream, start: StartConfig) -> Scene:
    """The scene as another kind: the same kind with the same settings is taken as it is.

    Raises:
        ConfigError: there is no way from a finished scene to this kind. ExportError: the scene has no surface.
    """
    steps, way = start.texture_steps, start.surface
    if kind == "tetmesh":
        if isinstance(scene, TetMeshScene) and scene.config == config:
            return scene
        return tetmesh_from(scene, config.cells, config=config, rng=rng, texture_steps=steps, way=way)
    if kind == "mesh" and isinstance(scene, MeshScene) and scene.file is not None:
        return scene if scene.config == config else _same_file(scene, scene.file, config, rng, steps)
    if kind == "mesh":
        return mesh_from(
            scene,
            start.cells,
            max_faces=start.max_faces,
            config=config,
            rng=rng,
            texture_steps=steps,
            way=way,
        )
    if kind == "gaussians":
        return gaussians_from(scene, config, rng, start)
    if type(scene) is SCENES[kind] and getattr(scene, "config", None) == config:
        return scene
    raise ConfigError(
        f"start.run: holds a {type(scene).__name__}, and a {kind!r} scene can only start from one with the same "
        "settings; any scene with a surface can become a tetmesh, a mesh or gaussians"
    )


def gaussians_from(
    scene: Scene,
    config: GaussianScene.Config | None = None,
    rng: Stream | None = None,
    start: StartConfig | None = None,
) -> GaussianScene:
    """`config.count` flat Gaussians on the surface of `scene`, in its colours; Gaussians are taken over as they are.

    Opacity, scatter and colour noise are those of `start`: the noisy points around a rough shape from which
    GaussianDreamer begins (Yi et al. 2024, arXiv:2310.08529, section 3.3). The source stays as it is. Raises
    ExportError where it has no surface.
    """
    rng, config = rng or Stream(0, "convert"), config or GaussianScene.Config()
    start = start or StartConfig()
    made = GaussianScene(config, rng.fork("scene"))
    if isinstance(scene, GaussianScene):
        made.start_from({name: getattr(scene, name).detach().clone() for name in PARAMETERS})
        made.pixel_m.copy_(scene.pixel_m)
        return made.to(_device(scene))
    surface = surface_of(scene, start.cells, max_faces=None, way=start.surface)
    points, normals = sample_surface(surface, config.count, rng)
    with torch.no_grad():
        color = scene.material(points.to(_device(scene))).base_color.cpu().float()
    color = color + start.color_noise * rng.fork("colors").uniform(*color.shape)
    off = start.scatter_m * (2 * rng.fork("scatter").uniform(config.count, 1) - 1)
    made.start_from(disc_values(points + off * normals, normals, color, start.opacity))
    return made.to(_device(scene))


def tetmesh_from(
    scene: Scene,
    cells: int,
    *,
    config: TetMeshScene.Config | None = None,
    rng: Stream | None = None,
    texture_steps: int = 200,
    way: SurfaceWay = "density",
) -> TetMeshScene:
    """A tetrahedral mesh scene of `cells` per side that starts as the surface and the colours of `scene`.

    The surface is the scene's own at the iso value that looks most like its renders, or fused from depth renders
    (`way`); the signed distance to it starts the lattice. `config` may set the rest; its `cells` are replaced. The
    source stays as it is.

    Raises:
        ExportError: the scene has no surface.
        ConfigError: the surface leaves the lattice.
    """
    rng = rng or Stream(0, "convert")
    config = replace(config or TetMeshScene.Config(), cells=cells)
    surface = surface_of(scene, cells, max_faces=4 * cells * cells, way=way)
    _check_extent(surface, config.half_extent_m * (1 - 2 / cells))
    made = TetMeshScene(config, rng.fork("scene"))
    made.start_from(surface)
    made.to(_device(scene))
    _learn_texture(made.texture, scene, made.surface(cells), rng.fork("texture"), texture_steps)
    return made


def mesh_from(
    scene: Scene,
    cells: int = 96,
    *,
    max_faces: int = 8000,
    config: MeshScene.Config | None = None,
    rng: Stream | None = None,
    texture_steps: int = 200,
    way: SurfaceWay = "density",
) -> MeshScene:
    """A fixed mesh scene of about `max_faces` faces with the surface and the colours of `scene`.

    The surface is extracted with `cells` per side, cleaned and simplified. Raises as `tetmesh_from`.
    """
    rng = rng or Stream(0, "convert")
    config = config or MeshScene.Config()
    surface = surface_of(scene, cells, max_faces=max_faces, way=way)
    _check_extent(surface, config.half_extent_m)
    made = MeshScene(config, surface, rng.fork("scene")).to(_device(scene))
    _learn_texture(made.texture, scene, surface, rng.fork("texture"), texture_steps)
    return made


def cloud_of(scene: GaussianScene) -> GaussianCloud:
    """The Gaussians of a scene as splat files hold them, on the CPU and without gradient."""
    cloud = GaussianCloud(
        means=scene.means,
        quats_wxyz=scene.quats,
        scales=scene.scales,
        opacity=scene.opacity,
        color=scene.color,
    )
    return cloud.on_cpu()


def _same_file(
    scene: MeshScene, file: FileMesh, config: MeshScene.Config, rng: Stream, texture_steps: int
) -> MeshScene:
    """The same mesh of the same file in a scene with other settings."""
    surface, file = scene.surface(0), deepcopy(file)
    _check_extent(surface, config.half_extent_m)
    if bool(scene.offset.any()):  # from here on this is where the vertices are
        moved = file.pose.inverse().points(surface.vertices[file.source.cpu()])
        file.positions = moved.to(file.positions)
    made = MeshScene(config, surface, rng.fork("scene"), file).to(_device(scene))
    _learn_texture(made.texture, scene, surface, rng.fork("texture"), texture_steps)
    return made


def _check_extent(surface: Surface, half_extent_m: float) -> None:
    reach = float(surface.vertices.abs().max())
    if reach > half_extent_m:
        raise ConfigError(
            f"half_extent_m: the surface reaches {reach:.3g} m from the origin, the new scene holds "
            f"{half_extent_m:.3g} m; set a larger half_extent_m"
        )


def _device(scene: Scene) -> torch.device:
    return next((value.device for value in scene.parameters()), torch.device("cpu"))


def _learn_texture(texture: TextureField, scene: Scene, surface: Surface, rng: Stream, steps: int) -> None:
    """Regress base colour, metallic and roughness to the source's material at points on the surface."""
    device = texture.encoding.table.device
    points, normals = sample_surface(surface, _POOL, rng)
    with torch.no_grad():
        wanted = scene.material(points.to(device))
        target = torch.cat([wanted.base_color, wanted.metallic, wanted.roughness], 1)
    points = points + _SPREAD_M * rng.fork("spread").normal(_POOL, 1) * normals
    points, target = points.to(device), target.to(device)
    adam = torch.optim.Adam(texture.parameters(), lr=0.02, betas=(0.9, 0.99), eps=1e-12)
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = 0.02 * (1 - step / steps) + 1e-3
        chosen = (rng.fork("batch").at(step).uniform(_BATCH) * _POOL).long().to(device)
        made = texture(points[chosen])
        found = torch.cat([made.base_color, made.metallic, made.roughness], 1)
        adam.zero_grad()
        (found - target[chosen]).square().mean().backward()
        adam.step()
    adam.zero_grad()
