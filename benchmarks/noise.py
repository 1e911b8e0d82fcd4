"""What surface noise costs: its time against the bare prior evaluations of the same step, in one run.

    python benchmarks/noise.py [--config toybox/cfd] [--steps 40] [--json FILE]

Both are measured over the last steps of a run, on a formed object. The bar is that noise takes at most a tenth of a
step. `cpu` rows are process time, which other programs on the machine disturb less than wall time.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from common import measured_loop

from sds3d.optimize import Loop


class Clock:
    """Accumulates wall and process time of wrapped calls by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            starts = self.now()
            try:
                return call(*args, **kwargs)
            finally:
                for kind, start, end in zip(("wall", "cpu"), starts, self.now(), strict=True):
                    key = f"{name} {kind}"
                    self.seconds[key] = self.seconds.get(key, 0.0) + end - start

        return timed

    @staticmethod
    def now() -> tuple[float, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def measure(loop: Loop, warm_up: int, steps: int) -> dict[str, float]:
    """Milliseconds per step of noise, prior and whole step."""
    loop.run(loop.index + warm_up, lambda event: None)
    clock, parts = Clock(), loop.parts
    parts.prior.eps = clock.wrap("prior", parts.prior.eps)
    parts.guide.noise.sample = clock.wrap("noise", parts.guide.noise.sample)
    clock.wrap("step", loop.run)(loop.index + steps, lambda event: None)
    return {name: 1e3 * seconds / steps for name, seconds in clock.seconds.items()}


def main() -> None:
    given = measured_loop("toybox/cfd", 40)
    times = measure(given.loop, given.warm_up, given.steps)
    for name, ms in times.items():
        print(f"{name:20s} {ms:8.2f} ms/step")
    ratios = {f"noise / {name}": times["noise cpu"] / times[f"{name} cpu"] for name in ("prior", "step")}
    for name, ratio in ratios.items():
        print(f"{name:20s} {ratio:8.3f} (cpu)")
    if given.json:
        given.json.write_text(json.dumps({**times, **ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
