"""Train the judge on renders: `python -m sds3d.toybox.train_judge --work DIR`.

The same command continues from DIR/state.safetensors and does nothing more once all images are seen. Data are a pure
function of the seed and the step. With `--pool` the renders come from an existing pool instead of DIR/pool. Held-out
pairs are shown: the judge must know them to say whether the prior gets them right.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from sds3d.rng import derive_seed
from sds3d.toybox.batch import sample_background
from sds3d.toybox.colors import COLOR_NAMES, sample_rgb
from sds3d.toybox.held_out import sample_colors
from sds3d.toybox.judge import (
    AZIMUTH_BINS,
    AZIMUTH_TOLERANCE_DEG,
    CONFIG_FILE,
    IMAGE_PX,
    WEIGHTS_FILE,
    Judge,
    JudgeNet,
    JudgeShape,
    azimuth_error_deg,
    has_front_table,
    judge_config,
)
from sds3d.toybox.kinds import KIND_NAMES, KINDS
from sds3d.toybox.pool import Pool, open_pool
from sds3d.toybox.training_state import STATE, load_state, save_state
from sds3d.toybox.world import Layers, compose

WHITE_FRACTION = 0.35  # on top of the whites of sample_background: exported assets are judged on white
AZIMUTH_WEIGHT = 0.5
LABEL_SMOOTHING = 0.03


@dataclass(frozen=True)
class Examples:
    """Pictures with what is true of them."""

    images: Float[Tensor, "b 3 64 64"]  # sRGB in [0, 1]
    kind: Int[Tensor, " b"]
    color: Int[Tensor, " b"]  # of the main part
    azimuth_deg: Float[Tensor, " b"]
    elevation_deg: Float[Tensor, " b"]


def paint_examples(
    pool: Pool,
    rng: np.random.Generator,
    index: NDArray[np.integer],
    white_fraction: float = WHITE_FRACTION,
) -> Examples:
    """The pool's renders `index` in random colours, any pair allowed, on plain backgrounds.

    A share `white_fraction` stands on white, the others on what `sample_background` draws.
    """
    count = len(index)
    rows, meta = pool.layers[index], pool.meta[index]
    layers = Layers(rows[..., 0], rows[..., 1], rows[..., 2:5], rows[..., 5])
    kinds = [KIND_NAMES[int(kind)] for kind in meta[:, 0]]
    names, main, second = [], np.zeros((count, 3), np.float32), np.zeros((count, 3), np.float32)
    for row, kind in enumerate(kinds):
        color, other = sample_colors(rng, kind, include_held_out=True)
        main[row] = sample_rgb(rng, color)
        other = other or KINDS[kind].default_second
        second[row] = main[row] if other is None else sample_rgb(rng, other)
        names.append(COLOR_NAMES.index(color))
    background = sample_background(rng, count)
    background[rng.random(count) < white_fraction] = 1.0
    images = torch.from_numpy(compose(layers, main, second, background)).permute(0, 3, 1, 2)
    facts = torch.from_numpy(meta)
    return Examples(images, facts[:, 0].long(), torch.tensor(names), facts[:, 1], facts[:, 2])


def _cosine_basis(size: int = 8) -> Float[Tensor, "8 8"]:
    """Orthonormal DCT-II matrix; row k is frequency k."""
    k, n = torch.arange(size)[:, None], torch.arange(size)[None]
    basis = torch.cos(math.pi * (n + 0.5) * k / size) * math.sqrt(2.0 / size)
    basis[0] /= math.sqrt(2.0)
    return basis


def quantise_blocks(
    images: Float[Tensor, "b 3 H W"], strength: Float[Tensor, " b"]
) -> Float[Tensor, "b 3 H W"]:
    """JPEG-like loss: 8x8 cosine coefficients rounded to multiples of strength * (1 + frequency)."""
    b, c, h, w = images.shape
    basis = _cosine_basis()
    blocks = images.reshape(b, c, h // 8, 8, w // 8, 8).permute(0, 1, 2, 4, 3, 5)
    frequency = torch.arange(8.0)
    step = strength.view(b, 1, 1, 1, 1, 1) * (1.0 + frequency[:, None] + frequency[None])
    coefficients = ((basis @ blocks @ basis.T) / step).round() * step
    return (basis.T @ coefficients @ basis).permute(0, 1, 2, 4, 3, 5).reshape(b, c, h, w)


def _warp(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Scale, shift (8 % each) and roll (4 degrees); the plain background goes on beyond the border."""
    b = len(images)
    scale, roll = 1.0 + rng.uniform(-0.08, 0.08, b), np.radians(rng.uniform(-4.0, 4.0, b))
    theta = np.zeros((b, 2, 3), np.float32)
    theta[:, 0, 0], theta[:, 0, 1] = scale * np.cos(roll), -scale * np.sin(roll)
    theta[:, 1, 0], theta[:, 1, 1] = scale * np.sin(roll), scale * np.cos(roll)
    theta[:, :, 2] = rng.uniform(-0.16, 0.16, (b, 2))  # grid units: the image is 2 wide
    grid = F.affine_grid(torch.from_numpy(theta), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _tones(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation and a faint colour cast, too small to change a colour's name."""
    b = len(images)

    def draw(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (b, channels, 1, 1)).astype(np.float32))

    gray = images.mean(1, keepdim=True)
    images = gray + (images - gray) * draw(0.88, 1.15)
    return ((images - 0.5) * draw(0.9, 1.1) + 0.5) * draw(0.98, 1.02, 3) + draw(-0.04, 0.04)


def augment(images: Float[Tensor, "b 3 64 64"], rng: np.random.Generator) -> Float[Tensor, "b 3 64 64"]:
    """What a distilled or sampled picture may look like beside a clean render; a quarter stays clean."""
    b = len(images)
    count = b - b // 4
    dirty = images[:count]
    half, quarter = count // 2, count // 4
    dirty = _warp(dirty, rng)
    side = int(rng.integers(28, 56))
    small = F.interpolate(dirty[:half], size=(side, side), mode="bilinear", antialias=True)
    dirty[:half] = F.interpolate(small, size=(IMAGE_PX, IMAGE_PX), mode="bicubic")
    dirty = _tones(dirty, rng)
    part = slice(quarter, quarter + half)
    noise = torch.from_numpy(rng.standard_normal(dirty[part].shape, dtype=np.float32))
    dirty[part] += noise * torch.from_numpy(rng.uniform(0.0, 0.05, (half, 1, 1, 1)).astype(np.float32))
    strength = torch.from_numpy(rng.uniform(0.01, 0.06, quarter).astype(np.float32))
    dirty[half : half + quarter] = quantise_blocks(dirty[half : half + quarter], strength)
    return torch.cat([dirty, images[count:]]).clamp(0.0, 1.0)


def azimuth_target(azimuth_deg: Float[Tensor, " b"]) -> Float[Tensor, "b bins"]:
    """The two bins nearest to the azimuth, weighted linearly; their circular mean is the azimuth."""
    position = (azimuth_deg % 360.0) * (AZIMUTH_BINS / 360.0)
    low = position.floor().long()
    share = position - low
    target = F.one_hot(low % AZIMUTH_BINS, AZIMUTH_BINS) * (1.0 - share)[:, None]
    return target + F.one_hot((low + 1) % AZIMUTH_BINS, AZIMUTH_BINS) * share[:, None]


def judge_loss(
    net: Callable[..., tuple[Tensor, ...]], batch: Examples, autocast: torch.autocast
) -> Float[Tensor, ""]:
    """Cross-entropies of kind, colour and (kinds with a front only) azimuth bin."""
    with autocast:
        kind, color, azimuth = net(batch.images.contiguous(memory_format=torch.channels_last))
    loss = F.cross_entropy(kind.float(), batch.kind, label_smoothing=LABEL_SMOOTHING)
    loss = loss + F.cross_entropy(color.float(), batch.color, label_smoothing=LABEL_SMOOTHING)
    front = has_front_table(batch.images.device)[batch.kind]
    turned = F.cross_entropy(azimuth.float(), azimuth_target(batch.azimuth_deg), reduction="none")
    return loss + AZIMUTH_WEIGHT * (turned * front).sum() / front.sum().clamp(min=1.0)


@torch.no_grad()
def measure(judge: Judge, examples: Examples) -> dict[str, float]:
    """Accuracies on labelled pictures; azimuth only over kinds with a front."""
    verdicts = judge(examples.images)
    front = has_front_table()[examples.kind].bool()
    error = azimuth_error_deg(verdicts.azimuth_deg.cpu(), examples.azimuth_deg)[front]
    return {
        "kind": float((verdicts.kind_probs.argmax(1).cpu() == examples.kind).float().mean()),
        "color": float((verdicts.color_probs.argmax(1).cpu() == examples.color).float().mean()),
        "azimuth_median_deg": float(error.median()),
        "azimuth_within_30": float((error <= AZIMUTH_TOLERANCE_DEG).float().mean()),
    }


def save_judge(net: JudgeNet, shape: JudgeShape, folder: Path) -> None:
    """Weights (float16 matrices, float32 norms) and config.json that `load_judge` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: value.detach().cpu().to(torch.float16 if value.ndim > 1 else value.dtype).contiguous()
        for name, value in net.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    save_file(weights, folder / WEIGHTS_FILE)
    (folder / WEIGHTS_FILE).chmod(0o644)  # safetensors writes for the owner only
    (folder / CONFIG_FILE).write_text(json.dumps(judge_config(shape), indent=2) + "\n", encoding="utf-8")


class Trainer:
    """One training run on one thread (or one CUDA device)."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work, self.device = options, options.work, torch.device(options.device)
        self.shape = JudgeShape()
        torch.manual_seed(derive_seed(options.seed, "judge weights"))  # noqa: TID251 (layers initialise from it)
        self.net = JudgeNet(self.shape).to(self.device)
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
        decayed = [p for p in self.net.parameters() if p.ndim > 1]
        others = [p for p in self.net.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
            lr=options.lr,
            betas=(0.9, 0.99),
            fused=True,
        )
        self.step, self.seconds = 0, 0.0
        if (self.work / STATE).exists():
            numbers, _ = load_state(self.work / STATE, self.net, self.optimizer, self.device)
            self.step, self.seconds = int(numbers["step"]), numbers["seconds"]

    def save(self) -> None:
        """Write DIR/state.safetensors atomically and the present weights to DIR/judge."""
        numbers = {"step": self.step, "seconds": self.seconds}
        save_state(self.work / STATE, self.net, self.optimizer, numbers)
        save_judge(self.net, self.shape, self.work / "judge")

    def learning_rate(self, steps: int) -> float:
        """Linear warm-up over the first 4 %, then a cosine to zero."""
        u = self.step / steps
        warm = min(1.0, (self.step + 1) / (0.04 * steps))
        return self.options.lr * warm * (0.5 + 0.5 * math.cos(math.pi * u))

    def update(self, batch: Examples, steps: int) -> float:
        """One optimiser step; the loss."""
        self.net.train()
        moved = Examples(**{key: value.to(self.device) for key, value in vars(batch).items()})
        loss = judge_loss(self.net, moved, torch.autocast(self.device.type, torch.bfloat16))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 2.0, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item()

    def run(self, pool: Pool) -> None:
        """Train until all images are seen or the time is up, then save."""
        options = self.options
        steps = options.images // options.batch
        started = mark = saved = time.monotonic()
        losses = []
        while self.step < steps and time.monotonic() - started < 60 * options.minutes:
            rng = np.random.Generator(np.random.PCG64(derive_seed(options.seed, "judge batch", self.step)))
            index = np.sort(rng.integers(len(pool), size=options.batch))
            batch = paint_examples(pool, rng, index)
            shuffled = torch.from_numpy(rng.permutation(options.batch))
            batch = Examples(**{key: value[shuffled] for key, value in vars(batch).items()})
            batch = Examples(**{**vars(batch), "images": augment(batch.images, rng)})
            losses.append(self.update(batch, steps))
            if self.step % 100 == 0 or self.step == steps:
                now = time.monotonic()
                self.seconds += now - mark
                self._log(losses, options.batch * len(losses) / (now - mark))
                mark, losses = now, []
                if now - saved > 120:
                    self.save()
                    saved = now
        self.save()

    def _log(self, losses: list[float], rate: float) -> None:
        row = {
            "step": self.step,
            "seen": self.step * self.options.batch,
            "seconds": round(self.seconds, 1),
            "loss": sum(losses) / len(losses),
            "images_per_s": rate,
        }
        with (self.work / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the toybox judge (resumable).")
    parser.add_argument("--work", type=Path, required=True, help="folder for pool, state, log and weights")
    parser.add_argument("--pool", type=Path, help="existing pool folder to read instead of WORK/pool")
    parser.add_argument("--pool-images", type=int, default=65_536)
    parser.add_argument("--pool-seed", type=int, default=0)
    parser.add_argument(
        "--images", type=int, default=256_000, help="total images to see, earlier runs included"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop (resumably) after this long")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Open the pool and train."""
    options = parse(argv)
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1 if options.device == "cpu" else 4)
    pool = open_pool(options.pool or options.work / "pool", options.pool_images, IMAGE_PX, options.pool_seed)
    Trainer(options).run(pool)
    return 0


if __name__ == "__main__":
    sys.exit(main())
