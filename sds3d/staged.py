"""Runs in stages: coarse field, then geometry, then texture, each a run of its own inside one folder.

    stages:
      - {name: coarse, steps: 700}
      - {name: geometry, scene: {kind: tetmesh}, steps: 400}

Every entry holds settings on top of the config around it; a stage starts from the scene of the stage before it,
converted into its own kind. A stage is an ordinary run folder, so it is checkpointed and resumed as any run.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sds3d.config.dump import dump
from sds3d.config.load import Resolved, file_layers, find_config, resolve
from sds3d.config.tree import Items, Leaf, Node, Table, fail
from sds3d.errors import ConfigError, InputError, Sds3dError
from sds3d.events.bus import Emit, Event, Finished, PhaseStarted, to_all
from sds3d.job import JobConfig
from sds3d.paths import claim_folder, claim_run_folder, replacing, safe_slug, write_atomic
from sds3d.run import RunResult, Stop, export, generate, resume

KEY, KIND = "stages", "stages"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: its name and its whole job."""

    name: str
    resolved: Resolved[JobConfig]

    @property
    def job(self) -> JobConfig:
        """Its settings."""
        return self.resolved.config


def load_stages(config: str = "default", layers: Sequence[Table] = ()) -> list[Stage]:
    """The stages of a config with overrides on top; a config without `stages:` is a single one named "run".

    Overrides hold for all stages; `stages.NAME.key=value` for one.

    Raises:
        ConfigError: names twice, unknown names in overrides, or any fault of the settings themselves.
    """
    return stages_from(file_layers(find_config(config)), layers)


def stages_from(config: Sequence[Table], layers: Sequence[Table] = ()) -> list[Stage]:
    """As `load_stages`, from the layers of a config that was read before."""
    below, listed = _split(config)
    above, changes = _split(layers)
    tables = _named(listed[-1]) if listed else {}
    names = list(tables)
    for change in changes:
        if not isinstance(change, Table):
            fail(change.origin, KEY, "overrides name one stage: stages.NAME.key=value")
        for name in change.entries:
            if name not in tables:
                known = ", ".join(names) or "none: this config has no stages"
                fail(change.origin, f"{KEY}.{name}", f"no such stage; known: {known}")
    if not tables:
        return [Stage(name="run", resolved=resolve(JobConfig, [*below, *above]))]
    stages = []
    for name, table in tables.items():
        own = [
            change.entries[name] for change in changes if isinstance(change, Table) and name in change.entries
        ]
        extra = [node for node in own if isinstance(node, Table)]
        stages.append(Stage(name=name, resolved=resolve(JobConfig, [*below, table, *above, *extra])))
    return stages


def _split(layers: Sequence[Table]) -> tuple[list[Table], list[Node]]:
    """(layers without their `stages`, the stages in order)."""
    plain, found = [], []
    for layer in layers:
        entries = dict(layer.entries)
        if KEY in entries:
            found.append(entries.pop(KEY))
        plain.append(Table(entries, layer.origin, layer.key_origins))
    return plain, found


def _named(node: Node) -> dict[str, Table]:
    if not isinstance(node, Items) or not node.nodes:
        fail(node.origin, KEY, "expected a list of settings, e.g. - {name: geometry, steps: 300}")
    tables: dict[str, Table] = {}
    for item in node.nodes:
        entries = dict(item.entries) if isinstance(item, Table) else {}
        label = entries.pop("name", None)
        name = label.value if isinstance(label, Leaf) else None
        if not isinstance(item, Table) or not isinstance(name, str) or safe_slug(name) != name:
            fail(item.origin, KEY, "every stage needs a name of small letters, digits and dashes")
        if name in tables:
            fail(item.origin, KEY, f"two stages are named {name!r}")
        tables[name] = Table(entries, item.origin, item.key_origins)
    return tables


def generate_stages(
    stages: Sequence[Stage],
    out: Path | None = None,
    *,
    config_name: str = "default",
    listeners: Sequence[Emit] = (),
    stop: Stop | None = None,
) -> RunResult:
    """Run all stages in a new folder; a single stage is a plain run.

    Raises:
        Sds3dError: with a message for the user. What was done stays and can be resumed.
    """
    if len(stages) == 1:
        return generate(stages[0].job, out, config_name=config_name, listeners=listeners, stop=stop)
    jobs = checked_jobs(stages)
    folder = claim_folder(out) if out is not None else claim_run_folder(config_name, jobs[0].text())
    (folder / KEY).mkdir()
    entries = []
    for index, (stage, job) in enumerate(zip(stages, jobs, strict=True)):
        name = folder_name(index, stage.name)
        write_atomic(folder / KEY / f"{name}.yaml", dump(job).encode("utf-8"))
        entries.append({"name": stage.name, "folder": f"{KEY}/{name}", "status": "waiting"})
    manifest: dict[str, Any] = {
        "schema": 1,
        "kind": KIND,
        "status": "running",
        "prompt": jobs[0].text(),
        "seed": jobs[0].seed,
        "config": config_name,
        "stages": entries,
    }
    return _go_on(folder, manifest, listeners, stop or Stop())


