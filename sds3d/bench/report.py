"""The table, the JSON and the contact sheet of a bench."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.bench.score import diversity, views_of
from sds3d.events.preview import to_image, write_png
from sds3d.paths import safe_slug, write_atomic

if TYPE_CHECKING:
    from sds3d.bench.guidance import BenchConfig

SHEET_AZIMUTHS = (1, 3, 5)  # of the eight judged views: three-quarter front, side-back, back
TILE_PX = 64


def write_report(
    config: "BenchConfig", out: Path, *, held_out: Sequence[str], machine: str
) -> dict[str, Any]:
    """bench.json, bench.md and sheet.png from the finished runs in `out`."""
    methods = {method: summarise(config, out, method, held_out) for method in config.methods}
    ranked = sorted(methods, key=lambda name: -(methods[name]["precision"] or -1.0))
    report = {
        "budget": config.budget,
        "prompts": list(config.prompts),
        "held_out": list(held_out),
        "seeds": list(config.seeds),
        "machine": machine,
        "methods": {name: methods[name] for name in ranked},
    }
    write_atomic(out / "bench.json", json.dumps(report, indent=2).encode())
    write_atomic(out / "bench.md", markdown(report).encode())
    write_png(out / "sheet.png", to_image(sheet(config, out, ranked)))
    return report


def summarise(config: "BenchConfig", out: Path, method: str, held_out: Sequence[str]) -> dict[str, Any]:
    """Means over the finished runs of one method; None where there is nothing to average."""
    scores: list[dict[str, Any]] = []
    spread: list[float] = []
    for prompt in config.prompts:
        folders = [out / method / f"{safe_slug(prompt)}-{seed}" for seed in config.seeds]
        done = [folder for folder in folders if (folder / "score.json").exists()]
        scores += [json.loads((folder / "score.json").read_text(encoding="utf-8")) for folder in done]
        distance = diversity(done)
        if distance is not None:
            spread.append(distance)
    failure = out / method / "failure.txt"
    right = [float(s["kind_ok"] and s["color_ok"]) for s in scores]
    unseen = [float(s["kind_ok"] and s["color_ok"]) for s in scores if s["prompt"] in held_out]

    def mean(key: str) -> float | None:
        return _mean([float(s[key]) for s in scores if s[key] is not None])

    return {
        "runs": len(scores),
        "precision": _mean(right),
        "precision_held_out": _mean(unseen),
        "kind_votes": mean("kind_votes"),
        "color": mean("color_ok"),
        "view": mean("azimuth_ok"),
        "janus": mean("janus"),
        "diversity": _mean(spread),
        "saturation": mean("saturation"),
        "psnr_db": mean("psnr_db"),
        "steps": mean("steps"),
        "passes_per_step": mean("passes_per_step"),
        "step_ms": _mean([1000.0 * s["optimise_s"] / s["steps"] for s in scores]),
        "optimise_s": mean("optimise_s"),
        "peak_mb": max((float(s["peak_mb"]) for s in scores), default=None),
        "failure": failure.read_text(encoding="utf-8") if failure.exists() else None,
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("right", "precision", "{:.0%}"),
    ("right, held out", "precision_held_out", "{:.0%}"),
    ("views with kind", "kind_votes", "{:.0%}"),
    ("colour", "color", "{:.0%}"),
    ("view right", "view", "{:.0%}"),
    ("Janus", "janus", "{:.0%}"),
    ("diversity", "diversity", "{:.3f}"),
    ("saturation", "saturation", "{:.2f}"),
    ("PSNR dB", "psnr_db", "{:.1f}"),
    ("steps", "steps", "{:.0f}"),
    ("passes / step", "passes_per_step", "{:.2f}"),
    ("ms / step", "step_ms", "{:.0f}"),
    ("s", "optimise_s", "{:.0f}"),
    ("MB", "peak_mb", "{:.0f}"),
)


def markdown(report: dict[str, Any]) -> str:
    """The table, one method per line, best first."""
    head = "| method | runs | " + " | ".join(title for title, _, _ in _COLUMNS) + " |"
    lines = [head, "|" + "---|" * (len(_COLUMNS) + 2)]
    for name, row in report["methods"].items():
        cells = ["-" if row[key] is None else form.format(row[key]) for _, key, form in _COLUMNS]
        lines.append(f"| {name} | {row['runs']} | " + " | ".join(cells) + " |")
    failures = [
        f"- {name}: {row['failure']}" for name, row in report["methods"].items() if row["failure"] is not None
    ]
    facts = (
        f"{report['budget']} prior evaluations per view and run; {len(report['prompts'])} prompts "
        f"({len(report['held_out'])} held out) x {len(report['seeds'])} seeds; {report['machine']}.\n"
    )
    return (
        facts + "\n" + "\n".join(lines) + "\n" + ("\nFailures:\n" + "\n".join(failures) if failures else "")
    )


def sheet(config: "BenchConfig", out: Path, methods: Sequence[str]) -> Float[Tensor, "3 H W"]:
    """One row per method, three views of every prompt at the first seed; blank where a run is missing."""
    rows = []
    for method in methods:
        tiles = []
        for prompt in config.prompts:
            folder = out / method / f"{safe_slug(prompt)}-{config.seeds[0]}"
            if (folder / "asset.glb").exists():
                tiles += list(views_of(folder, TILE_PX)[list(SHEET_AZIMUTHS)])
            else:
                tiles += [torch.ones(3, TILE_PX, TILE_PX)] * len(SHEET_AZIMUTHS)
        rows.append(torch.cat(tiles, dim=2))
    return torch.cat(rows, dim=1)
