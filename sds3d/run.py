"""A run from job to asset: folder, loop, checkpoints, export. Public: `generate`, `resume` and `export`.

A run folder is complete at every moment: files are replaced whole, the manifest says how far the run came,
and what was there before a failure stays.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d import checkpoint
from sds3d.asset import AssetReport, make_asset
from sds3d.cameras.orbit import orbit_cameras
from sds3d.config.dump import dump
from sds3d.config.tree import Table
from sds3d.economy import Economy, NoRoomError
from sds3d.errors import CollapseError, ExportError, InputError, Sds3dError
from sds3d.events.bus import (
    CheckpointSaved,
    Emit,
    Event,
    Finished,
    PhaseStarted,
    StepDone,
    Warned,
    to_all,
)
from sds3d.events.log import MetricsLog, Tally
from sds3d.events.preview import Preview
from sds3d.events.turntable import write_contact_sheet, write_turntable
from sds3d.interfaces import Scene, Shading
from sds3d.job import JobConfig, pick_device
from sds3d.mesh.files import load_mesh
from sds3d.mesh.splat_cloud import GaussianCloud
from sds3d.mesh.splat_files import SPLAT_ENCODERS
from sds3d.mesh.textured import render_textured
from sds3d.ops.threads import one_thread_per_call
from sds3d.optimize import Loop, build_loop
from sds3d.parallel import Team, joined
from sds3d.paths import claim_folder, claim_run_folder, write_atomic
from sds3d.plan import lighter, make_plan
from sds3d.priors.hub import files_of
from sds3d.rng import Stream
from sds3d.run_folder import (
    edited_scene,
    last_checkpoint,
    new_manifest,
    open_run,
    reexported,
    restored_scene,
    started_scene,
)
from sds3d.scenes import GaussianScene, particles_of

SLOW_STEP_S = 0.5  # steps slower than this are all reported, faster ones every few steps
_COLORED = ("glb", "gltf", "obj", "ply")  # formats whose file can be shown on the contact sheet


class Stop:
    """A request to end a run after the current step; `signal` is what the exit code is made of."""

    def __init__(self) -> None:
        self.asked = False
        self.signal: int | None = None

    def ask(self, signal: int | None = None) -> None:
        """Ask; may be called from a signal handler or another thread."""
        self.asked, self.signal = True, signal


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended."""

    status: str  # "done" or "interrupted"; a failed run raises
    folder: Path
    files: Mapping[str, Path]
    steps_done: int
    seconds: float
    warnings: tuple[str, ...] = ()
    signal: int | None = None


@dataclass
class _Run:
    """The state of one run in progress; `manifest` mirrors manifest.json.

    Of several processes the leading one alone writes and is listened to.
    """

    job: JobConfig
    folder: Path
    stop: Stop
    manifest: dict[str, Any]
    listeners: list[Emit] = field(default_factory=list)
    team: Team = field(default_factory=Team)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.earlier_s = float(self.manifest.get("seconds", 0.0))
        self.tally = Tally(lambda message: self.emit(Warned(message=message)))
        self.tally.warnings += self.manifest.get("warnings", [])
        if not self.team.leads:
            self.listeners.clear()

    def emit(self, event: Event) -> None:
        to_all([self.tally, *self.listeners])(event)

    def note(self, **facts: Any) -> None:
        """Update manifest.json."""
        self.manifest |= facts
        self.manifest["warnings"] = self.tally.warnings
        self.manifest["nonfinite_steps"] = self.tally.nonfinite
        self.manifest["collapse"] = self.tally.collapse
        self.manifest["seconds"] = round(self.seconds(), 3)
        if not self.team.leads:
            return
        text = json.dumps(self.manifest, indent=2, ensure_ascii=False, default=str)
        write_atomic(self.folder / "manifest.json", text.encode("utf-8", "backslashreplace"))

    def seconds(self) -> float:
        return self.earlier_s + time.monotonic() - self.started


