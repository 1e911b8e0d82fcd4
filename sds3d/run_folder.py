"""What stands in a run folder: manifest, config and checkpoints, and how a scene comes back from them."""

import json
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sds3d import __version__, checkpoint
from sds3d.config.load import file_layers, resolve
from sds3d.config.tree import Table
from sds3d.convert import converted
from sds3d.errors import CheckpointError, ConfigError, InputError
from sds3d.given import START_FILE, encode_given, read_given, scene_from
from sds3d.interfaces import Scene
from sds3d.job import JobConfig
from sds3d.paths import write_atomic
from sds3d.rng import Streams
from sds3d.scenes import MeshScene, build_scene, particles_of


def open_run(folder: Path) -> tuple[JobConfig, dict[str, Any]]:
    """Job and manifest of a run folder; raises InputError where it is not one."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError("not a mapping")
    except OSError as error:
        raise InputError(
            f"{folder}: not a run folder (no readable manifest.json: {error.strerror})"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); delete it and start the run again") from error
    return resolve(JobConfig, file_layers(folder / "config.yaml")).config, manifest


def reexported(folder: Path, job: JobConfig, layers: Sequence[Table]) -> JobConfig:
    """The job of a run folder with other export settings; ConfigError where `layers` change anything else."""
    changed = resolve(JobConfig, [*file_layers(folder / "config.yaml"), *layers]).config
    if replace(changed, export=job.export) != job:
        raise ConfigError(
            "export: only settings that begin with export. can change after a run, e.g. "
            "export.max_faces=20000; start another run for others"
        )
    return changed


def last_checkpoint(
    folder: Path, job: JobConfig, warn: Callable[[str], None] = lambda message: None
) -> checkpoint.Checkpoint | None:
    """The newest whole checkpoint of a run folder, if there is any; `warn` is told about damaged ones after it.

    Raises:
        CheckpointError: it belongs to other settings, or all checkpoints are damaged.
    """
    paths = checkpoint.listed(folder / "checkpoints")
    damage: CheckpointError | None = None
    for path in reversed(paths):
        try:
            saved = checkpoint.load(path)
        except CheckpointError as error:
            damage = damage or error
            continue
        if saved.config_hash != job.hash():
            raise CheckpointError(
                f"{path}: belongs to other settings than {folder / 'config.yaml'}; undo changes to that file"
            )
        if damage is not None:
            warn(f"{damage.args[0].partition('. ')[0]}; going on from step {saved.step} ({path.name})")
        return saved
    if damage is not None:
        raise damage
    return None


def set_aside(folder: Path, name: str) -> Path:
    """Move checkpoints and metrics of an attempt that failed to `attempts/NAME`, where nothing is overwritten."""
    goal, count = folder / "attempts" / name, 1
    while goal.exists():
        count += 1
        goal = folder / "attempts" / f"{name}-{count}"
    goal.mkdir(parents=True)
    for part in ("checkpoints", "metrics.jsonl", "preview.png"):
        if (folder / part).exists():
            (folder / part).rename(goal / part)
    return goal


def restored_scene(job: JobConfig, saved: checkpoint.Checkpoint) -> Scene:
    """The scene of a checkpoint, on the CPU; CheckpointError where it does not fit the job."""
    scene = build_scene(job.scene.kind, job.scene.config, Streams(job.seed).stream("init"), job.particles)
    prefix = "scene."
    state = {name.removeprefix(prefix): t for name, t in saved.tensors.items() if name.startswith(prefix)}
    try:
        scene.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint does not fit this run's config.yaml: {error}") from error
    return scene


def edited_scene(job: JobConfig) -> Scene | None:
    """The scene of the run that is edited, if any; its settings must be those of this run."""
    if job.edit.run is None:
        return None
    folder = Path(job.edit.run)
    before, _ = open_run(folder)
    if before.scene != job.scene:
        raise ConfigError(
            f"edit.run: {folder} holds a {before.scene.kind!r} scene with other settings than this run's scene; "
            "use the same config, or copy its scene settings"
        )
    saved = last_checkpoint(folder, before)
    if saved is None:
        raise InputError(f"edit.run: {folder} holds no checkpoint; finish that run first")
    return restored_scene(before, saved)


def started_scene(job: JobConfig, folder: Path) -> Scene | None:
    """The scene that a run in `folder` starts from, if any, turned into the job's kind."""
    if job.start.mesh is not None:
        return _scene_of_file(job, folder)
    if job.start.run is None:
        return None
    inside = folder / job.start.run
    before_folder = inside if inside.is_dir() else Path(job.start.run)
    before, _ = open_run(before_folder)
    saved = last_checkpoint(before_folder, before)
    if saved is None:
        raise InputError(f"start.run: {before_folder} holds no checkpoint; finish that run first")
    return converted(
        particles_of(restored_scene(before, saved))[0],
        job.scene.kind,
        job.scene.config,
        Streams(job.seed).stream("init"),
        job.start,
    )


def _scene_of_file(job: JobConfig, folder: Path) -> Scene:
    """The scene of `start.mesh`, turned into the job's kind."""
    start, rng = job.start, Streams(job.seed).stream("init")
    path = _given_path(job, folder)
    mesh, _ = read_given(path, max_faces=start.mesh_faces, keep_uvs=start.keep_uvs)
    config = job.scene.config if job.scene.kind == "mesh" else MeshScene.Config()
    scene = scene_from(mesh, config, rng, up=start.up, front_deg=start.front_deg, reach_m=start.reach_m)
    if job.scene.kind == "mesh":
        return scene
    return converted(scene, job.scene.kind, job.scene.config, rng.fork("convert"), start)


def _given_path(job: JobConfig, folder: Path) -> Path:
    named = Path(job.start.mesh or "")
    return folder / named if (folder / named).is_file() else named


def keep_start(job: JobConfig, folder: Path, warn: Callable[[str], None]) -> JobConfig:
    """Copy the mesh file that a new run starts from into its folder; the job that names the copy.

    `warn` is told if the mesh had to be simplified. Raises InputError where the file is no use.
    """
    if job.start.mesh is None:
        return job
    start = job.start
    path = Path(start.mesh or "")
    mesh, note = read_given(path, max_faces=start.mesh_faces, keep_uvs=start.keep_uvs)
    if note is not None:
        warn(note)
    write_atomic(folder / START_FILE, encode_given(mesh))
    return replace(job, start=replace(start, mesh=START_FILE))


def new_manifest(job: JobConfig, config_name: str) -> dict[str, Any]:
    """The manifest of a run that is about to start."""
    return {
        "schema": 1,
        "status": "running",
        "prompt": job.text(),
        "negative_prompt": job.negative_prompt,
        "seed": job.seed,
        "config": config_name,
        "config_hash": job.hash(),
        "prior": job.prior.name,
        "scene": job.scene.kind,
        "guidance": job.guidance.kind,
        "steps": job.steps,
        "steps_done": 0,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": versions(),
        "files": {},
    }


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    found = {"sds3d": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in ("torch", "numpy", "numba", "diffusers", "transformers", "trimesh", "gsplat", "nerfacc"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
