"""Scenes: one file per representation, one line in this table."""

from sds3d.interfaces import Scene
from sds3d.scenes.gaussians import GaussianScene
from sds3d.scenes.nerf import NerfScene
from sds3d.scenes.voxel import VoxelScene

SCENES: dict[str, type[Scene]] = {
    "voxel": VoxelScene,
    "nerf": NerfScene,
    "gaussians": GaussianScene,
}

__all__ = ["SCENES", "GaussianScene", "NerfScene", "VoxelScene"]
