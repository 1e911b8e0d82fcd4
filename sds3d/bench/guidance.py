"""`sds3d bench guidance`: every method on the same prompts, seeds, cameras and number of prior evaluations.

One process per method, so that a method that fails takes only its own runs with it and its peak memory is its own.
Finished runs are kept: the same command goes on where it stopped.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sds3d.bench.passes import count_passes
from sds3d.bench.report import write_report
from sds3d.bench.score import score_run
from sds3d.config.load import config_names, override_layers, setting
from sds3d.errors import ConfigError, InputError
from sds3d.guidance.table import RULES
from sds3d.guidance.terms import term_configs
from sds3d.job import load_job, pick_device
from sds3d.ops.threads import one_thread_per_call
from sds3d.optimize import build_guide
from sds3d.paths import safe_slug, write_atomic
from sds3d.staged import load_stages
from sds3d.toybox.held_out import held_out_pairs
from sds3d.toybox.judge import load_judge, parse_prompt

PREFIX = "toybox/"
DEFAULT_PROMPTS = (
    "a red mug",
    "a yellow duck",
    "a brown chair",
    "a purple mug",
    "a blue mushroom",
    "a pink car",
)


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is compared; `budget` counts prior evaluations per view over a whole run."""

    methods: tuple[str, ...]
    prompts: tuple[str, ...] = DEFAULT_PROMPTS
    seeds: tuple[int, ...] = (0, 1)
    budget: int = 1120
    overrides: tuple[str, ...] = field(default=())

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "BenchConfig":
        """What `asdict` gave, after a trip through JSON."""
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()}
        return cls(**fields)

    def __post_init__(self) -> None:
        for prompt in self.prompts:
            if None in parse_prompt(prompt):
                raise ConfigError(
                    f"bench: the judge cannot score {prompt!r}; name a colour and a kind of the toybox"
                )
        if not self.methods or not self.seeds or not self.prompts:
            raise ConfigError("bench: needs at least one method, one prompt and one seed")


def known_methods(*, experimental: bool = False) -> list[str]:
    """Methods with a toybox preset that make something from a prompt alone; experimental ones only if asked for."""
    found = []
    for name in config_names():
        if not name.startswith(PREFIX):
            continue
        stages = load_stages(name)
        if len(stages) > 1:  # compared are rules, not pipelines
            continue
        infos = [RULES[term.rule.kind].info for term in term_configs(stages[0].job.guidance)]
        edits = any("source" in info.needs or "image prompt" in info.needs for info in infos)
        if not edits and (experimental or not any(info.experimental for info in infos)):
            found.append(name.removeprefix(PREFIX))
    return found


def run_bench(config: BenchConfig, out: Path, say: Any = None) -> dict[str, Any]:
    """Run what is missing, then write bench.json, bench.md and sheet.png into `out`.

    Raises:
        ConfigError: an unknown method. InputError: `out` holds a bench with other settings.
    """
    known = known_methods(experimental=True)
    for method in config.methods:
        if method not in known:
            raise ConfigError(f"bench: unknown method {method!r}; known: {', '.join(known)}")
    _claim(config, out)
    for method in config.methods:
        # A process of its own per method: peak memory is a process's, and a crash takes no other method along.
        line = json.dumps({"method": method, "config": asdict(config), "out": str(out)})
        command = [sys.executable, "-m", __spec__.name, line]
        worker = subprocess.run(command, check=False)  # noqa: S603 (our own module)
        if say is not None:
            say(f"{method}: {_state(method, config, out)}")
        if worker.returncode not in (0, 1):
            _note_failure(out / method, f"the process ended with status {worker.returncode}")
    return write_report(
        config, out, held_out=[p for p in config.prompts if is_held_out(p)], machine=machine()
    )


def run_method(method: str, config: BenchConfig, out: Path) -> None:
    """All runs of one method, in this process; failures are written down, not raised."""
    from sds3d.run import generate, resume

    torch.set_num_threads(1)
    judge = load_judge()
    try:
        steps, passes = plan_steps(method, config)
    except Exception as error:  # noqa: BLE001 (a method that cannot even start is a result of the bench)
        _note_failure(out / method, f"{type(error).__name__}: {error}")
        sys.exit(1)
    failed = False
    for prompt in config.prompts:
        for seed in config.seeds:
            folder = run_folder(out, method, prompt, seed)
            if (folder / "score.json").exists():
                continue
            try:
                started = time.monotonic()
                if (folder / "manifest.json").exists():
                    resume(folder)
                else:
                    generate(_job(method, config, prompt, seed, steps), folder, config_name=PREFIX + method)
                score = score_run(folder, prompt, judge).as_dict()
                facts = {
                    "prompt": prompt,
                    "seed": seed,
                    "steps": steps,
                    "passes_per_step": passes,
                    "optimise_s": _optimise_seconds(folder),
                    "wall_s": round(time.monotonic() - started, 2),
                    "peak_mb": peak_memory_mb(),
                }
                write_atomic(folder / "score.json", json.dumps(score | facts, indent=2).encode())
                (out / method / "failure.txt").unlink(missing_ok=True)
            except Exception as error:  # noqa: BLE001 (one failing run must not take the others with it)
                failed = True
                _note_failure(out / method, f"{prompt!r} seed {seed}: {type(error).__name__}: {error}")
    sys.exit(1 if failed else 0)


