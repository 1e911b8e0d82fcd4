"""Scenes: one file per representation, one line in this table."""

from sds3d.interfaces import Scene
from sds3d.scenes.nerf import NerfScene

SCENES: dict[str, type[Scene]] = {
    "nerf": NerfScene,
}

__all__ = ["SCENES", "NerfScene"]
