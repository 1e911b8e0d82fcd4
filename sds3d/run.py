"""A run from job to asset: folder, loop, checkpoints, export. Public: `generate`, `resume` and `export`.

A run folder is complete at every moment: files are replaced whole, the manifest says how far the run came,
and what was there before a failure stays.
"""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

from sds3d import checkpoint
from sds3d.config.dump import dump
from sds3d.config.tree import Table
from sds3d.economy import Economy, NoRoomError
from sds3d.errors import CollapseError, InputError, NonFiniteError, Sds3dError
from sds3d.events.bus import (
    CheckpointSaved,
    Emit,
    Event,
    Finished,
    PhaseStarted,
    StepDone,
    Warned,
)
from sds3d.events.log import MetricsLog
from sds3d.events.preview import Preview
from sds3d.exporting import export_or_warn, export_scene
from sds3d.given import START_FILE
from sds3d.health import examine, verdict
from sds3d.interfaces import Scene
from sds3d.job import JobConfig, pick_device
from sds3d.ops.threads import one_thread_per_call
from sds3d.optimize import Loop, build_loop
from sds3d.parallel import joined
from sds3d.paths import LOCK_NAME, claim_folder, claim_run_folder, locked, write_atomic
from sds3d.plan import lighter, make_plan
from sds3d.priors.hub import files_of
from sds3d.run_folder import (
    edited_scene,
    keep_start,
    last_checkpoint,
    new_manifest,
    open_run,
    reexported,
    restored_scene,
    set_aside,
    started_scene,
)
from sds3d.session import RunResult, Session, Stop

__all__ = ["RunResult", "Stop", "export", "generate", "resume"]

FEWEST_STEPS = 50  # shorter runs show nothing that could be judged
SLOW_STEP_S = 0.5  # steps slower than this are all reported, faster ones every few steps


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
        run = Session(job, folder, stop or Stop(), new_manifest(job, config_name), list(listeners), team)
        with _alone(run):
            try:
                run.note(status="running")
                if team.leads:
                    run.job = job = keep_start(job, folder, run.warn)
                    run.note(config_hash=job.hash())
                    write_atomic(folder / "config.yaml", dump(job).encode("utf-8"))
                loop = _build(run, started_scene(job, folder))
            except BaseException:
                if team.leads:
                    _withdraw(folder)
                raise
            return _drive(run, loop)


def _alone(run: Session) -> AbstractContextManager[None]:
    """No other process may work in the run's folder; of several that do so together the leading one asks."""
    return locked(run.folder) if run.team.leads else nullcontext()


def _withdraw(folder: Path) -> None:
    """Remove a run folder in which no step was done: only the files that `generate` wrote itself."""
    with suppress(OSError):
        for name in ("config.yaml", "manifest.json", START_FILE, LOCK_NAME):
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
    device = pick_device(job.device)
    with joined(device) as team, one_thread_per_call(device):
        team.check(job.camera.batch, job.camera.views_per_object)
        run = Session(job, folder, stop or Stop(), manifest, list(listeners), team)
        with _alone(run):
            saved = last_checkpoint(folder, job, run.warn)
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
    run = Session(job, folder, Stop(), manifest, list(listeners))
    saved = last_checkpoint(folder, job, run.warn)
    if saved is None:
        raise InputError(f"{folder}: holds no checkpoint to export; run: sds3d resume {folder}")
    if formats:
        run.job = job = replace(job, export=replace(job.export, formats=tuple(formats)))
    scene = restored_scene(job, saved)
    device = pick_device(job.device)
    with _alone(run), one_thread_per_call(device):
        files = export_scene(run, scene.to(device), saved.step)
    run.emit(Finished(status="done", folder=folder, files=files, seconds=run.seconds()))
    return RunResult(status="done", folder=folder, files=files, steps_done=saved.step, seconds=run.seconds())


def _build(run: Session, start: Scene | None) -> Loop:
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


def _drive(run: Session, loop: Loop) -> RunResult:
    """Optimise, checkpoint, export; on failure say so in the manifest and raise."""
    try:
        loop = _optimise_or_reseed(run, loop)
        run.team.part()
        status = "interrupted" if loop.index < run.job.steps else "done"
        files: dict[str, Path] = {}
        if run.team.leads:
            whole = status == "done"
            files = (
                export_scene(run, loop.parts.scene, loop.index)
                if whole
                else export_or_warn(run, loop.parts.scene, loop.index)
            )
        run.note(status=status, steps_done=loop.index, verdict=verdict(run.faults))
    except Exception as error:
        with suppress(Sds3dError):
            # What is there after steps that were not finite is the last good state: worth a file.
            if isinstance(error, NonFiniteError) and run.team.leads:
                export_or_warn(run, loop.parts.scene, loop.index)
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


def _optimise_or_reseed(run: Session, loop: Loop) -> Loop:
    """The loop that came through; what collapsed before it is kept in the folder `attempts`."""
    while True:
        try:
            _optimise(run, loop)
            return loop
        except CollapseError as error:
            tried = list(run.manifest.get("attempts", []))
            if run.job.on_collapse != "reseed" or len(tried) >= run.job.max_reseeds:
                raise
            fact = {"seed": run.job.seed, "steps_done": loop.index, "collapse": str(error)}
        seed = run.job.seed + 1
        run.warn(
            f"seed {fact['seed']} collapsed after {loop.index} steps ({fact['collapse']}); trying seed {seed}"
        )
        if run.team.leads:
            set_aside(run.folder, f"seed-{fact['seed']}")
        run.begin_again(replace(run.job, seed=seed), attempts=[*tried, fact])
        loop = _build(run, started_scene(run.job, run.folder))


def _look(run: Session, loop: Loop) -> None:
    """Say what is wrong with the scene, if anything; raise CollapseError where that ends the run.

    Views are examined half-way, at three quarters and at the end; emptiness shows in every step.
    """
    steps, faults = run.job.steps, [run.tally.collapse] if run.tally.collapse else []
    if loop.index in (steps // 2, steps * 3 // 4, steps) and steps >= FEWEST_STEPS:
        signs = examine(loop)
        run.manifest["health"] = signs.as_dict()
        run.faults = signs.faults()
        for fault in run.faults:
            run.warn(f"after {loop.index} of {steps} steps the scene is {fault}")
        faults += run.faults
    if faults and run.job.on_collapse != "report":
        raise CollapseError(verdict(faults))


def _optimise(run: Session, loop: Loop) -> None:
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
        views=job.preview.views,
        turn_deg=job.preview.turn_deg,
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
            _look(run, loop)
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


def _save(run: Session, loop: Loop) -> int:
    if not run.team.leads:
        return loop.index
    folder = run.folder / "checkpoints"
    folder.mkdir(exist_ok=True)
    tensors = loop.state_dict()
    loop.recovery.remember(tensors)
    state = checkpoint.Checkpoint(step=loop.index, config_hash=run.job.hash(), tensors=tensors)
    path = checkpoint.save(folder, state)
    checkpoint.prune(folder, run.job.checkpoint.keep)
    run.emit(CheckpointSaved(path=path, step=loop.index))
    run.note(steps_done=loop.index)
    return loop.index
