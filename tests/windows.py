"""A scene whose views differ, in float64, with a prior of known scores: for tests of how views are dealt out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sds3d.cameras.light import ShadingConfig, ShadingLaw
from sds3d.cameras.sample import CameraConfig, CameraLaw
from sds3d.config.ramp import Ramp
from sds3d.guidance import SDS
from sds3d.guidance.noise import FreshNoise
from sds3d.guidance.terms import Term
from sds3d.guidance.time import UniformTime
from sds3d.guide import Guide
from sds3d.interfaces import Cameras, Material, ParamGroup, Render, Scene, Shading, Surface
from sds3d.job import CheckpointConfig, JobConfig, MemoryConfig, PreviewConfig
from sds3d.optim import Optimizer, OptimizerConfig
from sds3d.optimize import Loop, Parts, PenaltyConfig
from sds3d.priors.analytic import AnalyticPrior, Mixture
from sds3d.priors.text import PromptingConfig, TextBank
from sds3d.rng import Stream, Streams

SIDE = 4
JOB = JobConfig(
    prompt="a red mug",
    steps=5,
    device="cpu",
    memory=MemoryConfig(plan="none"),
    checkpoint=CheckpointConfig(every_steps=2, keep=2),
    preview=PreviewConfig(every_s=1e6, size_px=32, turntable_frames=0),
)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Windows(Scene):
    """Every camera sees the same image through its own tint, with a jitter per pixel and one per ray."""

    penalty_names = ("opacity", "scale")

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Parameter(0.5 + 0.1 * randn(3, 8, 8, seed=7))
        self.asked: list[int] = []  # views per call of `render`

    def render(self, cameras: Cameras, shading: Shading, rng: Stream, *, progress: float = 1.0) -> Render:
        size = (len(cameras), cameras.height_px, cameras.width_px)
        self.asked.append(len(cameras))
        image = nn.functional.interpolate(self.image[None], size=size[1:], mode="bilinear")
        tint = torch.cos(torch.deg2rad(cameras.azimuth_deg).double())[:, None, None, None]
        jitter = rng.uniform(*size)[:, None] + rng.fork("rays").uniform(size[0] * size[1] * size[2]).view(
            size
        ).unsqueeze(1)
        rgb = image * (1.0 + 0.3 * tint) + 0.05 * jitter.double()
        return Render(rgb=rgb, alpha=rgb.mean(1, keepdim=True).sigmoid(), depth=torch.zeros_like(rgb[:, :1]))

    def groups(self) -> Sequence[ParamGroup]:
        return [ParamGroup(name="image", params=[self.image], lr=0.05)]

    def surface(self, cells_per_side: int, *, iso_factor: float = 1.0) -> Surface:
        raise AssertionError("no surface")

    def material(self, points: Tensor) -> Material:
        raise AssertionError("no material")

    def penalties(self, view: Render) -> Mapping[str, Tensor]:
        return {"opacity": view.alpha.mean(), "scale": self.image.square().mean()}


def make_prior() -> AnalyticPrior:
    means = {"y": randn(3, SIDE, SIDE, seed=1), "": randn(3, SIDE, SIDE, seed=2)}
    return AnalyticPrior({name: Mixture.gaussian(mean, 0.3) for name, mean in means.items()})


def build(steps: int = 12, *, batch: int = 4, hold: int = 1, rule: Any = None, **options: Any) -> Loop:
    """A loop of `batch` views per step."""
    prior, streams = make_prior(), Streams(3)
    scene = Windows()
    rule = SDS(SDS.Config(cfg_scale=3.0), prior) if rule is None else rule(prior)
    guide = Guide(
        prior=prior,
        terms=(Term(rule=rule),),
        bank=TextBank(prior, "y", "", PromptingConfig(view_dependent=False)),
        time=UniformTime(UniformTime.Config()),
        noise=options.pop("noise", None) or FreshNoise(FreshNoise.Config(offset=0.2)),
        streams=streams,
        hold=hold,
        **options,
    )
    parts = Parts(
        scene=scene,
        guide=guide,
        camera=CameraLaw(CameraConfig(batch=batch, render_px=Ramp.constant(64.0), hold_steps=hold)),
        shading=ShadingLaw(ShadingConfig()),
        optimizer=Optimizer(scene.groups(), OptimizerConfig()),
        penalties=PenaltyConfig(opacity=Ramp.constant(2.0), scale=Ramp.constant(1.0)),
        streams=streams,
    )
    return Loop(parts, steps)


def quiet(event: object) -> None:
    """An emit that no one hears."""


def write_nothing(scene: Any, folder: Path, config: Any, metadata: Mapping[str, Any]) -> Any:
    """Stands in for `make_asset`."""
    return SimpleNamespace(files={}, as_dict=lambda: {"mesh": {}, "fidelity": None})
