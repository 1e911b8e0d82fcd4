"""docs/images/texture.png: meshes without colours, textured from prompts, seen from four sides.

Run it as: python docs/figures/texture.py [WORK_FOLDER]
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import trimesh
from PIL import Image

from sds3d.cameras.orbit import orbit_cameras
from sds3d.config.load import override_layers
from sds3d.job import load_job
from sds3d.mathx.pose import fitting, upright
from sds3d.mesh.clean import clean
from sds3d.mesh.files import load_mesh
from sds3d.mesh.read import load_geometry
from sds3d.mesh.textured import TexturedMesh, render_textured
from sds3d.run import generate
from sds3d.toybox.solid import toy_surface
from sds3d.toybox.world import sample_toy

WORK = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/figure-texture")
KINDS = {"mug": 3, "chair": 1, "mushroom": 2}  # by seed of the toy
PROMPTS = {
    "a red mug": "mug",
    "a blue mug": "mug",
    "a blue chair with yellow legs": "chair",
    "a red mushroom": "mushroom",
}
SIDE_PX = 240


def grey_file(kind: str) -> Path:
    """A toy as programs for solids would save it: z up, millimetres, off the origin, no colours."""
    surface = clean(
        toy_surface(sample_toy(np.random.default_rng(KINDS[kind]), kind)), max_faces=8000, smooth_rounds=3
    )
    to_z_up = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])
    points = surface.vertices.numpy() @ to_z_up * 50.0 + [10.0, 20.0, 30.0]
    path = WORK / f"{kind}.stl"
    trimesh.Trimesh(points, surface.faces.numpy(), process=False).export(path)
    return path


def views(mesh: TexturedMesh, *azimuths: float) -> torch.Tensor:
    """Pictures side by side."""
    mesh = mesh.moved(fitting(mesh.vertices, upright("z"), 0.94))
    level = torch.ones(len(azimuths))
    cameras = orbit_cameras(torch.tensor(azimuths), 20 * level, 3.1 * level, 40 * level, SIDE_PX)
    white = torch.ones(len(azimuths), 3)
    return torch.cat([*render_textured(mesh, cameras, white, look="lit")[0]], dim=2)


def main() -> None:
    """Make the meshes, texture them, and show both."""
    WORK.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, (prompt, kind) in enumerate(PROMPTS.items()):
        path = grey_file(kind)
        words = [f"prompt={prompt}", f"start.mesh={path}", "start.up=z"]
        made = generate(load_job("toybox/texture", override_layers(words)).config, WORK / str(index))
        given = load_geometry(path)
        grey = replace(given, colors=torch.full((len(given.vertices), 3), 170, dtype=torch.uint8))
        shown = views(load_mesh(made.files["glb"]), 35.0, 125.0, 215.0, 305.0)
        rows.append(torch.cat([views(grey, 35.0), shown], dim=2))
    sheet = (torch.cat(rows, dim=1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(sheet).save(Path(__file__).parents[1] / "images" / "texture.png")


if __name__ == "__main__":
    main()
