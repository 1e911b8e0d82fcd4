"""Runs on disk, whoever made them: listed, searched, opened and deleted below one root."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sds3d.errors import InputError
from sds3d.ui.roots import Root

DEPTH = 4  # folders between the root and a run
SIDECARS = {"obj": (".obj", ".mtl", ".png"), "gltf": (".gltf", ".bin", ".png")}  # formats of several files
# What may be shown of a run besides the files that its manifest lists.
SHOWN = {
    "preview": "preview.png",
    "config": "config.yaml",
    "metrics": "metrics.jsonl",
    "manifest": "manifest.json",
}


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What the manifest of a run says."""

    id: str
    folder: Path
    status: str  # running, done, interrupted or failed
    prompt: str = ""
    negative_prompt: str = ""
    config: str = "default"
    seed: int = 0
    steps: int = 0
    steps_done: int = 0
    started: str = ""
    seconds: float = 0.0
    error: str | None = None
    warnings: tuple[str, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict)  # those that exist, by format
    mesh: Mapping[str, Any] = field(default_factory=dict)
    fidelity: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)  # the whole manifest
    stage: Path | None = None  # of a staged run: the folder of the stage that was begun last

    @property
    def current(self) -> Path:
        """The folder whose preview, metrics and checkpoints are the newest."""
        return self.stage or self.folder

    @property
    def resumable(self) -> bool:
        """Whether there is something left to do."""
        return self.status != "done"


class RunStore:
    """All run folders below a root."""

    def __init__(self, root: Root) -> None:
        self.root = root

    def record(self, run_id: str) -> RunRecord:
        """One run; raises InputError where there is none of this id."""
        folder = self.root.run(run_id)
        facts = _read_json(folder / "manifest.json")
        if facts is None:
            raise InputError(f"no such run: {run_id[:100]!r}")
        return self._record(folder, facts)

    def runs(self, search: str = "", limit: int = 200) -> list[RunRecord]:
        """Runs whose prompt, name, status or settings hold every word of `search`, the newest first."""
        words = search.lower().split()
        found = []
        for folder in self._folders():
            facts = _read_json(folder / "manifest.json")
            if facts is None:
                continue
            record = self._record(folder, facts)
            text = " ".join(
                [record.id, record.prompt, record.status, record.config]
                + [str(facts.get(name, "")) for name in ("guidance", "scene", "prior")]
            ).lower()
            if all(word in text for word in words):
                found.append(record)
        found.sort(key=lambda record: record.started, reverse=True)
        return found[:limit]

    def delete(self, run_id: str) -> None:
        """Remove a run folder with all it holds; raises InputError where it is none or cannot be removed."""
        folder = self.record(run_id).folder
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise InputError(f"{run_id}: cannot be deleted: {error.strerror or error}") from error
        with suppress(OSError):
            if folder.parent != self.root.path:
                folder.parent.rmdir()  # only where it is empty

    def file(self, run_id: str, name: str) -> Path:
        """A file of a run by its name in the manifest, or one of SHOWN; raises InputError where there is none."""
        record = self.record(run_id)
        if name in SHOWN:
            path = (record.folder if name == "manifest" else record.current) / SHOWN[name]
        elif name in record.files:
            path = record.files[name]
        else:
            raise InputError(f"{run_id}: holds no file {name[:40]!r}")
        if not path.is_file() or not self.root.holds(path):
            raise InputError(f"{run_id}: holds no file {name[:40]!r}")
        return path

    def companions(self, run_id: str, name: str) -> list[Path]:
        """All files that belong to one format: one, or for obj and gltf those beside it."""
        path = self.file(run_id, name)
        suffixes = SIDECARS.get(name)
        if suffixes is None:
            return [path]
        beside = sorted(path.parent.iterdir())
        own = [other for other in beside if other.stem.startswith(path.stem) and other.suffix in suffixes]
        return [other for other in own if self.root.holds(other)]

    def metrics(self, run_id: str, limit: int = 300) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl, thinned out to about `limit`."""
        path = self.record(run_id).current / "metrics.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return []
        stride = max(1, len(lines) // limit)
        kept = lines[::stride] + (lines[-1:] if (len(lines) - 1) % stride else [])
        rows = [_json_or_none(line) for line in kept]
        return [row for row in rows if isinstance(row, dict)]

    def _folders(self) -> Iterator[Path]:
        """Run folders: a folder with a manifest is one, and nothing inside it is."""
        start = len(self.root.path.parts)
        for name, folders, files in os.walk(self.root.path):
            here = Path(name)
            if "manifest.json" in files and here != self.root.path:
                yield here
                folders.clear()
            elif len(here.parts) - start >= DEPTH:
                folders.clear()
            folders[:] = [child for child in folders if not child.startswith(".")]

    def _record(self, folder: Path, facts: Mapping[str, Any]) -> RunRecord:
        stage, inner = self._stage(folder, facts)
        said = {**inner, **facts}
        listed = facts.get("files")
        files = {
            str(name): folder / str(path)
            for name, path in (listed.items() if isinstance(listed, dict) else ())
        }
        return RunRecord(
            id=self.root.id_of(folder),
            folder=folder,
            status=str(facts.get("status", "failed")),
            prompt=str(facts.get("prompt", "")),
            negative_prompt=str(said.get("negative_prompt", "")),
            config=str(facts.get("config", "default")),
            seed=_whole(facts.get("seed")),
            steps=_whole(said.get("steps")),
            steps_done=_whole((inner or facts).get("steps_done")),
            started=str(said.get("started", "")),
            seconds=float(_number(facts.get("seconds"))),
            error=None if facts.get("error") is None else str(facts["error"]),
            warnings=tuple(map(str, said.get("warnings") or ())),
            files={name: path for name, path in files.items() if self.root.holds(path) and path.is_file()},
            mesh=said.get("mesh") or {},
            fidelity=said.get("fidelity") or {},
            facts=facts,
            stage=stage,
        )

    def _stage(self, folder: Path, facts: Mapping[str, Any]) -> tuple[Path | None, dict[str, Any]]:
        """(folder, manifest) of the last stage that was begun; (None, {}) for a run without stages."""
        stages = facts.get("stages")
        for entry in reversed(stages if isinstance(stages, list) else []):
            place = folder / str(entry.get("folder", "") if isinstance(entry, dict) else "")
            inner = _read_json(place / "manifest.json") if self.root.holds(place) else None
            if inner is not None and place != folder:
                return place, inner
        return None, {}


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        if path.stat().st_size > 4_000_000:
            return None
        found = _json_or_none(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    return found if isinstance(found, dict) else None


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.0


def _whole(value: Any) -> int:
    return int(_number(value))
