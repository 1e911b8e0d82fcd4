"""Ask the judge about the prior: `python -m sds3d.toybox.evaluate --prior FOLDER --out report.json`.

Samples the prior with DDIM for prompts spread evenly over kinds and colours, colour-kind pairs seen in training and
held-out ones apart, each from a random camera on a plain background, and reports how often the judge reads the kind,
main colour and azimuth that were asked for. Writes JSON, a Markdown table beside it, and a contact sheet on request.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sds3d.cameras.orbit import orbit_cameras
from sds3d.interfaces import Cameras, Prior, Told
from sds3d.mathx.ode import ddim_step
from sds3d.mathx.predict import eps_from_x0, x0_from_eps
from sds3d.paths import write_atomic
from sds3d.priors import PriorConfig, open_prior
from sds3d.priors.network import NetworkPrior
from sds3d.rng import Streams
from sds3d.toybox.batch import sample_background
from sds3d.toybox.captions import short_caption
from sds3d.toybox.colors import COLOR_NAMES
from sds3d.toybox.held_out import held_out_pairs
from sds3d.toybox.judge import AZIMUTH_TOLERANCE_DEG, Judge, azimuth_error_deg, load_judge
from sds3d.toybox.kinds import KIND_NAMES, KINDS
from sds3d.toybox.views import sample_views, view_word

HELD_OUT_SHARE = 0.3
WHITE_SHARE = 0.5
SEEN, HELD_OUT = "seen", "held_out"
BARS = {
    SEEN: {"kind": 0.95, "color": 0.95, "azimuth": 0.85},
    HELD_OUT: {"kind": 0.90, "color": 0.85},
}


@dataclass(frozen=True)
class Question:
    """One picture asked of the prior."""

    color: str
    kind: str
    split: str  # "seen" or "held_out"
    azimuth_deg: float
    elevation_deg: float
    radius: float
    background: tuple[float, float, float]

    @property
    def prompt(self) -> str:
        """The canonical caption with its view word."""
        return f"{short_caption(self.kind, self.color)}, {view_word(self.azimuth_deg, self.elevation_deg)}"


def ask(rng: np.random.Generator, count: int) -> list[Question]:
    """`count` questions: kinds in turn, each kind's colours in turn, cameras as in training, half on white."""
    held_out = round(HELD_OUT_SHARE * count)
    pairs = [(pair, SEEN) for pair in _in_turn(rng, count - held_out, held_out=False)]
    pairs += [(pair, HELD_OUT) for pair in _in_turn(rng, held_out, held_out=True)]
    views = sample_views(rng, count)
    background = sample_background(rng, count)
    background[rng.random(count) < WHITE_SHARE] = 1.0
    return [
        Question(
            color,
            kind,
            split,
            float(views.azimuth_deg[row]),
            float(views.elevation_deg[row]),
            float(views.radius[row]),
            (float(background[row, 0]), float(background[row, 1]), float(background[row, 2])),
        )
        for row, ((color, kind), split) in enumerate(pairs)
    ]


def _in_turn(rng: np.random.Generator, count: int, held_out: bool) -> list[tuple[str, str]]:
    """`count` (colour, kind) pairs that use every kind, and within a kind every colour, equally often."""
    queues: dict[str, list[str]] = {kind: [] for kind in KIND_NAMES}
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        for kind in rng.permutation(KIND_NAMES).tolist():
            allowed = [c for c in COLOR_NAMES if ((c, kind) in held_out_pairs()) == held_out]
            queues[kind] = queues[kind] or rng.permutation(allowed).tolist()
            pairs.append((queues[kind].pop(), kind))
    return pairs[:count]


def _cameras(questions: Sequence[Question], size_px: int) -> Cameras:
    rows = torch.tensor([[q.azimuth_deg, q.elevation_deg, q.radius, 40.0] for q in questions])
    return orbit_cameras(rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3], size_px)


