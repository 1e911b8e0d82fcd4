"""From one scene to another: any scene becomes a tetrahedral or a fixed mesh with the same shape and colours."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.cameras.orbit import turntable_cameras
from sds3d.errors import ConfigError
from sds3d.interfaces import Scene, Surface
from sds3d.mathx.mesh_penalty import face_normals
from sds3d.mesh.clean import clean
from sds3d.mesh.fit_iso import fitted_surface
from sds3d.rng import Stream
from sds3d.scenes import SCENES, MeshScene, TetMeshScene
from sds3d.scenes.texture import TextureField

_ISO_PX = 64  # of the views that the iso value is fitted to
_BATCH = 1 << 11  # surface points per regression step
_POOL = 1 << 16  # surface points that the source is asked about, once
_SPREAD_M = 0.01  # points lie this far off the surface, so that the texture holds where the mesh moves


def converted(
    scene: Scene, kind: str, config: Any, rng: Stream, *, cells: int, max_faces: int, texture_steps: int
) -> Scene:
    """The scene as another kind: the same kind with the same settings is taken as it is.

    Raises:
        ConfigError: there is no way from a finished scene to this kind. ExportError: the scene has no surface.
    """
    if kind == "tetmesh":
        if isinstance(scene, TetMeshScene) and scene.config == config:
            return scene
        return tetmesh_from(scene, config.cells, config=config, rng=rng, texture_steps=texture_steps)
    if kind == "mesh":
        return mesh_from(
            scene, cells, max_faces=max_faces, config=config, rng=rng, texture_steps=texture_steps
        )
    if type(scene) is SCENES[kind] and getattr(scene, "config", None) == config:
        return scene
    raise ConfigError(
        f"start.run: holds a {type(scene).__name__}, and a {kind!r} scene can only start from one with the same "
        "settings; any scene can become a tetmesh or a mesh"
    )


def tetmesh_from(
    scene: Scene,
    cells: int,
    *,
    config: TetMeshScene.Config | None = None,
    rng: Stream | None = None,
    texture_steps: int = 200,
) -> TetMeshScene:
    """A tetrahedral mesh scene of `cells` per side that starts as the surface and the colours of `scene`.

    The surface is the scene's own at the iso value that looks most like its renders; the signed distance to it starts
    the lattice. `config` may set the rest; its `cells` are replaced. The source stays as it is.

    Raises:
        ExportError: the scene has no surface.
        ConfigError: the surface leaves the lattice.
    """
    rng = rng or Stream(0, "convert")
    config = replace(config or TetMeshScene.Config(), cells=cells)
    surface = _surface_of(scene, cells, max_faces=4 * cells * cells)
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
) -> MeshScene:
    """A fixed mesh scene of about `max_faces` faces with the surface and the colours of `scene`.

    The surface is extracted with `cells` per side, cleaned and simplified. Raises as `tetmesh_from`.
    """
    rng = rng or Stream(0, "convert")
    config = config or MeshScene.Config()
    surface = _surface_of(scene, cells, max_faces=max_faces)
    _check_extent(surface, config.half_extent_m)
    made = MeshScene(config, surface, rng.fork("scene")).to(_device(scene))
    _learn_texture(made.texture, scene, surface, rng.fork("texture"), texture_steps)
    return made


def sample_surface(
    surface: Surface, count: int, rng: Stream
) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 3"]]:
    """`count` points spread evenly over the area of a surface, and the unit normals of their faces."""
    normal = face_normals(surface.vertices, surface.faces)
    area = normal.norm(dim=1).double().cumsum(0)
    draw = rng.fork("points").uniform(count, 3)
    face = torch.searchsorted(area, draw[:, 0].double() * area[-1]).clamp_max(len(area) - 1)
    root = draw[:, 1:2].sqrt()
    weights = torch.cat([1 - root, root * (1 - draw[:, 2:]), root * draw[:, 2:]], 1)
    points = (surface.vertices[surface.faces[face]] * weights[..., None]).sum(1)
    return points, torch.nn.functional.normalize(normal[face], dim=1, eps=1e-12)


def _surface_of(scene: Scene, cells: int, *, max_faces: int) -> Surface:
    views = [turntable_cameras(4, _ISO_PX), turntable_cameras(2, _ISO_PX, 55.0)]
    was_training = scene.training
    scene.eval()
    try:
        raw = fitted_surface(scene, cells, views)
    finally:
        scene.train(was_training)
    return clean(raw, max_faces=max_faces, smooth_rounds=2)


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
