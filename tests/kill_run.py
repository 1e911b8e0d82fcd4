"""Kills a run again and again and lets it go on each time: `python -m tests.kill_run OUT KILLS SEED`.

Every life is a fork of a process that has loaded everything and done nothing, so that it costs moments. It ends itself
by SIGKILL at a random time after a random number of steps, and so in the middle of whatever goes on: a step, a preview,
a checkpoint, the export. Prints one JSON line: lives, kills, and the steps at which lives began.
"""

import json
import os
import random
import signal
import sys
import threading
from pathlib import Path

import torch

from sds3d.config.load import override_layers
from sds3d.events.bus import PreviewReady
from sds3d.job import JobConfig, load_job
from sds3d.priors import load_prior
from sds3d.priors.shelf import keeping_priors
from sds3d.run import generate, resume

SETTINGS = [
    "prompt=a red mug",
    "device=cpu",
    "camera.batch=2",
    "checkpoint.every_steps=2",
    "preview.every_s=0",
    "preview.size_px=32",
    "preview.turntable_frames=0",
    "export.cells_per_side=24",
    "export.texture_px=128",
    "export.compare_views=0",
]


def job_of(kills: int) -> JobConfig:
    """A run of a few seconds with some steps for every kill."""
    return load_job("fast", override_layers([*SETTINGS, f"steps={max(40, 8 * kills)}"])).config


class Doom:
    """Kills its own process a moment after its last step; every step shows a preview."""

    def __init__(self, steps_left: int, delay_s: float) -> None:
        self.steps_left, self.delay_s = steps_left, delay_s

    def __call__(self, event: object) -> None:
        self.steps_left -= isinstance(event, PreviewReady)
        if self.steps_left == 0 and isinstance(event, PreviewReady):
            threading.Timer(self.delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()


def live(job: JobConfig, out: Path, doom: Doom | None) -> int:
    """One life in a fork; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            listeners = [] if doom is None else [doom]
            if (out / "manifest.json").is_file():
                resume(out, listeners=listeners)
            else:
                generate(job, out, listeners=listeners)
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 (a fork must not go on as its parent)
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def steps_done(out: Path) -> int:
    """How far the run's last checkpoint is."""
    return max((int(path.stem[5:]) for path in (out / "checkpoints").glob("step-*.safetensors")), default=0)


def main(out: Path, kills: int, seed: int) -> None:
    """Kill the run `kills` times, then let it end."""
    job, rng, ends, begins = job_of(kills), random.Random(seed), [], []
    with keeping_priors():
        load_prior(job.prior, torch.device("cpu"))
        for _ in range(kills):
            begins.append(steps_done(out))
            doom = Doom(rng.randint(1, job.steps // kills), rng.uniform(0.0, 0.08))
            ends.append(live(job, out, doom))
        last = live(job, out, None)
    sys.stdout.write(json.dumps({"ends": ends, "last": last, "begins": begins, "steps": job.steps}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