@torch.no_grad()
def sample(
    prior: Prior,
    text: Float[Tensor, "b n d"],
    null: Float[Tensor, "b n d"],
    noise: Float[Tensor, "b c h w"],
    cfg: float,
    steps: int,
    cameras: Cameras | None,
    background: Float[Tensor, "b 3"] | None,
    clip: bool = True,
) -> Float[Tensor, "b 3 H W"]:
    """DDIM samples with eps = null + cfg (text - null); cfg = 1 asks the network once per step.

    The null bundle keeps the background and drops text and camera. With `clip` the clean image is kept in [-1, 1]
    at every step (for priors whose x is the image). Returns sRGB clamped to [0, 1].
    """
    asked = Told(text=text, cameras=cameras, background=background)
    empty = Told(text=null, background=background)
    times = torch.linspace(1.0, 0.0, steps + 1, device=noise.device)
    x = noise
    for now, then in pairwise(times):
        t, s = prior.schedule.snap(now.expand(len(x))), then.expand(len(x))
        if cfg == 1.0:
            (eps,) = prior.eps(x, t, asked)
        else:
            conditional, unconditional = prior.eps(x, t, asked, empty)
            eps = unconditional + cfg * (conditional - unconditional)
        if clip:
            a, sigma = prior.schedule.alpha(t), prior.schedule.sigma(t)
            eps = eps_from_x0(x, x0_from_eps(x, eps, a, sigma).clamp(-1.0, 1.0), a, sigma)
        x = ddim_step(x, eps, prior.schedule, t, prior.schedule.snap(s) if then > 0 else s)
    return prior.decode(x).clamp(0.0, 1.0)