def plan_steps(method: str, config: BenchConfig) -> tuple[int, float]:
    """(optimisation steps that spend the budget, prior evaluations per view and step)."""
    job = _job(method, config, config.prompts[0], config.seeds[0], 200)
    device = pick_device(job.device)
    with one_thread_per_call(device):
        passes = count_passes(build_guide(job, device), job)
    if passes <= 0:
        raise InputError(f"bench: {method} asks the prior nothing")
    return max(1, round(config.budget / passes)), passes


def _job(method: str, config: BenchConfig, prompt: str, seed: int, steps: int) -> Any:
    layers = [
        *override_layers(["preview.turntable_frames=0", "preview.every_s=1000000.0", *config.overrides]),
        setting("prompt", prompt, "bench"),
        setting("seed", seed, "bench"),
        setting("steps", steps, "bench"),
    ]
    return load_job(PREFIX + method, layers).config


def run_folder(out: Path, method: str, prompt: str, seed: int) -> Path:
    """Where one run lives."""
    return out / method / f"{safe_slug(prompt)}-{seed}"


def is_held_out(prompt: str) -> bool:
    """Whether the prior never saw this colour on this kind."""
    color, kind = parse_prompt(prompt)
    return color is not None and kind is not None and (color, kind) in held_out_pairs()


def machine() -> str:
    """The machine in a few words."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, {platform.system()}"


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far."""
    scale = 1024 if sys.platform != "darwin" else 1024 * 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale, 1)


def _optimise_seconds(folder: Path) -> float:
    """Sum of the seconds per step that the run logged."""
    total, before = 0.0, 0
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "seconds" in row and "step" in row:
            total += float(row["seconds"]) * (int(row["step"]) - before)
            before = int(row["step"])
    return round(total, 2)


def _claim(config: BenchConfig, out: Path) -> None:
    """Make the folder, or check that the one that is there was made with the same settings."""
    path = out / "settings.json"
    wanted = {key: value for key, value in asdict(config).items() if key in ("budget", "overrides")}
    text = json.dumps(wanted, indent=2)
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != json.loads(text):
            raise InputError(f"{out}: holds a bench with other settings ({path}); give another --out")
        return
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty and holds no bench; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode())


def _note_failure(folder: Path, message: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):
        write_atomic(folder / "failure.txt", message.encode("utf-8", "backslashreplace"))


def _state(method: str, config: BenchConfig, out: Path) -> str:
    done = sum(
        (run_folder(out, method, prompt, seed) / "score.json").exists()
        for prompt in config.prompts
        for seed in config.seeds
    )
    failure = out / method / "failure.txt"
    note = f" (failed: {failure.read_text(encoding='utf-8')[:120]})" if failure.exists() else ""
    return f"{done} of {len(config.prompts) * len(config.seeds)} runs{note}"


def methods_from(text: str, *, experimental: bool = False) -> tuple[str, ...]:
    """`sds,ism` as names; `all` and nothing mean every known method."""
    if text.strip() in ("", "all"):
        return tuple(known_methods(experimental=experimental))
    return _split(text)


def prompts_from(words: Sequence[str]) -> tuple[str, ...]:
    """Prompts given one by one, or one text file with a prompt per line."""
    if len(words) == 1 and Path(words[0]).is_file():
        lines = Path(words[0]).read_text(encoding="utf-8").splitlines()
        return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    return tuple(words) or DEFAULT_PROMPTS


def seeds_from(text: str) -> tuple[int, ...]:
    """`0,1` as numbers."""
    try:
        return tuple(int(part) for part in _split(text))
    except ValueError as error:
        raise ConfigError(f"--seeds: got {text!r}, expected numbers, e.g. 0,1") from error


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    run_method(told["method"], BenchConfig.from_plain(told["config"]), Path(told["out"]))
