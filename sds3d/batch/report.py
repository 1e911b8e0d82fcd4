"""What came out of a batch: summary.json, summary.csv, links to the best candidates, and report.html."""

import csv
import io
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sds3d.batch.drive import Board
from sds3d.batch.html import page
from sds3d.batch.order import Job
from sds3d.batch.storage import JOBS, Storage
from sds3d.paths import write_atomic

BEST = "best"
SHOWN = ("contact_sheet.png", "preview.png", "turntable.mp4", "asset.glb", "manifest.json", "config.yaml")
_COLUMNS = (
    "id",
    "group",
    "best",
    "prompt",
    "seed",
    "config",
    "status",
    "score",
    "attempts",
    "steps",
    "seconds",
)
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write_report(out: Path, board: Board, storage: Storage, *, engine: str, wall_s: float) -> dict[str, Any]:
    """Write all of it into `out` and return what summary.json says."""
    rows = [_row(job, board, out, storage) for job in board.jobs]
    best = mark_best(rows)
    counts = {
        state: sum(row["status"] == state for row in rows) for state in ("done", "failed", "interrupted")
    }
    summary = {
        "schema": 1,
        "engine": engine,
        "jobs": len(rows),
        **counts,
        "waiting": len(rows) - sum(counts.values()),
        "wall_s": round(wall_s, 2),
        "best": best,
        "rows": rows,
    }
    write_atomic(out / "summary.json", json.dumps(summary, indent=1).encode())
    write_atomic(out / "summary.csv", as_csv(rows).encode())
    _link_best(out, rows)
    write_atomic(out / "report.html", page(summary).encode("utf-8", "backslashreplace"))
    return summary


def _row(job: Job, board: Board, out: Path, storage: Storage) -> dict[str, Any]:
    record = board.ledger.of(job.id)
    result = record.result
    state = "waiting" if record.state == "running" else record.state
    folder = storage.folder(job.id)
    if folder is None:
        folder = out / JOBS / job.id
        if state == "done" and not (folder / "manifest.json").exists():
            storage.fetch(job.id, SHOWN, folder)
    manifest = _manifest(folder)
    return {
        "id": job.id,
        "group": job.group,
        "prompt": job.prompt,
        "seed": job.seed,
        "config": job.config,
        "varied": dict(job.varied),
        "status": state,
        "attempts": record.attempts,
        "steps": result.steps_done if result else 0,
        "seconds": round(record.seconds, 2),
        "score": None if result is None else result.score,
        "best": False,
        "error": None if state == "done" or result is None else result.error,
        "warnings": list(result.warnings) if result else [],
        "verdict": manifest.get("verdict"),
        "mesh": manifest.get("mesh"),
        "folder": os.path.relpath(folder, out).replace(os.sep, "/"),
        "shown": [name for name in SHOWN if (folder / name).is_file()],
        "files": dict(result.files) if result else {},
    }


def _manifest(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def mark_best(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Mark the best finished candidate where there are several, in place; returns group -> id. The first of equals."""
    best: dict[str, dict[str, Any]] = {}
    sizes = Counter(row["group"] for row in rows)
    for row in rows:
        if row["status"] != "done" or sizes[row["group"]] == 1:
            continue
        before = best.get(row["group"])
        if before is None or _worth(row) > _worth(before):
            best[row["group"]] = row
    for row in best.values():
        row["best"] = True
    return {group: row["id"] for group, row in best.items()}


def _worth(row: Mapping[str, Any]) -> float:
    return -math.inf if row["score"] is None else float(row["score"])


def _link_best(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """best/GROUP leads to the folder of the best candidate; only where there was a choice."""
    folder = out / BEST
    chosen = {row["group"]: row["folder"] for row in rows if row["best"]}
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_symlink() or path.suffix == ".txt":  # of an earlier session
            path.unlink()
    for group, target in chosen.items():
        folder.mkdir(exist_ok=True)
        try:
            os.symlink(Path("..") / target, folder / group, target_is_directory=True)
        except (OSError, NotImplementedError):  # systems without links
            write_atomic(folder / f"{group}.txt", f"{target}\n".encode())


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per job; a text that a spreadsheet would take for a formula gets a quote in front."""
    swept = list(dict.fromkeys(key for row in rows for key in row["varied"]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_COLUMNS, *swept, "folder", "error"])
    for row in rows:
        cells = [row[name] for name in _COLUMNS]
        cells += [row["varied"].get(key) for key in swept]
        writer.writerow([_cell(value) for value in (*cells, row["folder"], row["error"])])
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, (dict, list)):
        value = json.dumps(value, ensure_ascii=False)
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
