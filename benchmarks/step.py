"""Where an optimisation step goes: prior, encode, render, backward of both, optimiser, rest.

    python benchmarks/step.py [--config default] [--steps 60] [--json FILE] [key=value ...]
    python benchmarks/step.py --prior sd21 --random-weights --render 512 --batch 4 --scene gaussians

The bar is the ratio of a whole step to the bare network calls of that step: the same rows, in the same precision,
measured in turns in the same process. With --random-weights the network has the architecture of the real model and
nothing is downloaded; --toy shrinks it until a step takes a moment on a CPU.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import Measured, loop_of

from sds3d.config.load import override_layers
from sds3d.interfaces import Render
from sds3d.job import JobConfig, load_job, pick_device
from sds3d.optimize import Loop
from sds3d.priors.blank import ARCHITECTURES, blank_prior
from sds3d.priors.network import Denoiser, NetworkPrior, Rows
from sds3d.priors.wrapped import WrappedPrior

ROUNDS = 3  # in which whole steps and bare network calls take turns
SPLIT_STEPS = 12
CONFIGS = {"gaussians": "gaussians", "nerf": "nerf", "voxel": "default"}
# One guided prediction per step: the smallest amount of work for the prior, so the hardest case for the ratio.
PLAIN_SDS = ("guidance.target_steps=1", "guidance.clip_x0=false", "camera.hold_steps=1")
PARTS = (
    "prior",
    "encode forward",
    "encode backward",
    "render forward",
    "render backward",
    "optimiser",
    "rest",
)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Split:
    """Wall time by name; what runs inside another part counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.open = ["rest"]
        self.mark = time.perf_counter()

    def charge(self, name: str | None = None) -> None:
        """Book the time since the last booking, to the innermost open part unless a name is given."""
        synchronize()
        now = time.perf_counter()
        name = name or self.open[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.mark
        self.mark = time.perf_counter()

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.charge()
            self.open.append(name)
            try:
                return call(*args, **kwargs)
            finally:
                self.charge()
                self.open.pop()

        return timed

    def encoder(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The encoder, with marks where its backward pass starts and where it hands the gradient of the render on."""
        timed = self.wrap("encode forward", call)

        def encode(rgb: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled() and rgb.requires_grad:
                rgb = rgb.view_as(rgb)
                rgb.register_hook(lambda grad: self.charge("encode backward"))
            x = timed(rgb)
            if x.requires_grad:
                x.register_hook(lambda grad: self.charge())
            return x

        return encode


@contextmanager
def instrumented(loop: Loop, split: Split) -> Iterator[None]:
    """While this lasts, the parts of a step are timed."""
    parts = loop.parts
    prior, scene, adam = parts.prior, parts.scene, parts.optimizer.adam
    penalties = scene.penalties

    def asked(view: Render) -> dict[str, torch.Tensor]:
        """Scenes may compute penalties when they are looked up."""
        known = penalties(view)
        return {name: known[name] for name in loop.weights}

    with (
        mock.patch.object(prior, "eps", split.wrap("prior", prior.eps)),
        mock.patch.object(prior, "encode", split.encoder(prior.encode)),
        mock.patch.object(scene, "render", split.wrap("render forward", scene.render)),
        mock.patch.object(scene, "penalties", split.wrap("render forward", asked)),
        mock.patch.object(scene, "adapt", split.wrap("adapt", scene.adapt)),
        mock.patch.object(adam, "step", split.wrap("optimiser", adam.step)),
        mock.patch("torch.autograd.backward", split.wrap("render backward", torch.autograd.backward)),
        mock.patch("torch.autograd.grad", split.wrap("render backward", torch.autograd.grad)),
    ):
        yield


def network_of(loop: Loop) -> NetworkPrior:
    """The network prior inside any wrappers."""
    prior = loop.parts.prior
    while isinstance(prior, WrappedPrior):
        prior = prior.inner
    if not isinstance(prior, NetworkPrior):
        raise SystemExit(f"step.py: a {type(prior).__name__} is no network; its bare cost means nothing")
    return prior


def bare_calls(loop: Loop, steps: int) -> list[tuple[Denoiser, Rows]]:
    """The network calls without gradient of the next steps."""
    prior, calls = network_of(loop), []
    call = prior._call

    def noted(denoiser: Denoiser, rows: Rows) -> torch.Tensor:
        if not torch.is_grad_enabled():
            calls.append((denoiser, rows))
        return call(denoiser, rows)

    with mock.patch.object(prior, "_call", noted):
        loop.run(loop.index + steps, print_warnings)
    return calls


def print_warnings(event: Any) -> None:
    message = getattr(event, "message", None)
    if message:
        print(message, file=sys.stderr)


def seconds(call: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def measure(given: Measured) -> dict[str, Any]:
    """Seconds per step and bare network seconds per step, in turns; then the split, then the peak of memory."""
    loop, hold = given.loop, given.loop.parts.guide.hold
    prior = network_of(loop)
    loop.run(loop.index + max(given.warm_up - hold - SPLIT_STEPS, 2), print_warnings)
    calls = bare_calls(loop, hold)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    per_round = max(1, given.steps // ROUNDS)
    whole, bare = [], []

    @torch.no_grad()
    def ask() -> None:
        for _ in range(max(1, per_round // hold)):
            for denoiser, rows in calls:
                prior._call(denoiser, rows)

    for _ in range(ROUNDS):
        whole.append(seconds(lambda: loop.run(loop.index + per_round, lambda event: None)) / per_round)
        bare.append(seconds(ask) / (max(1, per_round // hold) * hold))
    peak = peak_bytes()
    split = Split()
    with instrumented(loop, split):
        split.mark = time.perf_counter()
        loop.run(loop.index + SPLIT_STEPS, lambda event: None)
        split.charge()
    ratios = [step / network for step, network in zip(whole, bare, strict=True)]
    return {
        "seconds_per_step": statistics.median(whole),
        "bare_prior_seconds_per_step": statistics.median(bare),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "measured_steps": ROUNDS * per_round,
        "rows_per_step": sum(len(rows.x) for _, rows in calls) / hold,
        "split_ms": {name: 1e3 * value / SPLIT_STEPS for name, value in split.seconds.items()},
        "peak_gib": peak / 2**30,
    }


def peak_bytes() -> int:
    """Allocated by torch on CUDA; of the whole process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def surroundings(device: torch.device) -> dict[str, str]:
    """What the numbers belong to."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{cpu_name()}, one thread per operator"
    )
    return {"device": name, "torch": torch.__version__, "commit": commit()}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain") else "")


HEAD = (
    "| what | ms/step | prior | encode f + b | render f + b | optimiser | rest | step / bare prior | peak GiB |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def markdown(found: dict[str, Any]) -> str:
    """One line of the table whose head is `HEAD`."""
    ms = {name: found["split_ms"].get(name, 0.0) for name in PARTS}
    rest = sum(value for name, value in found["split_ms"].items() if name not in PARTS) + ms["rest"]
    cells = [
        found["what"],
        f"{1e3 * found['seconds_per_step']:.0f}",
        f"{ms['prior']:.0f}",
        f"{ms['encode forward']:.0f} + {ms['encode backward']:.0f}",
        f"{ms['render forward']:.0f} + {ms['render backward']:.0f}",
        f"{ms['optimiser']:.1f}",
        f"{rest:.1f}",
        f"{found['ratio']:.2f}",
        f"{found['peak_gib']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="config name or file; by default that of the scene")
    parser.add_argument(
        "--prior", help=f"name or folder; with --random-weights one of {', '.join(ARCHITECTURES)}"
    )
    parser.add_argument(
        "--random-weights", action="store_true", help="the architecture of --prior, no download"
    )
    parser.add_argument("--toy", action="store_true", help="shrink the architecture")
    parser.add_argument("--render", type=int, help="side of the render, and of the image a latent prior sees")
    parser.add_argument("--batch", type=int, help="views per step")
    parser.add_argument("--scene", choices=CONFIGS, help="kind of scene")
    parser.add_argument("--steps", type=int, default=60, help="measured steps")
    parser.add_argument("--prompt", default="a red mug")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("settings", nargs="*", help="key=value, e.g. prior.vae=tiny prior.compile=default")
    return parser.parse_intermixed_args(words)


def job_of(given: argparse.Namespace) -> JobConfig:
    """The run that is measured."""
    settings = [f'prompt="{given.prompt}"']
    if given.prior and not given.random_weights:
        settings.append(f"prior.name={given.prior}")
    if given.random_weights:
        settings += [*PLAIN_SDS, f"steps={given.steps + SPLIT_STEPS + 20}"]
        if given.render and not given.toy and ARCHITECTURES[given.prior].vae is not None:
            settings.append(f"prior.image_px={given.render}")
    if given.render:
        settings.append(f"camera.render_px={given.render}")
    if given.batch:
        settings.append(f"camera.batch={given.batch}")
    config = given.config or CONFIGS[given.scene or "voxel"]
    return load_job(config, override_layers([*settings, *given.settings])).config


def main(words: list[str] | None = None) -> dict[str, Any]:
    given = arguments(words)
    if given.random_weights and given.prior not in ARCHITECTURES:
        raise SystemExit(f"--random-weights needs --prior {' or '.join(ARCHITECTURES)}")
    job = job_of(given)
    device = pick_device(job.device)
    if given.random_weights:
        prior = blank_prior(given.prior, job.prior, device, toy=given.toy)
        with mock.patch("sds3d.priors.load_prior", return_value=prior):
            loop = loop_of(job)
    else:
        loop = loop_of(job)
    found = {
        "what": what(given, job, loop),
        **measure(Measured(loop, given.steps, given.json)),
        **surroundings(device),
    }
    for name, ms in sorted(found["split_ms"].items(), key=lambda item: item[1]):
        print(f"{name:20s} {ms:8.2f} ms/step")
    print(f"{'whole step':20s} {1e3 * found['seconds_per_step']:8.2f} ms/step (without the clocks above)")
    print(f"{'bare prior':20s} {1e3 * found['bare_prior_seconds_per_step']:8.2f} ms/step")
    print(f"{'step / bare prior':20s} {found['ratio']:8.2f}")
    print(f"{found['device']}, torch {found['torch']}, commit {found['commit']}\n\n{HEAD}\n{markdown(found)}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")
    return found


def what(given: argparse.Namespace, job: JobConfig, loop: Loop) -> str:
    """Prior, scene and sizes in words."""
    prior = network_of(loop)
    name = f"{given.prior} (random{', toy' if given.toy else ''})" if given.random_weights else job.prior.name
    options = [str(prior.dtype).removeprefix("torch.")]
    options += [] if prior.is_pixel else [f"{job.prior.vae} VAE"]
    options += [] if job.prior.compile == "off" else [f"compile {job.prior.compile}"]
    told = ("prior.vae=", "prior.dtype=", "prior.compile=")
    options += [word for word in given.settings if not word.startswith(told)]
    size = round(job.camera.render_px.end)
    return f"{name}, {', '.join(options)}; {job.scene.kind} {size} px x {job.camera.batch}"


if __name__ == "__main__":
    main()
