"""Wall time of an export by stage: a voxel object to a closed, textured mesh on disk, read back and compared.

    python -m benchmarks.export [--faces 8000 20000] [--texture 1024] [--formats glb,obj] [--run FOLDER] [--json FILE]

Without --run, the scene is a bumpy hardened ball with stripes: nothing needs to be trained. Stages are wall time, on as
many threads as SDS3D_THREADS allows (all cores by default); on a busy machine the CPU time of all threads tells more.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from sds3d.asset import AssetConfig, AssetReport, make_asset
from sds3d.interfaces import Scene
from sds3d.ops.threads import one_thread_per_call
from sds3d.rng import Stream
from sds3d.run_folder import last_checkpoint, open_run, restored_scene
from sds3d.scenes.voxel import VoxelScene

TARGET_S = 20.0  # of a 20k-face export
STAGES = ("surface", "clean", "unwrap", "bake", "write", "compare")


def bumpy_ball() -> VoxelScene:
    """An object with detail at every scale that 20 000 faces can hold."""
    scene = VoxelScene(VoxelScene.Config(resolutions=(96,), hardness=20.0), Stream(0, "export"))
    axis = torch.linspace(-1.05, 1.05, 96)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    radius = torch.stack([x, y, z]).norm(dim=0)
    bumps = 0.06 * torch.sin(12 * x) * torch.sin(12 * y) * torch.sin(12 * z) + 0.03 * torch.sin(25 * y)
    scene.base.copy_((10.0 * (0.75 + bumps - radius)).clamp(-5.0, 3.0))
    with torch.no_grad():
        scene.levels[0][0, 1] = torch.sin(20 * y)
        scene.levels[0][0, 2] = torch.cos(20 * x)
    return scene


def timed(scene: Scene, faces: int, texture_px: int, formats: Sequence[str]) -> AssetReport:
    """One export into a folder that is thrown away."""
    config = AssetConfig(cells_per_side=128, max_faces=faces, texture_px=texture_px, formats=tuple(formats))
    with tempfile.TemporaryDirectory() as folder, one_thread_per_call(torch.device("cpu")):
        return make_asset(scene, Path(folder), config)


def main() -> None:
    """Print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faces", type=int, nargs="+", default=[8000, 20000])
    parser.add_argument("--texture", type=int, default=1024)
    parser.add_argument("--formats", default="glb")
    parser.add_argument("--run", type=Path, help="export this run's scene instead")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    scene: Scene = bumpy_ball()
    if given.run is not None:
        job, _ = open_run(given.run)
        saved = last_checkpoint(given.run, job)
        if saved is None:
            parser.error(f"{given.run} holds no checkpoint")
        scene = restored_scene(job, saved)
    scene.eval()
    timed(scene, 1000, 128, ["glb"])  # compiles the kernels
    rows = []
    print(
        f"{'faces':>7}"
        + "".join(f"{stage:>9}" for stage in STAGES)
        + f"{'total s':>9}{'CPU s':>9}{'PSNR dB':>9}"
    )
    for faces in given.faces:
        before = time.process_time()
        report = timed(scene, faces, given.texture, given.formats.split(","))
        cpu = time.process_time() - before
        total = sum(report.seconds.values())
        psnr = report.fidelity.psnr_db if report.fidelity is not None else float("nan")
        times = "".join(f"{report.seconds[stage]:9.2f}" for stage in STAGES)
        print(f"{report.mesh.faces:7d}{times}{total:9.2f}{cpu:9.2f}{psnr:9.1f}")
        rows.append(
            {"faces": report.mesh.faces, "total_s": round(total, 2), "cpu_s": round(cpu, 2), **report.seconds}
        )
    if given.json is not None:
        given.json.write_text(
            json.dumps({"target_s": TARGET_S, "exports": rows}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
