"""CPU cost of mesh rendering: face ids by backend, and a differentiable render with and without antialiasing.

    python -m benchmarks.mesh [--json results.json] [--repeats 5] [--sizes 5000x128 20000x256]

Milliseconds of CPU time on one thread for one view of a bumpy ball, minimum of the repeats after one warm-up.
"faces" finds face ids only (numba z-buffer | torch lists); "render" adds barycentrics, depth and three interpolated
attributes, forward and backward; "outline" adds silhouette antialiasing, forward and backward.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("SDS3D_THREADS", "1")

import torch
from skimage import measure
from torch import Tensor

from sds3d import ops
from sds3d.cameras.orbit import turntable_cameras
from sds3d.interfaces import Cameras
from sds3d.ops.antialias import antialias, find_crossings
from sds3d.ops.mesh_edges import MeshEdges, mesh_edges
from sds3d.ops.mesh_raster import look, rasterize, to_clip

SIZES = tuple(f"{faces}x{px}" for faces in (5000, 20000, 82000) for px in (128, 256, 512))
# Wanted, in ms: (face ids, render forward and backward) for a bare z-buffer kernel on a machine of this class.
BAR = {
    (5000, 128): 0.4, (20000, 128): 0.8, (82000, 128): 2.1,
    (5000, 256): 1.1, (20000, 256): 1.7, (82000, 256): 3.3,
    (5000, 512): 3.1, (20000, 512): 4.3, (82000, 512): 7.0,
}  # fmt: skip
BAR_RENDER = {(20000, 128): 3.6, (20000, 256): 10.6, (20000, 512): 36.0}


def bumpy_ball(faces: int) -> tuple[Tensor, Tensor]:
    """About so many faces, by marching cubes."""
    cells = round((faces / 4.6) ** 0.5)
    axis = torch.linspace(-1, 1, cells)
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    level = (x * x + y * y + z * z).sqrt() + 0.05 * torch.sin(9 * x) * torch.sin(9 * y) * torch.sin(9 * z)
    vertices, triangles, _, _ = measure.marching_cubes(level.numpy(), 0.7)
    world = torch.from_numpy(vertices.copy()) * (2 / (cells - 1)) - 1
    return world.float(), torch.from_numpy(triangles.astype("int64"))


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    taken = []
    for _ in range(repeats + 1):
        start = time.process_time()
        call()
        taken.append(1e3 * (time.process_time() - start))
    return round(min(taken[1:]), 2)


def render(vertices: Tensor, faces: Tensor, cameras: Cameras, edges: MeshEdges | None) -> None:
    leaf = vertices.clone().requires_grad_(True)
    clip = to_clip(leaf, cameras)
    face_id = rasterize(clip.detach(), faces, (cameras.height_px, cameras.width_px))
    pixels = look(clip, faces, face_id)
    image = pixels.image(torch.cat([pixels.interpolate(leaf), pixels.depth[:, None]], 1))
    if edges is not None:
        found = find_crossings(clip.detach(), faces, edges, face_id, image[:, 3].detach())
        image = antialias(image, clip, found)
    image.square().sum().backward()


def measure_size(count: int, px: int, repeats: int) -> dict[str, float]:
    vertices, faces = bumpy_ball(count)
    cameras = turntable_cameras(1, px)
    clip = to_clip(vertices, cameras)
    edges = mesh_edges(faces, len(vertices))
    row: dict[str, float] = {"faces": len(faces), "asked": count, "px": px}
    for backend in ("numba", "reference"):
        with ops.use(backend):
            row[f"faces {backend}"] = milliseconds(lambda: rasterize(clip, faces, (px, px)), repeats)
    row["edges"] = milliseconds(lambda: mesh_edges(faces, len(vertices)), repeats)
    row["render"] = milliseconds(lambda: render(vertices, faces, cameras, None), repeats)
    row["outline"] = milliseconds(lambda: render(vertices, faces, cameras, edges), repeats)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="FACESxPX")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("faces   px | ids numba (bar) / torch | render f+b (bar) | with outline | edge table")
    for size in arguments.sizes:
        count, px = map(int, size.split("x"))
        row = measure_size(count, px, arguments.repeats)
        rows.append(row)
        bar, bar_render = BAR.get((count, px), 0.0), BAR_RENDER.get((count, px))
        print(
            f"{row['faces']:6.0f} {px:4d} | {row['faces numba']:6.2f} ({bar:3.1f}) / {row['faces reference']:7.1f} "
            f"| {row['render']:6.2f} ({bar_render or '-'}) | {row['outline']:6.2f} | {row['edges']:5.2f}"
        )
    if arguments.json is not None:
        facts = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
        text = json.dumps({"facts": facts, "mesh": rows}, indent=2) + "\n"
        arguments.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
