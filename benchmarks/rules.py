"""What a guidance rule costs beyond its bare prior evaluations: ratio of times in one run.

    python benchmarks/rules.py [--views 4] [--repeats 9] [--only sds,ism]

For every toybox preset the network calls of one residual are recorded and replayed alone; the table gives the median
time of the whole residual over that of the replay. Students and rewards do work of their own, which is not replayed.
"""

import argparse
import statistics
import time
from typing import Any

import torch

from sds3d.bench.guidance import PREFIX, known_methods
from sds3d.cameras.sample import CameraLaw
from sds3d.config.load import override_layers
from sds3d.guide import Guide
from sds3d.interfaces import Render, Shading
from sds3d.job import load_job
from sds3d.moment import Moment
from sds3d.ops.threads import one_thread_per_call
from sds3d.optimize import build_guide


class Recorder:
    """Passes calls on to a prior and remembers them."""

    def __init__(self, prior: Any) -> None:
        self.prior = prior
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.prior, name)

    def eps(self, *call: Any) -> Any:
        self.calls.append(call)
        return self.prior.eps(*call)


def measure(method: str, views: int, repeats: int) -> tuple[float, float, int]:
    """(median residual ms, median replay ms, bundles asked for)."""
    words = ["prompt=a red mug", f"camera.batch={views}", "camera.render_px=64"]
    job = load_job(PREFIX + method, override_layers(words)).config
    guide = build_guide(job, torch.device("cpu"))
    whole, bare = [], []
    bundles = 0
    for repeat in range(repeats + 2):
        now = Moment(repeat * job.steps // (repeats + 2), job.steps)
        spent, calls = ask(guide, CameraLaw(job.camera), now)
        start = time.perf_counter()
        for call in calls:
            guide.prior.eps(*call)
        replay = time.perf_counter() - start
        if repeat >= 2:  # the first calls warm caches up
            whole.append(1e3 * spent)
            bare.append(1e3 * replay)
        bundles = sum(len(call) - 2 for call in calls)
    return statistics.median(whole), statistics.median(bare), bundles


def ask(guide: Guide, law: CameraLaw, now: Moment) -> tuple[float, list[tuple[Any, ...]]]:
    """Seconds of one residual of the first rule, and the calls it made."""
    cameras = law.sample(now, guide.streams.stream("camera", now.step))
    blank = torch.ones(len(cameras), 1, 64, 64)
    view = Render(rgb=0.5 + 0.1 * torch.rand(len(cameras), 3, 64, 64), alpha=blank, depth=3.0 * blank)
    x = guide.prior.encode(view.rgb)
    cond = guide.bank.for_views(cameras, Shading(background=torch.ones(len(cameras), 3)))
    draw = guide.draw(view, x, cameras, now)
    rule = guide.terms[0].rule
    recorder = Recorder(guide.prior)
    rule.prior = recorder  # type: ignore[assignment]
    start = time.perf_counter()
    rule.residual(x, draw, cond)
    spent = time.perf_counter() - start
    rule.prior = guide.prior
    return spent, recorder.calls


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    names = [name for name in given.only.split(",") if name] or known_methods(experimental=True)
    print("| method | bundles | residual ms | bare prior ms | ratio |\n|---|---|---|---|---|")
    with one_thread_per_call(torch.device("cpu")):
        for method in names:
            whole, bare, bundles = measure(method, given.views, given.repeats)
            print(f"| {method} | {bundles} | {whole:.1f} | {bare:.1f} | {whole / bare:.2f} |", flush=True)


if __name__ == "__main__":
    main()
