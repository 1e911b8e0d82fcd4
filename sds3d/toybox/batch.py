"""Training batches: read shapes from the pool, paint them, caption them, drop conditions, draw t and noise."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sds3d.priors.camera_condition import condition_vector
from sds3d.toybox.captions import caption
from sds3d.toybox.colors import sample_rgb
from sds3d.toybox.held_out import sample_colors
from sds3d.toybox.kinds import KIND_NAMES, KINDS
from sds3d.toybox.pool import Pool
from sds3d.toybox.views import view_word

TEXT_DROP = 0.1
CAMERA_DROP = 0.12
BACKGROUND_DROP = 0.1
VIEW_WORD_FRACTION = 0.75
WHITE_FRACTION = 0.12  # more white makes white parts translucent in distillation
UNKNOWN_FRACTION = 0.04
STEPS = 1000


@dataclass(frozen=True)
class Batch:
    """What one training step sees; x0 and noise are pixel-unshuffled, x0 in [-1, 1]."""

    x0: Float[Tensor, "b c h w"]
    noise: Float[Tensor, "b c h w"]
    step: Int[Tensor, " b"]
    ids: Int[Tensor, "b n"]
    condition: Float[Tensor, "b k"]


@dataclass(frozen=True)
class Painted:
    """Coloured images with what is true of them."""

    rgb: Float[Tensor, "b 3 H W"]  # sRGB in [0, 1]
    background: Float[Tensor, "b 3"]
    kinds: list[str]
    colors: list[str]
    seconds: list[str | None]
    meta: Float[Tensor, "b 4"]  # kind index, azimuth_deg, elevation_deg, radius


def sample_background(rng: np.random.Generator, count: int) -> np.ndarray:
    """Plain backgrounds (count, 3) in [0, 1]: some white, some gray, mostly any colour."""
    colors = rng.random((count, 3))
    kind = rng.random(count)
    colors[kind < 0.3] = rng.random((count, 1))[kind < 0.3]
    colors[kind < WHITE_FRACTION] = 1.0
    return colors.astype(np.float32)


def paint(pool: Pool, rng: np.random.Generator, count: int, held_out: bool = False) -> Painted:
    """`count` random renders of the pool in random (training) colours on random backgrounds.

    With `held_out` any main colour may be drawn, also those that training never shows.
    """
    index = rng.integers(len(pool), size=count)
    layers = torch.from_numpy(pool.layers[index]).permute(0, 3, 1, 2).float() / 255.0
    meta = torch.from_numpy(pool.meta[index])
    kinds = [KIND_NAMES[int(k)] for k in meta[:, 0]]
    pairs = [sample_colors(rng, kind, include_held_out=held_out) for kind in kinds]
    main = np.stack([sample_rgb(rng, color) for color, _ in pairs])
    second = np.stack(
        [
            sample_rgb(rng, second or KINDS[kind].default_second or color)
            if second or KINDS[kind].default_second
            else row
            for (color, second), kind, row in zip(pairs, kinds, main, strict=True)
        ]
    )
    background = torch.from_numpy(sample_background(rng, count))

    def solid(rgb: np.ndarray | Tensor) -> Tensor:
        return torch.as_tensor(rgb)[:, :, None, None]

    rgb = layers[:, 0:1] * solid(main) + layers[:, 1:2] * solid(second) + layers[:, 2:5]
    rgb = (rgb + (1.0 - layers[:, 5:6]) * solid(background)).clamp(max=1.0)
    return Painted(rgb, background, kinds, [c for c, _ in pairs], [s for _, s in pairs], meta)


class BatchMaker:
    """Makes training batches as a pure function of a seed."""

    def __init__(
        self, pool: Pool, tokenizer: PreTrainedTokenizerFast, patch: int, device: torch.device
    ) -> None:
        self.pool, self.tokenizer, self.patch, self.device = pool, tokenizer, patch, device

    def captions(self, rng: np.random.Generator, painted: Painted) -> list[str]:
        """One caption per image; empty where the text condition is dropped."""
        texts = []
        for row, (kind, color, second) in enumerate(
            zip(painted.kinds, painted.colors, painted.seconds, strict=True)
        ):
            view = view_word(float(painted.meta[row, 1]), float(painted.meta[row, 2]))
            shown = view if rng.random() < VIEW_WORD_FRACTION else None
            text = caption(rng, kind, color, second, shown)
            texts.append("" if rng.random() < TEXT_DROP else text)
        return texts

    def make(self, seed: int, count: int) -> Batch:
        """A batch of `count` images; the same seed gives the same batch."""
        rng = np.random.Generator(np.random.PCG64(seed))
        painted = paint(self.pool, rng, count)
        ids = self.tokenizer(
            self.captions(rng, painted), padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        unknown = torch.from_numpy(rng.random(count) < UNKNOWN_FRACTION)
        column = torch.from_numpy(rng.integers(1, 6, size=count))
        hide = unknown & (ids[torch.arange(count), column] > 2)
        ids[torch.arange(count)[hide], column[hide]] = self.tokenizer.unk_token_id

        def known(drop: float) -> Tensor:
            return torch.from_numpy((rng.random(count) >= drop).astype(np.float32))

        condition = condition_vector(
            painted.meta[:, 1],
            painted.meta[:, 2],
            painted.meta[:, 3],
            painted.background,
            known(CAMERA_DROP),
            known(BACKGROUND_DROP),
        )
        x0 = F.pixel_unshuffle(painted.rgb * 2.0 - 1.0, self.patch)
        noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32))
        # t = 1 - u^2.5: averaged over an object's pixels, noise hides its coarse shape only above t = 0.93 or so,
        # so it is there that text and camera decide what is drawn. A third of the samples lie there.
        step = torch.from_numpy(
            (STEPS * (1.0 - rng.random(count) ** 2.5)).astype(np.int64).clip(0, STEPS - 1)
        )

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(self.device, non_blocking=True)

        x0, noise = (move(v).contiguous(memory_format=torch.channels_last) for v in (x0, noise))
        return Batch(x0, noise, move(step), move(ids), move(condition))
