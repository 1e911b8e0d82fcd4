"""Where an optimisation step goes: prior, render forward, backward (render + penalties), optimiser, rest.

    python benchmarks/step.py [--config default] [--steps 60] [--json FILE]

The bar is the ratio of a whole step to the bare prior evaluations of that step, both taken from the same run. Wall
times are medians over the measured steps after a warm-up; averages over a hold period are exact sums.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from common import measured_loop

from sds3d.optimize import Loop


class Split:
    """Accumulates wall time by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

        return timed


def measure(loop: Loop, warm_up: int, steps: int) -> dict[str, float]:
    """Milliseconds per step by part."""
    loop.run(loop.index + warm_up, lambda event: None)
    split, parts = Split(), loop.parts
    parts.prior.eps = split.wrap("prior", parts.prior.eps)
    parts.scene.render = split.wrap("render forward", parts.scene.render)
    parts.scene.penalties = split.wrap("penalties forward", parts.scene.penalties)
    parts.scene.adapt = split.wrap("adapt", parts.scene.adapt)
    parts.optimizer.adam.step = split.wrap("optimiser", parts.optimizer.adam.step)
    backward = torch.Tensor.backward
    torch.Tensor.backward = split.wrap("backward", backward)
    start = time.perf_counter()
    try:
        loop.run(loop.index + steps, lambda event: None)
    finally:
        torch.Tensor.backward = backward
    total = time.perf_counter() - start
    rest = total - sum(split.seconds.values())
    return {name: 1e3 * s / steps for name, s in {**split.seconds, "rest": rest, "total": total}.items()}


def main() -> None:
    given = measured_loop("default", 60)
    times = measure(given.loop, given.warm_up, given.steps)
    for name, ms in sorted(times.items(), key=lambda item: item[1]):
        print(f"{name:20s} {ms:8.2f} ms/step")
    ratio = times["total"] / times["prior"]
    print(f"{'step / bare prior':20s} {ratio:8.2f}")
    if given.json:
        given.json.write_text(json.dumps({**times, "ratio": ratio}, indent=2) + "\n")


if __name__ == "__main__":
    main()
