"""Scenes: one file per representation, one line in this table."""

from typing import Any

from sds3d.interfaces import Scene
from sds3d.rng import Stream
from sds3d.scenes.gaussians import GaussianScene
from sds3d.scenes.mesh import MeshScene
from sds3d.scenes.nerf import NerfScene
from sds3d.scenes.particles import Particles
from sds3d.scenes.tetmesh import TetMeshScene
from sds3d.scenes.voxel import VoxelScene

SCENES: dict[str, type[Scene]] = {
    "voxel": VoxelScene,
    "nerf": NerfScene,
    "gaussians": GaussianScene,
    "tetmesh": TetMeshScene,
    "mesh": MeshScene,
}


def _new(kind: str, config: Any, stream: Stream) -> Scene:
    return MeshScene.waiting(config, stream) if kind == "mesh" else SCENES[kind](config, stream)


def build_scene(kind: str, config: Any, stream: Stream, particles: int = 1) -> Scene:
    """A scene of this kind, or several with initial values of their own; the first is the same in both cases."""
    first = _new(kind, config, stream)
    if particles == 1:
        return first
    more = [_new(kind, config, stream.fork(f"particle{index}")) for index in range(1, particles)]
    return Particles([first, *more])


def particles_of(scene: Scene) -> list[Scene]:
    """The scenes that are optimised together; a plain scene is the only one."""
    return [scene.particle(i) for i in range(len(scene.scenes))] if isinstance(scene, Particles) else [scene]


__all__ = [
    "SCENES",
    "GaussianScene",
    "MeshScene",
    "NerfScene",
    "Particles",
    "TetMeshScene",
    "VoxelScene",
    "build_scene",
    "particles_of",
]