def generate(
    job: JobConfig,
    out: Path | None = None,
    *,
    config_name: str = "default",
    listeners: Sequence[Emit] = (),
    stop: Stop | None = None,
) -> RunResult:
    """Make an asset in a new folder.

    Raises:
        Sds3dError: with a message for the user. If the run cannot be built, nothing is left on disk; once it
            takes steps, the folder holds a checkpoint and can be resumed.
    """
    job.validate()
    device = pick_device(job.device)
    with joined(device) as team, one_thread_per_call(device):
        team.check(job.camera.batch, job.camera.views_per_object)
        folder = out or Path()
        if team.leads:
            folder = claim_folder(out) if out is not None else claim_run_folder(config_name, job.text())
        run = _Run(job, folder, stop or Stop(), new_manifest(job, config_name), list(listeners), team)
        try:
            run.note(status="running")
            if team.leads:
                write_atomic(folder / "config.yaml", dump(job).encode("utf-8"))
            loop = _build(run, started_scene(job, folder))
        except BaseException:
            if team.leads:
                _withdraw(folder)
            raise
        return _drive(run, loop)


def _withdraw(folder: Path) -> None:
    """Remove a run folder in which no step was done: only the files that `generate` wrote itself."""
    with suppress(OSError):
        for name in ("config.yaml", "manifest.json"):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def resume(folder: Path, *, listeners: Sequence[Emit] = (), stop: Stop | None = None) -> RunResult:
    """Continue a run from its last checkpoint, or from step 0 where there is none; then export.

    A finished run is returned as it is. Raises CheckpointError for a damaged or foreign checkpoint.
    """
    job, manifest = open_run(folder)
    if manifest.get("status") == "done":
        files = {name: folder / file for name, file in manifest.get("files", {}).items()}
        done = int(manifest.get("steps_done", job.steps))
        return RunResult(
            status="done",
            folder=folder,
            files=files,
            steps_done=done,
            seconds=float(manifest.get("seconds", 0)),
        )
    job.validate()
    saved = last_checkpoint(folder, job)
    device = pick_device(job.device)
    with joined(device) as team, one_thread_per_call(device):
        team.check(job.camera.batch, job.camera.views_per_object)
        run = _Run(job, folder, stop or Stop(), manifest, list(listeners), team)
        loop = _build(run, started_scene(job, folder) if saved is None else None)
        if saved is not None:
            loop.load_state_dict(saved.tensors)
        run.note(status="running", error=None)
        return _drive(run, loop)


def export(
    folder: Path,
    formats: Sequence[str] = (),
    *,
    layers: Sequence[Table] = (),
    listeners: Sequence[Emit] = (),
) -> RunResult:
    """Write the asset of a run's last checkpoint again, in other formats if given; loads no prior.

    `layers` may change `export.*` settings, e.g. from `override_layers(["export.max_faces=20000"])`.
    """
    job, manifest = open_run(folder)
    if layers:
        job = reexported(folder, job, layers)
    saved = last_checkpoint(folder, job)
    if saved is None:
        raise InputError(f"{folder}: holds no checkpoint to export; run: sds3d resume {folder}")
    if formats:
        job = replace(job, export=replace(job.export, formats=tuple(formats)))
    run = _Run(job, folder, Stop(), manifest, list(listeners))
    scene = restored_scene(job, saved)
    device = pick_device(job.device)
    with one_thread_per_call(device):
        files = _export(run, scene.to(device), saved.step)
    run.emit(Finished(status="done", folder=folder, files=files, seconds=run.seconds()))
    return RunResult(status="done", folder=folder, files=files, steps_done=saved.step, seconds=run.seconds())


def _build(run: _Run, start: Scene | None) -> Loop:
    run.emit(PhaseStarted(name="loading"))
    device = pick_device(run.job.device)
    plan = make_plan(run.job, device, run.team.size)
    if plan.saves:
        run.emit(Warned(message=plan.line))
    loop = build_loop(plan.job, device, edited_scene(run.job), start)
    # A run that once was short of memory stays as frugal when it is resumed.
    before = Economy.of(run.manifest.get("memory", {}).get("economy", {}))
    loop.team, loop.economy = run.team, plan.economy.both(before)
    if run.team.size > 1:
        loop.economy = replace(
            loop.economy, micro_batch=run.team.least(loop.economy.micro_batch or run.job.camera.batch)
        )
    run.manifest["memory"] = plan.facts() | {"economy": loop.economy.as_dict()}
    run.manifest["device"] = str(device)
    run.manifest["prior_files"] = files_of(run.job.prior)
    for message in loop.parts.prior.warnings([run.job.text(), run.job.negative_prompt]):
        run.emit(Warned(message=message))
    return loop


