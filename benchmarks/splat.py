"""CPU cost of Gaussian splatting: the numba kernels against the torch tile loop, forward and forward + backward.

    python -m benchmarks.splat [--json results.json] [--repeats 5] [--sizes 5000x128 20000x128]

Milliseconds of CPU time on one thread, minimum and median of the repeats after one warm-up. The twins alternate in
one process, so that their ratio holds on a busy machine too. The tile loop is a fair one: vectorised over the 256
pixels of a tile and 512 Gaussians at a time, tiles stop when they are opaque, and of tile sizes 8, 16, 32 and chunks
64 to 1024 the fastest pair is built in.
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("SDS3D_THREADS", "1")

import torch
from torch import Tensor

from sds3d import ops
from sds3d.cameras.orbit import orbit_cameras
from sds3d.interfaces import Cameras
from sds3d.ops.splat import rasterize_gaussians
from sds3d.rng import Stream

STREAM = Stream(0, "benchmark")
SIZES = ("5000x64", "5000x128", "5000x256", "20000x64", "20000x128", "20000x256")
BAR = 12.0  # wanted at 128 px


def ball(count: int, radius_m: float = 0.5) -> list[Tensor]:
    """Gaussians that fill a ball: about half the nearest-neighbour distance wide, opacities around a half."""
    rng = STREAM.fork("ball").numpy_generator()
    direction = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(count, 3))), dim=-1)
    spacing = radius_m * (4 / 3 * math.pi / count) ** (1 / 3)
    values = [
        direction * torch.from_numpy(rng.random((count, 1))) ** (1 / 3) * radius_m,
        torch.from_numpy(rng.normal(size=(count, 4))),
        torch.from_numpy(0.5 * spacing * rng.lognormal(0.0, 0.5, (count, 3))),
        torch.sigmoid(torch.from_numpy(rng.normal(0.0, 1.5, count))),
        torch.from_numpy(rng.random((count, 3))),
    ]
    return [value.float().requires_grad_(True) for value in values]


def views(count: int, px: int) -> Cameras:
    """Views that the ball nearly fills."""
    full = torch.ones(count)
    azimuth = torch.arange(count) * (360.0 / count) + 34.0
    return orbit_cameras(azimuth, full * 17.0, full * 1.6, full * 49.1, px)


def step(values: list[Tensor], cameras: Cameras, cotangents: list[Tensor]) -> tuple[float, float]:
    """CPU milliseconds of the forward pass, and of forward and backward together."""
    start = time.process_time()
    image = rasterize_gaussians(*values, cameras, torch.ones(len(cameras), 3))
    forward = time.process_time() - start
    images = (image.rgb, image.alpha, image.depth)
    torch.autograd.grad(images, values, cotangents)
    return 1e3 * forward, 1e3 * (time.process_time() - start)


def measure(count: int, px: int, batch: int, repeats: int) -> dict[str, float]:
    values, cameras = ball(count), views(batch, px)
    cotangents = [STREAM.fork(f"cotangent{c}").normal(batch, c, px, px) for c in (3, 1, 1)]
    times: dict[str, list[tuple[float, float]]] = {"numba": [], "reference": []}
    for repeat in range(repeats + 1):
        for backend in ("reference", "numba"):
            with ops.use(backend):
                taken = step(values, cameras, cotangents)
            if repeat:
                times[backend].append(taken)
    result: dict[str, float] = {"gaussians": count, "px": px, "views": batch}
    for backend, taken in times.items():
        forward, both = zip(*taken, strict=True)
        result[f"{backend} forward min_ms"] = round(min(forward), 2)
        result[f"{backend} both min_ms"] = round(min(both), 2)
        result[f"{backend} both median_ms"] = round(statistics.median(both), 2)
    result["ratio"] = round(result["reference both min_ms"] / result["numba both min_ms"], 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="GAUSSIANSxPX")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("gaussians   px | numba fwd / both | tile loop fwd / both | ratio of both")
    for size in arguments.sizes:
        count, px = map(int, size.split("x"))
        row = measure(count, px, arguments.views, arguments.repeats)
        rows.append(row)
        print(
            f"{count:9d} {px:4d} | {row['numba forward min_ms']:7.2f} / {row['numba both min_ms']:6.2f} "
            f"| {row['reference forward min_ms']:9.1f} / {row['reference both min_ms']:8.1f} "
            f"| {row['ratio']:5.1f}x" + (f" (bar: {BAR:.0f}x)" if px == 128 else "")
        )
    if arguments.json is not None:
        facts = {
            "torch": torch.__version__,
            "machine": platform.processor() or platform.machine(),
            "threads": os.environ["SDS3D_THREADS"],
        }
        arguments.json.write_text(
            json.dumps({"facts": facts, "splat": rows}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
