"""`sds3d relight`: a finished asset under another light, as a video and a contact sheet."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.cameras.orbit import orbit_cameras
from sds3d.errors import InputError
from sds3d.events.turntable import write_contact_sheet, write_turntable
from sds3d.mesh.files import load_mesh
from sds3d.mesh.lit import render_lit
from sds3d.mesh.textured import TexturedMesh
from sds3d.ops.environment import Environment
from sds3d.ops.skies import read_environment

Turning = Literal["object", "light"]
FOV_DEG, ELEVATION_DEG, MARGIN = 40.0, 15.0, 1.15


@dataclass(frozen=True, kw_only=True)
class RelightConfig:
    """What the pictures show."""

    environment: str = "studio"  # a name of `ops.skies.SKIES`, or a lat-long file
    turning: Turning = "object"  # what goes round: the object before the camera, or the light around both
    frames: int = 48
    size_px: int = 256

    def __post_init__(self) -> None:
        """Raise InputError for a value that cannot work."""
        for name, low, high in (("frames", 1, 1000), ("size_px", 32, 2048)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(f"relight: {name} is {value}; expected a value from {low} to {high}")
        if self.size_px % 2:
            raise InputError(f"relight: size_px is {self.size_px}; videos need an even number")


def relight(asset: Path, out: Path, config: RelightConfig) -> dict[str, Path]:
    """Write relit.mp4 and relit.png into `out`; returns them by name.

    Raises:
        InputError: the asset or the environment cannot be read.
    """
    environment = read_environment(config.environment)
    mesh = centred(load_mesh(asset))
    out.mkdir(parents=True, exist_ok=True)
    files = {"video": out / "relit.mp4", "sheet": out / "relit.png"}
    write_turntable(files["video"], frames(mesh, environment, config), size_px=config.size_px)
    few = list(frames(mesh, environment, replace(config, frames=8)))
    write_contact_sheet(files["sheet"], torch.stack(few))
    return files


def centred(mesh: TexturedMesh) -> TexturedMesh:
    """The mesh in the unit ball around the origin, whatever its units and pivot."""
    middle = (mesh.vertices.amin(0) + mesh.vertices.amax(0)) / 2.0
    reach = float((mesh.vertices - middle).norm(dim=1).max())
    if not reach > 0.0:
        raise InputError("relight: the mesh has no extent")
    return replace(mesh, vertices=(mesh.vertices - middle) / reach)


def frames(
    mesh: TexturedMesh, environment: Environment, config: RelightConfig
) -> Iterator[Float[Tensor, "3 H W"]]:
    """One picture per frame, on a light grey ground."""
    distance = MARGIN / torch.sin(torch.deg2rad(torch.tensor(FOV_DEG / 2.0)))
    for index in range(config.frames):
        turn = 360.0 * index / config.frames
        azimuth = turn if config.turning == "object" else 30.0
        cameras = orbit_cameras(
            torch.tensor([azimuth]),
            torch.tensor([ELEVATION_DEG]),
            distance[None],
            torch.tensor([FOV_DEG]),
            config.size_px,
        )
        # An object that turns before a camera under a fixed light: seen from the object, both move together.
        yield render_lit(mesh, cameras, torch.full((1, 3), 0.92), environment, turn_deg=turn)[0][0]