def _drive(run: _Run, loop: Loop) -> RunResult:
    """Optimise, checkpoint, export; on failure say so in the manifest and raise."""
    try:
        _optimise(run, loop)
        run.team.part()
        status = "interrupted" if loop.index < run.job.steps else "done"
        files: dict[str, Path] = {}
        if run.team.leads:
            whole = status == "done"
            files = _export(run, loop.parts.scene, loop.index) if whole else _export_or_warn(run, loop)
        run.note(status=status, steps_done=loop.index)
    except Exception as error:
        with suppress(Sds3dError):
            run.note(status="failed", steps_done=loop.index, error=str(error))
        run.emit(Finished(status="failed", folder=run.folder, seconds=run.seconds()))
        raise
    except KeyboardInterrupt:
        with suppress(Sds3dError):
            run.note(status="interrupted", steps_done=loop.index)
        raise
    run.emit(Finished(status=status, folder=run.folder, files=files, seconds=run.seconds()))
    return RunResult(
        status=status,
        folder=run.folder,
        files=files,
        steps_done=loop.index,
        seconds=run.seconds(),
        warnings=tuple(run.tally.warnings),
        signal=run.stop.signal if status == "interrupted" else None,
    )


def _optimise(run: _Run, loop: Loop) -> None:
    job = run.job
    run.emit(PhaseStarted(name="optimising"))
    if run.team.leads:
        run.listeners.append(MetricsLog(run.folder / "metrics.jsonl", after_step=loop.index))
    preview = Preview(
        run.folder / "preview.png",
        loop.preview,
        run.emit,
        every_s=job.preview.every_s,
        size_px=job.preview.size_px,
    )
    emit = _timed(run.emit, loop)
    saved = -1
    try:
        while loop.index < job.steps and not run.team.any(run.stop.asked):
            before, economy = time.monotonic(), loop.economy
            loop.run(loop.index + 1, emit)
            loop.log_every = 1 if run.team.any(time.monotonic() - before > SLOW_STEP_S) else 10
            if loop.economy != economy:
                run.note(memory=run.manifest["memory"] | {"economy": loop.economy.as_dict()})
            if run.team.leads:
                preview.refresh(loop.index, last=loop.index == job.steps)
            if loop.index % job.checkpoint.every_steps == 0:
                saved = _save(run, loop)
            if run.tally.collapse and job.on_collapse == "stop":
                raise CollapseError(run.tally.collapse)
    except Sds3dError as error:  # between two whole steps; any other error may leave half a step behind
        with suppress(Sds3dError):
            _save(run, loop)
        if isinstance(error, NoRoomError):
            raise NoRoomError(f"{error}; {lighter(job, pick_device(job.device))}") from error
        raise
    if loop.index not in (saved, 0):
        _save(run, loop)


def _timed(emit: Emit, loop: Loop) -> Emit:
    """Fills in the seconds per step since the event before."""
    last = {"time": time.monotonic(), "step": float(loop.index)}

    def stamped(event: Event) -> None:
        if isinstance(event, StepDone):
            now, taken = time.monotonic(), max(event.step - last["step"], 1.0)
            event = replace(event, seconds=(now - last["time"]) / taken)
            last.update(time=now, step=float(event.step))
        emit(event)

    return stamped


def _save(run: _Run, loop: Loop) -> int:
    if not run.team.leads:
        return loop.index
    folder = run.folder / "checkpoints"
    folder.mkdir(exist_ok=True)
    state = checkpoint.Checkpoint(step=loop.index, config_hash=run.job.hash(), tensors=loop.state_dict())
    path = checkpoint.save(folder, state)
    checkpoint.prune(folder, run.job.checkpoint.keep)
    run.emit(CheckpointSaved(path=path, step=loop.index))
    run.note(steps_done=loop.index)
    return loop.index


