"""What one finished run is worth: read by the judge, measured on the exported file and against the toybox."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.cameras.orbit import turntable_cameras
from sds3d.mesh.files import load_mesh
from sds3d.mesh.textured import render_textured
from sds3d.toybox.colors import COLORS
from sds3d.toybox.judge import Judge, azimuth_error_deg, majority, parse_prompt
from sds3d.toybox.kinds import KINDS
from sds3d.toybox.views import Views
from sds3d.toybox.world import compose, render_layers, sample_toy

VIEWS, VIEW_PX = 8, 64
AZIMUTH_TOLERANCE_DEG, FRONT_DEG = 45.0, 60.0


@dataclass(frozen=True, kw_only=True)
class RunScore:
    """Scores of one asset; None where the question has no answer for the prompt."""

    kind_ok: bool
    color_ok: bool
    kind_votes: float  # share of views that show the kind asked for
    azimuth_ok: float | None  # share of views read within 45 degrees of their camera; kinds with a front only
    janus: float | None  # share of views from behind that are read as the front
    saturation: (
        float | None
    )  # mean HSV saturation of the object over that of toybox renders of the same words
    psnr_db: float  # scene against exported file
    seconds: float
    faces: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def views_of(folder: Path, size_px: int = VIEW_PX) -> Float[Tensor, "8 3 H W"]:
    """The exported file from eight sides on white."""
    mesh = load_mesh(folder / "asset.glb")
    cameras = turntable_cameras(VIEWS, size_px)
    return render_textured(mesh, cameras, torch.ones(VIEWS, 3))[0].clamp(0.0, 1.0)


def score_run(folder: Path, prompt: str, judge: Judge) -> RunScore:
    """Score the run folder of a prompt that names a toybox colour and kind."""
    images = views_of(folder)
    azimuths = turntable_cameras(VIEWS, VIEW_PX).azimuth_deg
    color, kind = parse_prompt(prompt)
    verdicts = judge(images)
    read_kind, read_color = majority(verdicts)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    azimuth_ok = janus = None
    if kind is not None and KINDS[kind].has_front:
        error = azimuth_error_deg(verdicts.azimuth_deg.cpu(), azimuths)
        azimuth_ok = float((error <= AZIMUTH_TOLERANCE_DEG).float().mean())
        behind = azimuth_error_deg(azimuths, torch.full_like(azimuths, 180.0)) <= FRONT_DEG
        front = azimuth_error_deg(verdicts.azimuth_deg.cpu(), torch.zeros_like(azimuths)) <= FRONT_DEG
        janus = float((front & behind).sum() / behind.sum())
    return RunScore(
        kind_ok=read_kind == kind,
        color_ok=read_color == color,
        kind_votes=sum(name == kind for name in verdicts.kinds()) / VIEWS,
        azimuth_ok=azimuth_ok,
        janus=janus,
        saturation=_relative_saturation(images, color, kind),
        psnr_db=float(manifest["fidelity"]["psnr_db"]),
        seconds=float(manifest["seconds"]),
        faces=int(manifest["mesh"]["faces"]),
    )


def diversity(folders: list[Path]) -> float | None:
    """Mean RMSE between the eight views of every two seeds of one prompt; None for a single seed."""
    images = [views_of(folder) for folder in folders]
    pairs = [(a, b) for i, a in enumerate(images) for b in images[i + 1 :]]
    if not pairs:
        return None
    return float(np.mean([float((a - b).square().mean().sqrt()) for a, b in pairs]))


def _saturation(images: Float[Tensor, "b 3 H W"]) -> float:
    """Mean HSV saturation of what is not the white background."""
    high, low = images.amax(1), images.amin(1)
    object_ = low < 0.97
    value = ((high - low) / high.clamp(min=1e-3))[object_]
    return float(value.mean()) if value.numel() else 0.0


def _relative_saturation(images: Tensor, color: str | None, kind: str | None) -> float | None:
    """Against eight instances of the same colour and kind in the training world; None for grey objects."""
    if color is None or kind is None:
        return None
    rng = np.random.default_rng(0)
    level = np.ones(VIEWS)
    views = Views(np.arange(VIEWS) * 360.0 / VIEWS, 15.0 * level, 3.3 * level, 40.0 * level)
    layers = render_layers([sample_toy(rng, kind) for _ in range(VIEWS)], views, VIEW_PX, rng)
    paint = np.repeat(np.array([COLORS[color]]), VIEWS, 0)
    truth = compose(layers, paint, paint, np.ones((VIEWS, 3)))
    known = _saturation(torch.from_numpy(truth).permute(0, 3, 1, 2).float())
    return _saturation(images) / known if known > 0.1 else None
