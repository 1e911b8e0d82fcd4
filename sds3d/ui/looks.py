"""Pictures of a finished asset in several looks, rendered from its file by our own renderer."""

import base64
import io
import threading
from collections import OrderedDict
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sds3d.cameras.orbit import orbit_cameras
from sds3d.errors import InputError
from sds3d.events.preview import to_image
from sds3d.interfaces import Cameras
from sds3d.mesh.files import load_mesh
from sds3d.mesh.lit import render_lit, shading_normal
from sds3d.mesh.textured import Pixels, TexturedMesh, render_colored, render_textured
from sds3d.ops.environment import Environment
from sds3d.ops.skies import read_environment
from sds3d.ops.threads import one_thread_per_call
from sds3d.relight import FOV_DEG, MARGIN, centred

Look = Literal["shaded", "base colour", "normals", "clay"]
LOOKS: tuple[Look, ...] = get_args(Look)
GROUND = 0.95  # grey behind the object
CLAY = (196, 190, 184)  # sRGB
_KEPT = 4


class Looks:
    """Renders looks; keeps the last few meshes. May be called from any thread, one picture at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._meshes: OrderedDict[tuple[Path, int], TexturedMesh] = OrderedDict()

    def picture(
        self,
        path: Path,
        look: Look,
        azimuth_deg: float = 30.0,
        elevation_deg: float = 15.0,
        size_px: int = 420,
    ) -> Image.Image:
        """The asset of a file from one side; raises InputError for a file that cannot be read."""
        if look not in LOOKS:
            raise InputError(f"look: got {look!r}, expected one of {', '.join(LOOKS)}")
        with self._lock, one_thread_per_call(torch.device("cpu")):
            distance = MARGIN / torch.sin(torch.deg2rad(torch.tensor(FOV_DEG / 2.0)))
            cameras = orbit_cameras(
                torch.tensor([float(azimuth_deg)]),
                torch.tensor([float(elevation_deg)]),
                distance[None],
                torch.tensor([FOV_DEG]),
                size_px,
            )
            return to_image(_render(self._mesh(path), cameras, look))

    def _mesh(self, path: Path) -> TexturedMesh:
        key = (path, path.stat().st_mtime_ns)
        if key not in self._meshes:
            self._meshes[key] = centred(load_mesh(path))
        self._meshes.move_to_end(key)
        while len(self._meshes) > _KEPT:
            self._meshes.popitem(last=False)
        return self._meshes[key]


def _render(mesh: TexturedMesh, cameras: Cameras, look: Look) -> Float[Tensor, "3 H W"]:
    ground = torch.full((1, 3), GROUND)
    if look == "base colour":
        return render_textured(mesh, cameras, ground)[0][0]
    if look == "normals":

        def color(pixels: Pixels) -> Float[Tensor, "n 3"]:
            return 0.5 + 0.5 * shading_normal(mesh, pixels)

        return render_colored(mesh, cameras, ground, color)[0][0]
    return render_lit(clay(mesh) if look == "clay" else mesh, cameras, ground, _studio())[0][0]


def clay(mesh: TexturedMesh) -> TexturedMesh:
    """The same shape in one matte colour."""
    count = len(mesh.vertices)
    return replace(
        mesh,
        texture=None,
        metallic_roughness=None,
        occluded=False,
        colors=torch.tensor(CLAY, dtype=torch.uint8).expand(count, 3).contiguous(),
        metallic=0.0,
        roughness=0.8,
    )


@lru_cache(maxsize=1)
def _studio() -> Environment:
    return read_environment("studio")


def jpeg_uri(image: Image.Image, quality: int = 88) -> str:
    """A picture as text for a web page."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