def _export_or_warn(run: _Run, loop: Loop) -> dict[str, Path]:
    """Export what there is of an interrupted run; too early for a surface is no failure."""
    if loop.index == 0:
        return {}
    try:
        return _export(run, loop.parts.scene, loop.index)
    except ExportError as error:
        run.emit(Warned(message=f"no asset yet: {error}; sds3d resume {run.folder} continues the run"))
        return {}


def _export(run: _Run, scene: Scene, step: int) -> dict[str, Path]:
    job, folder = run.job, run.folder
    run.emit(PhaseStarted(name="exporting"))
    scene.eval()  # renders for videos and comparison without sampling jitter
    facts = {"prompt": job.text(), "seed": job.seed, "config_hash": job.hash(), "steps": step}
    report = make_asset(scene, folder, job.export, facts)
    files = dict(report.files)
    for index, particle in enumerate(particles_of(scene)):
        name = f"particle_{index}"
        if index > 0:
            made = make_asset(particle, folder / name, job.export, facts | {"particle": index})
            files |= {f"{name}_{kind}": path for kind, path in made.files.items()}
        if isinstance(particle, GaussianScene):
            cloud, label = _cloud(particle), "splats" if index == 0 else f"{name}_splats"
            for kind in job.export.splat_formats:
                path = folder / (name if index else "") / f"splats.{kind}"
                files[f"{label}_{kind}"] = path
                write_atomic(path, SPLAT_ENCODERS[kind](cloud))
    size, frames = job.preview.turntable_px, job.preview.turntable_frames
    if frames:
        path = files["turntable"] = folder / "turntable.mp4"
        write_turntable(path, (view for view in _scene_views(scene, size, frames)), size_px=size)
    sheet = _mesh_views(report, size)
    if sheet is not None:
        files["contact_sheet"] = folder / "contact_sheet.png"
        write_contact_sheet(files["contact_sheet"], sheet)
    details = report.as_dict()
    names = {name: path.relative_to(folder).as_posix() for name, path in files.items()}
    run.note(files=run.manifest.get("files", {}) | names, mesh=details["mesh"], fidelity=details["fidelity"])
    return files


@torch.no_grad()
def _cloud(scene: GaussianScene) -> GaussianCloud:
    return GaussianCloud(
        means=scene.means.detach().cpu(),
        quats_wxyz=scene.quats.detach().cpu(),
        scales=scene.scales.detach().cpu(),
        opacity=scene.opacity.detach().cpu(),
        color=scene.color.detach().cpu(),
    )


@torch.no_grad()
def _scene_views(scene: Scene, size_px: int, count: int) -> Iterator[Tensor]:
    """`count` views around the scene on white, rendered a few at a time to bound memory."""
    device = next(scene.parameters()).device
    for azimuths in torch.arange(count).mul(360.0 / count).split(4):
        level = torch.ones(len(azimuths))
        cameras = orbit_cameras(azimuths, 15.0 * level, 3.3 * level, 40.0 * level, size_px).to(device)
        white = Shading(background=torch.ones(len(azimuths), 3, device=device))
        yield from scene.render(cameras, white, Stream(0, "turntable")).rgb.cpu()


def _mesh_views(report: AssetReport, size_px: int) -> Float[Tensor, "9 3 H W"] | None:
    """The exported file itself from eight sides and the top; None if no written format holds colours."""
    written = [name for name in _COLORED if name in report.files]
    if not written:
        return None
    mesh = load_mesh(report.files[written[0]])
    azimuths = torch.cat([torch.arange(8) * 45.0, torch.zeros(1)])
    elevations = torch.tensor([15.0] * 8 + [80.0])
    level = torch.ones(9)
    cameras = orbit_cameras(azimuths, elevations, 3.3 * level, 40.0 * level, size_px)
    return render_textured(mesh, cameras, torch.ones(9, 3))[0]
