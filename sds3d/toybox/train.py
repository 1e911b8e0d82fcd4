"""Train the shipped prior: `python -m sds3d.toybox.train --work DIR --images N`.

Resumable (the same command continues from DIR/state.safetensors), deterministic from its seed and process count, CPU or
CUDA. Learning rate: warm-up, constant, then a cosine decay to zero over the last `--decay-images`, so that a run
can be prolonged from any constant-phase checkpoint (Hu et al. 2024, arXiv:2404.06395, "WSD").

`--init FOLDER` starts from the weights of a prior folder, e.g. the shipped one, where there is no state to resume.
torch.compile is not offered: with torch 2.13 on the CPU the compiled backward pass of this network returned zero
gradients for most of its layers (the loss still falls, colours are learnt, shapes are not).

On the CPU each process uses one thread and weights are averaged every `--sync-steps` steps: many single-thread
processes share a machine far better than one process with many threads.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextModel

from sds3d.priors.camera_condition import with_coordinates
from sds3d.rng import derive_seed
from sds3d.toybox.batch import Batch, BatchMaker
from sds3d.toybox.captions import VOCABULARY
from sds3d.toybox.model import IMAGE_PX, PATCH_PX, ToyboxModel, build_model, save_model
from sds3d.toybox.pool import open_pool
from sds3d.toybox.training_state import STATE, load_state, save_state

MAX_WEIGHT = 2.0


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the weights."""

    images: int
    decay_images: int
    pool_images: int
    batch: int
    processes: int
    sync_steps: int
    lr: float
    ema: float
    seed: int
    device: str
    minutes: float


class Trainable(nn.Module):
    """Text encoder and denoiser as one module, so that they share optimiser, averaging and EMA."""

    def __init__(self, model: ToyboxModel) -> None:
        super().__init__()
        self.text_encoder = model.text_encoder
        self.unet = model.unet

    def forward(
        self, x_t: Float[Tensor, "b c h w"], step: Tensor, ids: Tensor, condition: Float[Tensor, "b k"]
    ) -> Float[Tensor, "b c h w"]:
        """The predicted clean image."""
        text = self.text_encoder(ids)[0]
        return self.unet(with_coordinates(x_t), step, text, class_labels=condition, return_dict=False)[0]


def denoising_loss(
    net: Callable[..., Tensor], batch: Batch, alphas_cumprod: Tensor, autocast: torch.autocast
) -> Tensor:
    """Mean of min(1 / sigma^2, 2) ||x0_hat - x0||^2: the v-prediction loss, capped near t = 0."""
    a2 = alphas_cumprod[batch.step][:, None, None, None]
    x_t = a2.sqrt() * batch.x0 + (1 - a2).sqrt() * batch.noise
    with autocast:
        x0_hat = net(x_t, batch.step, batch.ids, batch.condition)
    weight = (1.0 / (1.0 - a2)).clamp(max=MAX_WEIGHT)
    return (weight * (x0_hat.float() - batch.x0).square()).mean()


def learning_rate(config: TrainConfig, seen: int) -> float:
    """Warm-up over 12,800 images, constant, cosine to zero over the last `decay_images`."""
    warm = min(1.0, (seen + config.batch) / 12_800)
    left = (config.images - seen) / max(config.decay_images, 1)
    return config.lr * warm * (0.5 - 0.5 * math.cos(math.pi * min(max(left, 0.0), 1.0)))


@torch.no_grad()
def average_weights(params: list[nn.Parameter], processes: int) -> None:
    """Replace every process's weights by their mean."""
    flat = torch.cat([p.detach().flatten() for p in params])
    dist.all_reduce(flat)
    flat /= processes
    start = 0
    for p in params:
        p.copy_(flat[start : start + p.numel()].view_as(p))
        start += p.numel()


