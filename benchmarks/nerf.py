"""CPU cost of the NeRF scene: the hash encoding's twins, and one optimisation step taken apart.

    python -m benchmarks.nerf [--json results.json]

Milliseconds of CPU time on one thread, minimum and median of the repeats after one warm-up; the twins alternate in
one process, so that their ratio holds on a busy machine too.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("SDS3D_THREADS", "1")

import torch

from sds3d import ops
from sds3d.interfaces import Cameras, Shading
from sds3d.ops.hashgrid import HashGrid, HashGridConfig
from sds3d.rng import Stream
from sds3d.scenes.nerf import NerfScene

STREAM = Stream(0, "benchmark")


def timed(work: Callable[[], object]) -> tuple[float, object]:
    start = time.process_time()
    result = work()
    return 1e3 * (time.process_time() - start), result


def summary(times: list[float]) -> dict[str, float]:
    return {"min_ms": round(min(times), 2), "median_ms": round(statistics.median(times), 2)}


def encoding(count: int, repeats: int) -> dict[str, dict[str, float]]:
    grid = HashGrid(HashGridConfig(), STREAM)
    points = STREAM.fork("points").uniform(count, 3)
    cotangent = STREAM.fork("cotangent").normal(count, grid.width)
    times: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):
        for backend in ("numba", "reference"):
            with ops.use(backend):
                forward, encoded = timed(lambda: grid(points))
                backward, _ = timed(lambda e=encoded: (e * cotangent).sum().backward())
            if repeat:
                times.setdefault(f"{backend} forward", []).append(forward)
                times.setdefault(f"{backend} backward", []).append(backward)
    return {name: summary(values) for name, values in times.items()}


def orbit(step: int, px: int) -> Cameras:
    azimuth = (torch.arange(4) * 90.0 + 37.0 * step).deg2rad()
    elevation = torch.full((4,), math.radians(20.0))
    back = torch.stack(
        [azimuth.sin() * elevation.cos(), elevation.sin(), azimuth.cos() * elevation.cos()], -1
    )
    right = torch.stack([azimuth.cos(), torch.zeros(4), -azimuth.sin()], -1)
    c2w = torch.eye(4).repeat(4, 1, 1)
    c2w[:, :3, :3] = torch.stack([right, -torch.linalg.cross(back, right), -back], -1)
    c2w[:, :3, 3] = 3.3 * back
    focal = px / 2 / math.tan(math.radians(20.0))
    intrinsics = torch.tensor([[focal, 0, px / 2], [0, focal, px / 2], [0, 0, 1]]).repeat(4, 1, 1)
    return Cameras(
        c2w=c2w,
        intrinsics=intrinsics,
        width_px=px,
        height_px=px,
        azimuth_deg=azimuth.rad2deg(),
        elevation_deg=elevation.rad2deg(),
        radius=torch.full((4,), 3.3),
        fov_deg=torch.full((4,), 40.0),
    )


def step_split(px: int, repeats: int) -> dict[str, dict[str, float]]:
    scene = NerfScene(NerfScene.Config(), STREAM)
    optimizer = torch.optim.Adam([{"params": list(g.params), "lr": g.lr} for g in scene.groups()])
    light = torch.tensor([[0.0, 1.0, 0.0]]).expand(4, 3)
    modes = {
        "albedo": Shading(background=torch.ones(4, 3)),
        "lambertian": Shading(mode="lambertian", background=torch.ones(4, 3), light=light, ambient=0.3),
    }
    times: dict[str, list[float]] = {}
    live = []
    scene.adapt(scene.render(orbit(0, 8), modes["albedo"], STREAM), None, 0)
    for step in range(1, repeats + 2):
        for name, shading in modes.items():
            cameras, rng = orbit(step, px), STREAM.at(step)
            render, view = timed(lambda c=cameras, s=shading, r=rng: scene.render(c, s, r))
            penalty, loss = timed(lambda v=view: (v.rgb - 0.4).square().mean() + _penalties(scene, v))
            optimizer.zero_grad()
            backward, _ = timed(loss.backward)
            update, _ = timed(optimizer.step)
            if step > 1:
                parts = {"render": render, "penalties": penalty, "backward": backward, "adam": update}
                parts["whole step"] = sum(parts.values())
                for part, value in parts.items():
                    times.setdefault(f"{name} {part}", []).append(value)
                live.append(view.private.weights.numel())
        refresh, _ = timed(lambda v=view, s=step: scene.adapt(v, None, 16 * s))
        if step > 1:
            times.setdefault("occupancy refresh (every 16 steps)", []).append(refresh)
    share = statistics.mean(live) / (4 * px * px * scene.config.samples_per_ray)
    return {name: summary(values) for name, values in times.items()} | {"live": {"share": round(share, 3)}}


def _penalties(scene: NerfScene, view: object) -> torch.Tensor:
    penalties = scene.penalties(view)
    return 1e-3 * (penalties["opacity"] + penalties["entropy"] + penalties["distortion"] + penalties["tv"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=1 << 17)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    encode = encoding(asked.points, asked.repeats)
    ratio = {
        part: round(encode[f"reference {part}"]["min_ms"] / encode[f"numba {part}"]["min_ms"], 2)
        for part in ("forward", "backward")
    }
    result = {
        "torch": torch.__version__,
        "points": asked.points,
        "encode": encode,
        "reference / numba": ratio,
        "step, 4 views of 64 px": step_split(64, asked.repeats),
    }
    print(json.dumps(result, indent=2))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
