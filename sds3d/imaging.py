"""`sds3d image`: the same guidance on a 2D image, with the identity for a renderer; for debugging and teaching.

Here score distillation is plain gradient descent on pixels (or on the prior's own space), so what a rule does shows
within seconds, undisturbed by a scene.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from sds3d.cameras.orbit import orbit_cameras
from sds3d.config.dump import dump
from sds3d.errors import InputError
from sds3d.events.bus import Emit, Finished, PhaseStarted, StepDone, Warned, to_all
from sds3d.events.preview import tiled, to_image, write_png
from sds3d.guide import Guide, for_term
from sds3d.interfaces import Cameras, ParamGroup, Render, Shading, attach_gradient
from sds3d.job import JobConfig, pick_device
from sds3d.moment import Moment
from sds3d.ops.threads import one_thread_per_call
from sds3d.optim import Optimizer
from sds3d.optimize import build_guide
from sds3d.paths import claim_folder, claim_run_folder, write_atomic

Space = Literal["pixels", "latents"]
STRIP_FRAMES = 8


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """What `sds3d image` adds to a job."""

    count: int = 4  # images optimised side by side, each with its own noise
    space: Space = "pixels"  # what is optimised: RGB through the prior's encoder, or the prior's own variable
    lr: float = 0.03
    azimuth_deg: float = 30.0  # the camera that camera-conditioned priors are told
    elevation_deg: float = 15.0
    init: Path | None = None  # start from this picture (and edit it, where the rule compares)


@dataclass(frozen=True, kw_only=True)
class ImageResult:
    """Pictures that were written."""

    folder: Path
    image: Path  # the final images side by side
    strip: Path  # one row per image, from the first step to the last
    final: Float[Tensor, "b 3 P P"]


def make_image(
    job: JobConfig,
    config: ImageConfig,
    out: Path | None = None,
    *,
    config_name: str = "default",
    listeners: Sequence[Emit] = (),
) -> ImageResult:
    """Optimise `count` images against the job's guidance; scene, camera and export settings are not used.

    Raises:
        Sds3dError: with a message for the user; nothing is left on disk then.
    """
    job.validate(source_given=config.init is not None)
    start = None if config.init is None else load_image(config.init)
    device, emit = pick_device(job.device), to_all(list(listeners))
    emit(PhaseStarted(name="loading"))
    with one_thread_per_call(device):
        guide = build_guide(job, device, hold=1)
        for message in guide.prior.warnings([job.text(), job.negative_prompt]):
            emit(Warned(message=message))
        emit(PhaseStarted(name="optimising"))
        frames = distill(guide, job, config, start, emit)
    folder = claim_folder(out) if out is not None else claim_run_folder(f"image-{config_name}", job.text())
    image, strip = folder / "image.png", folder / "strip.png"
    write_atomic(folder / "config.yaml", dump(job).encode("utf-8"))
    write_png(image, to_image(_enlarged(tiled(frames[-1], columns=config.count))))
    rows = torch.stack(frames, dim=1).flatten(0, 1)
    write_png(strip, to_image(_enlarged(tiled(rows, columns=len(frames)))))
    emit(Finished(status="done", folder=folder, files={"image": image, "strip": strip}, seconds=0.0))
    return ImageResult(folder=folder, image=image, strip=strip, final=frames[-1])


def distill(
    guide: Guide,
    job: JobConfig,
    config: ImageConfig,
    start: Float[Tensor, "3 H W"] | None,
    emit: Emit,
) -> list[Float[Tensor, "b 3 P P"]]:
    """The images after every `steps` / STRIP_FRAMES steps, the first at the start."""
    prior, count = guide.prior, config.count
    # An empty picture on the white background that the prior is told about: what inversion starts from must make sense.
    blank = torch.ones(3, prior.image_px, prior.image_px) if start is None else start
    rgb = F.interpolate(blank[None], size=(prior.image_px,) * 2, mode="bilinear", antialias=True)
    rgb = rgb.to(prior.device).expand(count, -1, -1, -1)
    with torch.no_grad():
        first = rgb if config.space == "pixels" else prior.encode(rgb)
        source = prior.encode(rgb) if start is not None else None
    canvas = nn.Parameter(first.clone())
    optimizer = Optimizer([ParamGroup(name="image", params=[canvas], lr=config.lr)], job.optimizer)
    level = torch.ones(count)
    azimuth, elevation = config.azimuth_deg * level, config.elevation_deg * level
    cameras = orbit_cameras(azimuth, elevation, 3.3 * level, 40.0 * level, prior.image_px).to(prior.device)
    shading = Shading(background=torch.ones(count, 3, device=prior.device))
    frames = [_shown(canvas, guide, config.space)]
    for step in range(job.steps):
        now = Moment(step, job.steps)
        x = prior.encode(canvas) if config.space == "pixels" else canvas
        loss = _guidance(guide, canvas, x, cameras, shading, source, now, config.space)
        report = optimizer.step(loss, now)
        if (step + 1) % 10 == 0 or step + 1 == job.steps:
            norm = float(report.grad_norm)
            emit(StepDone(step=step + 1, steps=job.steps, grad_norm=norm, nonfinite=int(optimizer.nonfinite)))
        if (step + 1) * STRIP_FRAMES // job.steps > step * STRIP_FRAMES // job.steps:
            frames.append(_shown(canvas, guide, config.space))
    return frames


def _guidance(
    guide: Guide,
    canvas: Tensor,
    x: Tensor,
    cameras: Cameras,
    shading: Shading,
    source: Tensor | None,
    now: Moment,
    space: Space,
) -> Float[Tensor, ""]:
    """The loss of one step; the rules' own parameters learn here too."""
    flat = torch.ones_like(canvas[:, :1])
    view = Render(rgb=canvas[:, :3], alpha=flat, depth=flat * cameras.radius[:, None, None, None])
    cond = guide.bank.for_views(cameras, shading, source)
    loss = x.new_zeros(())
    draw = guide.draw(view, x, cameras, now)
    for index, term in enumerate(guide.terms):
        if not term.acts(now):
            continue
        residual = term.rule.residual(x.detach(), for_term(draw, index), cond)
        loss = loss + term.weight.at(now) * attach_gradient(x, guide.limited(residual.grad, now))
        if residual.image_target is not None and space == "pixels":
            away = residual.image_weight * (canvas.detach() - residual.image_target)
            loss = loss + attach_gradient(canvas, away)
        guide.learn(residual.aux_loss, now)
    # Views are averaged in a scene; side by side each image deserves its whole gradient.
    return loss * len(x)


@torch.no_grad()
def _shown(canvas: Tensor, guide: Guide, space: Space) -> Float[Tensor, "b 3 P P"]:
    rgb = canvas if space == "pixels" else guide.prior.decode(canvas)
    return rgb.detach().float().clamp(0.0, 1.0).cpu()


def _enlarged(image: Float[Tensor, "3 H W"], tile_px: int = 128) -> Float[Tensor, "3 h w"]:
    """Small pictures twice as large, pixels kept square."""
    factor = 2 if image.shape[-2] < 8 * tile_px else 1
    return image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def load_image(path: Path) -> Float[Tensor, "3 H W"]:
    """A picture file as sRGB in [0, 1]; transparency is put on white.

    Raises:
        InputError: no such file, or no picture.
    """
    try:
        with Image.open(path) as picture:
            rgba = picture.convert("RGBA")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as a picture ({error})") from error
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    pixels = np.asarray(Image.alpha_composite(white, rgba).convert("RGB"), dtype=np.float32) / 255.0
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


__all__ = ["ImageConfig", "ImageResult", "distill", "load_image", "make_image"]