class Trainer:
    """One process of a training run."""

    def __init__(self, config: TrainConfig, work: Path, rank: int, init: Path | None = None) -> None:
        self.config, self.work, self.rank = config, work, rank
        self.device = torch.device(config.device)
        torch.manual_seed(derive_seed(config.seed, "weights"))  # noqa: TID251 (layers initialise from it)
        self.model = build_model(VOCABULARY)
        self.net = Trainable(self.model).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.device.type == "cpu":
            # The fused CPU attention is slower than plain products at these sizes, above all backward.
            self.model.unet.set_attn_processor(AttnProcessor())
        if init is not None and not (work / STATE).exists():
            self._start_from(init)
        self.params = list(self.net.parameters())
        self.ema = [p.detach().clone() for p in self.params]
        self.optimizer = torch.optim.AdamW(
            self.params, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.step, self.seen, self.seconds = 0, 0, 0.0
        self.stop = False
        if (work / STATE).exists():
            self.load()

    def _start_from(self, folder: Path) -> None:
        """Take over the weights of a prior folder of this architecture and vocabulary."""
        self.model.text_encoder.load_state_dict(
            CLIPTextModel.from_pretrained(folder / "text_encoder").state_dict()
        )
        self.model.unet.load_state_dict(UNet2DConditionModel.from_pretrained(folder / "unet").state_dict())

    def load(self) -> None:
        """Continue from DIR/state.safetensors."""
        numbers, self.ema = load_state(self.work / STATE, self.net, self.optimizer, self.device)
        self.step, self.seen, self.seconds = int(numbers["step"]), int(numbers["seen"]), numbers["seconds"]

    def save(self) -> None:
        """Write the state and the EMA weights as a loadable prior, both atomically."""
        numbers = {"step": self.step, "seen": self.seen, "seconds": self.seconds}
        save_state(self.work / STATE, self.net, self.optimizer, numbers, self.ema)
        averaged = build_model(VOCABULARY)
        for target, value in zip(Trainable(averaged).parameters(), self.ema, strict=True):
            target.data.copy_(value)
        save_model(averaged, self.work / "prior.tmp")
        for part in (self.work / "prior.tmp").rglob("*"):
            if part.is_file():
                goal = self.work / "prior" / part.relative_to(self.work / "prior.tmp")
                goal.parent.mkdir(parents=True, exist_ok=True)
                os.replace(part, goal)

    def update(self, batch: Batch, alphas_cumprod: Tensor, autocast: torch.autocast) -> tuple[Tensor, Tensor]:
        """One optimiser step; loss and gradient norm."""
        loss = denoising_loss(self.net, batch, alphas_cumprod, autocast)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.seen)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.seen += self.config.batch * self.config.processes
        if self.step % self.config.sync_steps == 0:
            if self.config.processes > 1:
                average_weights(self.params, self.config.processes)
            with torch.no_grad():
                keep = min(self.config.ema**self.config.sync_steps, 1 - 1 / (self.step / 50 + 1))
                torch._foreach_lerp_(self.ema, self.params, 1 - keep)
        return loss.detach(), norm.detach()

    def out_of_time(self, started: float) -> bool:
        """Whether this process was told to stop or the time is up; agreed upon by all processes."""
        over = self.stop or time.monotonic() - started > 60 * self.config.minutes
        if self.config.processes == 1:
            return over
        flag = torch.tensor([float(over)])
        dist.all_reduce(flag)
        return bool(flag.item() > 0)

    def run(self) -> None:
        """Train until the budget is spent, the time is up, or SIGTERM/SIGINT arrives; always ends with a save."""
        config = self.config
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        pool = open_pool(self.work / "pool", config.pool_images, IMAGE_PX, config.seed)
        maker = BatchMaker(pool, self.model.tokenizer, PATCH_PX, self.device)
        alphas_cumprod = self.model.scheduler.alphas_cumprod.to(self.device)
        autocast = torch.autocast(self.device.type, torch.bfloat16)
        started = saved = time.monotonic()
        mark, losses, norms = (started, self.seen), [], []
        while self.seen < config.images:
            batch = maker.make(derive_seed(config.seed, "train", self.rank, self.step), config.batch)
            loss, norm = self.update(batch, alphas_cumprod, autocast)
            losses.append(loss)
            norms.append(norm)
            if self.step % 50 == 0:
                now = time.monotonic()
                self.seconds += now - mark[0]
                row = {
                    "step": self.step,
                    "seen": self.seen,
                    "seconds": round(self.seconds, 1),
                    "loss": torch.stack(losses).mean().item(),
                    "grad_norm": torch.stack(norms).mean().item(),
                    "lr": learning_rate(config, self.seen),
                    "images_per_s": (self.seen - mark[1]) / (now - mark[0]),
                }
                mark, losses, norms = (now, self.seen), [], []
                if self.rank == 0:
                    with (self.work / "log.jsonl").open("a", encoding="utf-8") as log:
                        log.write(json.dumps(row) + "\n")
                    if now - saved > 240:
                        self.save()
                        saved = now
            if self.step % config.sync_steps == 0 and self.out_of_time(started):
                break
        if self.rank == 0:
            self.save()

    def _on_signal(self, _number: int, _frame: object) -> None:
        self.stop = True


def _worker(rank: int, config: TrainConfig, work: Path, init: Path | None) -> None:
    torch.set_num_threads(1 if config.device == "cpu" else 4)
    if config.processes > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{work.resolve()}/rendezvous", rank=rank, world_size=config.processes
        )
    Trainer(config, work, rank, init).run()
    if config.processes > 1:
        dist.destroy_process_group()


def parse(argv: list[str] | None) -> tuple[TrainConfig, Path, Path | None]:
    """Command line to config, work folder and prior to start from."""
    parser = argparse.ArgumentParser(description="Train the toybox prior (resumable).")
    parser.add_argument("--work", type=Path, required=True, help="folder for pool, state, log and weights")
    parser.add_argument(
        "--images", type=int, default=4_000_000, help="total images to see, earlier runs included"
    )
    parser.add_argument("--decay-images", type=int, default=400_000, help="length of the final decay")
    parser.add_argument("--pool-images", type=int, default=131_072)
    parser.add_argument("--batch", type=int, default=16, help="images per process and step")
    parser.add_argument("--processes", type=int, default=None, help="default: all CPUs, or 1 on CUDA")
    parser.add_argument("--sync-steps", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop (resumably) after this long")
    parser.add_argument("--init", type=Path, help="prior folder whose weights a new run starts from")
    given = parser.parse_args(argv)
    if given.processes is None:
        given.processes = 1 if given.device == "cuda" else (os.cpu_count() or 1)
    fields = {key: value for key, value in vars(given).items() if key not in ("work", "init")}
    return TrainConfig(**fields), given.work, given.init


def main(argv: list[str] | None = None) -> int:
    """Render the pool, start the processes, wait."""
    config, work, init = parse(argv)
    work.mkdir(parents=True, exist_ok=True)
    (work / "rendezvous").unlink(missing_ok=True)
    (work / "config.json").write_text(json.dumps(asdict(config), indent=2))
    open_pool(work / "pool", config.pool_images, IMAGE_PX, config.seed, threads=os.cpu_count() or 1)
    if config.processes == 1:
        _worker(0, config, work, init)
    else:
        mp.spawn(_worker, args=(config, work, init), nprocs=config.processes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