def checked_jobs(stages: Sequence[Stage]) -> list[JobConfig]:
    """The jobs of all stages as they will run, each from the one before; raises what a run would refuse."""
    jobs = [
        stage.job if index == 0 else _after(stage.job, folder_name(index - 1, stages[index - 1].name))
        for index, stage in enumerate(stages)
    ]
    for stage, job in zip(stages, jobs, strict=True):
        try:
            job.validate()
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name}: {error}" if len(stages) > 1 else str(error)) from error
    return jobs


def folder_name(index: int, name: str) -> str:
    """The folder of a stage inside `stages/`."""
    return f"{index + 1}-{name}"


def _after(job: JobConfig, before: str) -> JobConfig:
    """The job of a stage that starts from its sibling folder `before`."""
    return replace(job, start=replace(job.start, run=f"../{before}", mesh=None))


def resume_any(folder: Path, *, listeners: Sequence[Emit] = (), stop: Stop | None = None) -> RunResult:
    """Continue a run, staged or not."""
    manifest = staged_manifest(folder)
    if manifest is None:
        return resume(folder, listeners=listeners, stop=stop)
    return _go_on(folder, manifest, listeners, stop or Stop())


def export_any(
    folder: Path,
    formats: Sequence[str] = (),
    *,
    layers: Sequence[Table] = (),
    listeners: Sequence[Emit] = (),
) -> RunResult:
    """Write the asset of a run again, staged or not: that of the last stage with a checkpoint."""
    manifest = staged_manifest(folder)
    if manifest is None:
        return export(folder, formats, layers=layers, listeners=listeners)
    begun = [entry for entry in manifest[KEY] if (folder / entry["folder"] / "checkpoints").is_dir()]
    if not begun:
        raise InputError(f"{folder}: holds no checkpoint to export; run: sds3d resume {folder}")
    result = export(folder / begun[-1]["folder"], formats, layers=layers, listeners=listeners)
    files = _copied(folder, result.files)
    listed = manifest.get("files", {}) | {name: path.name for name, path in files.items()}
    _note(folder, manifest, files=listed, **_facts(folder / begun[-1]["folder"]))
    return replace(result, folder=folder, files=files)


def staged_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a staged run; None for any other folder (`open_run` tells what is wrong with those)."""
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("kind") == KIND else None


def _go_on(folder: Path, manifest: dict[str, Any], listeners: Sequence[Emit], stop: Stop) -> RunResult:
    """All stages that are not done yet, in order."""
    entries = manifest[KEY]
    emit = to_all(list(listeners))
    results: list[RunResult] = []
    try:
        for index, entry in enumerate(entries):
            emit(PhaseStarted(name=f"stage {index + 1} of {len(entries)}: {entry['name']}"))
            entry["status"] = "running"
            _note(folder, manifest, status="running", error=None)
            results.append(_stage(folder / entry["folder"], manifest, listeners, stop))
            entry["status"] = results[-1].status
            files = _copied(folder, results[-1].files)
            manifest["files"] = {name: path.name for name, path in files.items()}
            if results[-1].status != "done":
                break
    except Exception as error:
        with suppress(Sds3dError):
            _note(folder, manifest, status="failed", error=str(error))
        raise
    last = results[-1]
    facts = _facts(folder / entries[len(results) - 1]["folder"])
    done = sum(result.steps_done for result in results)
    seconds = sum(result.seconds for result in results)
    _note(folder, manifest, status=last.status, steps_done=done, seconds=round(seconds, 3), **facts)
    files = {name: folder / file for name, file in manifest["files"].items()}
    emit(Finished(status=last.status, folder=folder, files=files, seconds=seconds))
    return replace(
        last,
        folder=folder,
        files=files,
        steps_done=done,
        seconds=seconds,
        warnings=tuple(warning for result in results for warning in result.warnings),
    )


def _facts(stage: Path) -> dict[str, Any]:
    """What the manifest of a stage says about its asset."""
    inner = json.loads((stage / "manifest.json").read_text(encoding="utf-8"))
    return {name: inner[name] for name in ("mesh", "fidelity") if name in inner}


def _stage(folder: Path, manifest: Mapping[str, Any], listeners: Sequence[Emit], stop: Stop) -> RunResult:
    """Begin a stage, or go on with it. Its end is not the end of the whole run, so listeners do not hear of it."""
    inner = [partial(_unless_finished, listener) for listener in listeners]
    if (folder / "manifest.json").is_file():
        return resume(folder, listeners=inner, stop=stop)
    job = resolve(JobConfig, file_layers(folder.with_suffix(".yaml"))).config
    return generate(job, folder, config_name=manifest["config"], listeners=inner, stop=stop)


def _unless_finished(listener: Emit, event: Event) -> None:
    if not isinstance(event, Finished):
        listener(event)


def _copied(folder: Path, files: Mapping[str, Path]) -> dict[str, Path]:
    """The files of a stage beside each other in the run's own folder, whole or not at all each."""
    copies = {}
    for name, path in files.items():
        copies[name] = folder / path.name
        with replacing(copies[name]) as temporary:
            shutil.copyfile(path, temporary)
    return copies


def _note(folder: Path, manifest: dict[str, Any], **facts: Any) -> None:
    manifest |= facts
    text = json.dumps(manifest, indent=2, ensure_ascii=False, default=str)
    write_atomic(folder / "manifest.json", text.encode("utf-8", "backslashreplace"))
