"""What step benchmarks share: the command line and the loop that is measured."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from sds3d.config.load import override_layers
from sds3d.job import JobConfig, load_job, pick_device
from sds3d.optimize import Loop, build_loop


@dataclass(frozen=True)
class Measured:
    """A loop, how many of its last steps to measure, and where to write the numbers."""

    loop: Loop
    steps: int
    json: Path | None

    @property
    def warm_up(self) -> int:
        """Steps before: the end of a run is measured, at the final render size, on a formed object."""
        return max(0, self.loop.steps - self.steps)


def measured_loop(config: str, steps: int) -> Measured:
    """The loop that the command line asks for; `config` and `steps` are the defaults."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default=config)
    parser.add_argument(
        "--steps", type=int, default=steps, help="measured steps, taken at the end of the run"
    )
    parser.add_argument("--prompt", default="a red mug")
    parser.add_argument("--json", type=Path)
    parser.add_argument("settings", nargs="*", help="key=value")
    given = parser.parse_args()
    job = load_job(given.config, override_layers([f'prompt="{given.prompt}"', *given.settings])).config
    return Measured(loop_of(job), given.steps, given.json)


def loop_of(job: JobConfig) -> Loop:
    """The loop of a job as a run builds it, with one thread per operator."""
    torch.set_num_threads(1)
    return build_loop(job, pick_device(job.device))
