"""`sds3d compact`: a run folder or a splat file in, a small splat file and a report beside it."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from sds3d.compact.shrink import CompactConfig, Compacted, shrink
from sds3d.convert import cloud_of
from sds3d.errors import InputError
from sds3d.job import pick_device
from sds3d.mesh.splat_cloud import GaussianCloud
from sds3d.mesh.splat_files import read_splats
from sds3d.ops.threads import one_thread_per_call
from sds3d.paths import write_atomic
from sds3d.run_folder import last_checkpoint, open_run, restored_scene
from sds3d.scenes import GaussianScene, particles_of
from sds3d.staged import staged_manifest


@dataclass(frozen=True, kw_only=True)
class CompactResult:
    """Where the file is, and how it compares."""

    file: Path
    report: Path
    made: Compacted
    line: str  # all of it in one line


def compact(
    source: Path,
    out: Path | None = None,
    config: CompactConfig | None = None,
    tell: Callable[[str], None] | None = None,
) -> CompactResult:
    """Compact the Gaussians of a run (of its first particle) or of a splat file; the source stays untouched.

    Writes NAME.compact.spz (or .splat) and NAME.compact.json to `out`, by default beside the source; NAME is `splats`
    for a run. Raises InputError where there are no Gaussians.
    """
    config = config or CompactConfig()
    start = time.monotonic()
    cloud = gaussians_of(source)
    device = pick_device("auto")
    cloud = cloud.to(device)
    with one_thread_per_call(device):
        made = shrink(cloud, config, tell)
    folder = out or (source if source.is_dir() else source.parent)
    folder.mkdir(parents=True, exist_ok=True)
    name = "splats" if source.is_dir() else source.name.removesuffix(source.suffix)
    file, report = folder / f"{name}.compact.{config.format}", folder / f"{name}.compact.json"
    write_atomic(file, made.data)
    facts = {
        "source": str(source),
        "file": file.name,
        "bytes_before": made.bytes_before,
        "bytes_after": len(made.data),
        "ratio": round(made.ratio, 2),
        "gaussians_before": made.gaussians_before,
        "gaussians_after": made.gaussians_after,
        "psnr_before_db": round(made.psnr_before_db, 3),
        "psnr_after_db": round(made.psnr_after_db, 3),
        "loss_db": round(made.loss_db, 3),
        "agreement_db": round(made.agreement_db, 3),
        "within_max_loss": made.within,
        "settings": asdict(config),
        "rounds": made.rounds,
        "seconds": round(time.monotonic() - start, 1),
    }
    write_atomic(report, json.dumps(facts, indent=2).encode("utf-8"))
    return CompactResult(file=file, report=report, made=made, line=_line(made, config))


def gaussians_of(source: Path) -> GaussianCloud:
    """The Gaussians of a splat file, or of the last checkpoint of a run (staged: of its last stage that has any).

    Raises:
        InputError: not a run, a run of another kind of scene, or one without a checkpoint.
    """
    if source.is_file():
        return read_splats(source).finite()
    manifest = staged_manifest(source)
    if manifest is None:
        folders = [source]
    else:
        begun = [source / entry["folder"] for entry in manifest["stages"]]
        folders = [folder for folder in reversed(begun) if (folder / "manifest.json").is_file()] or [source]
    kinds = []
    for folder in folders:
        job, _ = open_run(folder)
        kinds.append(job.scene.kind)
        if job.scene.kind != "gaussians":
            continue
        saved = last_checkpoint(folder, job)
        if saved is None:
            raise InputError(f"{folder}: holds no checkpoint; run: sds3d resume {source}")
        scene = particles_of(restored_scene(job, saved))[0]
        assert isinstance(scene, GaussianScene)
        return cloud_of(scene)
    raise InputError(
        f"{source}: holds no Gaussians, its scene is {' and '.join(dict.fromkeys(kinds))}; compact needs a run with "
        "scene.kind gaussians (e.g. --config gaussians), or a .ply, .splat, .spz or .glb of splats"
    )


def _line(made: Compacted, config: CompactConfig) -> str:
    text = (
        f"{made.bytes_before / 1000:.1f} kB -> {len(made.data) / 1000:.1f} kB, {made.ratio:.1f}x smaller; "
        f"{made.gaussians_before} -> {made.gaussians_after} Gaussians; PSNR {made.psnr_before_db:.2f} -> "
        f"{made.psnr_after_db:.2f} dB ({made.loss_db:+.2f} dB lost) over {config.held_out} held-out views, "
        f"{made.agreement_db:.1f} dB like the original"
    )
    if not made.within:
        text += (
            f"; quantisation alone breaks --max-loss {config.max_loss_db:g} or --like {config.like_db:g}, so nothing "
            "was pruned"
        )
    elif config.ratio is not None and made.ratio < config.ratio:
        text += f"; --ratio {config.ratio:g} cannot be reached within --max-loss and --like"
    return text