def _batches(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def sample_questions(
    prior: NetworkPrior, questions: Sequence[Question], cfg: float, options: argparse.Namespace
) -> Float[Tensor, "n 3 H W"]:
    """One picture per question; the noise of a question depends on the seed and its place only."""
    streams = Streams(options.seed)
    null = prior.encode_text([""])
    pictures = []
    for part in _batches(len(questions), options.batch):
        rows = questions[part]
        noise = [streams.stream("evaluate", part.start + i).normal(1, *prior.shape) for i in range(len(rows))]
        told = prior.takes_camera
        pictures.append(
            sample(
                prior,
                prior.encode_text([q.prompt for q in rows]),
                null.expand(len(rows), -1, -1),
                torch.cat(noise).to(prior.device),
                cfg,
                options.steps,
                _cameras(rows, prior.image_px) if told and not options.no_camera else None,
                torch.tensor([q.background for q in rows], device=prior.device) if told else None,
                clip=prior.is_pixel,
            ).cpu()
        )
    return torch.cat(pictures)


def _share(hits: Sequence[bool]) -> float | None:
    return round(sum(hits) / len(hits), 4) if hits else None


@dataclass(frozen=True)
class Marks:
    """What the judge made of each question, row by row."""

    kind: list[str]
    color: list[str]
    azimuth_error: list[float]

    def summary(self, questions: Sequence[Question], rows: Sequence[int]) -> dict[str, Any]:
        """Shares of right answers among `rows`; azimuth within 30 degrees, over kinds with a front."""
        front = [r for r in rows if KINDS[questions[r].kind].has_front]
        return {
            "samples": len(rows),
            "kind": _share([self.kind[r] == questions[r].kind for r in rows]),
            "color": _share([self.color[r] == questions[r].color for r in rows]),
            "azimuth": _share([self.azimuth_error[r] <= AZIMUTH_TOLERANCE_DEG for r in front]),
            "azimuth_median_deg": round(float(np.median([self.azimuth_error[r] for r in front])), 1)
            if front
            else None,
        }


def mark(judge: Judge, questions: Sequence[Question], pictures: Float[Tensor, "n 3 H W"]) -> Marks:
    """The judge's answers."""
    verdicts = judge(pictures)
    asked = torch.tensor([q.azimuth_deg for q in questions], device=judge.device)
    error = azimuth_error_deg(verdicts.azimuth_deg, asked)
    return Marks(verdicts.kinds(), verdicts.colors(), error.tolist())


def report_of(questions: Sequence[Question], marks: Marks) -> dict[str, Any]:
    """Summaries per split, per kind and per colour, what was mistaken for what, and which bars are met."""
    every = range(len(questions))
    splits = {
        split: marks.summary(questions, [r for r in every if questions[r].split == split])
        for split in (SEEN, HELD_OUT)
    }
    mistaken: dict[str, int] = {}
    for r in every:
        asked, seen = questions[r], (marks.color[r], marks.kind[r])
        if seen != (asked.color, asked.kind):
            key = f"{asked.color} {asked.kind} -> {seen[0]} {seen[1]}"
            mistaken[key] = mistaken.get(key, 0) + 1
    return {
        "splits": splits,
        "bars_met": {
            f"{split} {name}": splits[split][name] is not None and splits[split][name] >= bar
            for split, bars in BARS.items()
            for name, bar in bars.items()
        },
        "kinds": {
            k: marks.summary(questions, [r for r in every if questions[r].kind == k]) for k in KIND_NAMES
        },
        "colors": {
            c: marks.summary(questions, [r for r in every if questions[r].color == c]) for c in COLOR_NAMES
        },
        "mistaken": dict(sorted(mistaken.items(), key=lambda item: -item[1])),
    }


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown tables."""
    lines = [
        f"# Prior report: {report['samples']} samples, {report['steps']} DDIM steps",
        "",
        f"Camera condition: {'no (view words only)' if report['no_camera'] else 'yes'}; seed {report['seed']}. "
        "Per cent right as read by the judge; azimuth within 30 degrees, kinds with a front only.",
        "",
        "| cfg | pairs | samples | kind | colour | azimuth | median azimuth error |",
        "|---|---|---|---|---|---|---|",
    ]
    for cfg, part in report["cfg"].items():
        for split, row in part["splits"].items():
            numbers = " | ".join(_percent(row[key]) for key in ("kind", "color", "azimuth"))
            median = "-" if row["azimuth_median_deg"] is None else f"{row['azimuth_median_deg']:.1f} deg"
            lines.append(f"| {cfg} | {split.replace('_', '-')} | {row['samples']} | {numbers} | {median} |")
    for title in ("kinds", "colors"):
        head = " | ".join(f"cfg {cfg}: kind / colour / azimuth" for cfg in report["cfg"])
        lines += ["", f"| {title} | {head} |", "|---" * (1 + len(report["cfg"])) + "|"]
        for name in next(iter(report["cfg"].values()))[title]:
            cells = [
                " / ".join(_percent(part[title][name][key]) for key in ("kind", "color", "azimuth"))
                for part in report["cfg"].values()
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def contact_sheet(
    pictures: Float[Tensor, "n 3 H W"], wrong: Sequence[bool], columns: int = 16, edge: int = 3
) -> Image.Image:
    """All pictures in a grid, those whose kind or colour the judge reads otherwise framed in red."""
    n, _, h, w = pictures.shape
    cells = torch.ones(-(-n // columns) * columns, h + 2 * edge, w + 2 * edge, 3)
    cells[torch.tensor(wrong).nonzero()[:, 0]] = torch.tensor([1.0, 0.0, 0.0])
    cells[:n, edge:-edge, edge:-edge] = pictures.permute(0, 2, 3, 1)
    rows = cells.unflatten(0, (-1, columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return Image.fromarray((rows * 255.0).round().byte().numpy())


def evaluate(prior: NetworkPrior, judge: Judge, options: argparse.Namespace) -> dict[str, Any]:
    """The whole report, and the contact sheet of the last guidance scale if asked for."""
    questions = ask(Streams(options.seed).stream("questions").numpy_generator(), options.samples)
    report: dict[str, Any] = {key: getattr(options, key) for key in ("samples", "steps", "seed", "no_camera")}
    report["cfg"] = {}
    for cfg in options.cfg:
        started = time.monotonic()
        pictures = sample_questions(prior, questions, cfg, options)
        marks = mark(judge, questions, pictures)
        seconds = round(time.monotonic() - started, 1)
        report["cfg"][f"{cfg:g}"] = {**report_of(questions, marks), "seconds": seconds}
        if options.sheet is not None:
            wrong = [(marks.kind[r], marks.color[r]) != (q.kind, q.color) for r, q in enumerate(questions)]
            name = options.sheet
            path = name if len(options.cfg) == 1 else name.with_stem(f"{name.stem}_cfg{cfg:g}")
            contact_sheet(pictures, wrong).save(path)
    return report


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Score the toybox prior's samples with the judge.")
    parser.add_argument("--prior", type=Path, required=True, help="diffusers pipeline folder")
    parser.add_argument("--samples", type=int, default=500, help="pictures per guidance scale")
    parser.add_argument("--cfg", default="1,2,3,5", help="guidance scales, comma-separated; 1 is no guidance")
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON report; a .md file is written beside it"
    )
    parser.add_argument("--sheet", type=Path, help="PNG contact sheet; one per scale, mistakes framed in red")
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-camera", action="store_true", help="view words only, no camera condition")
    parser.add_argument("--judge", type=Path, help="judge folder; the shipped one by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    options.cfg = [float(value) for value in options.cfg.split(",")]
    return options


def main(argv: list[str] | None = None) -> int:
    """Load, evaluate, write the reports."""
    options = parse(argv)
    device = torch.device(options.device)
    prior = open_prior(options.prior, PriorConfig(dtype="float32"), device)
    report = evaluate(prior, load_judge(device, options.judge), options)
    write_atomic(options.out, (json.dumps(report, indent=2) + "\n").encode())
    write_atomic(options.out.with_suffix(".md"), markdown(report).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
