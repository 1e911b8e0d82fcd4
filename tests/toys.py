"""Small stand-ins shared by tests: an image that is its own scene, draws with fixed numbers, given Gaussians."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from skimage.measure import marching_cubes
from torch import Tensor, nn

from sds3d.cameras.light import ShadingConfig, ShadingLaw
from sds3d.cameras.sample import CameraConfig, CameraLaw
from sds3d.config.ramp import Ramp
from sds3d.guidance import CSD, SDS
from sds3d.guidance.noise import FreshNoise
from sds3d.guidance.terms import Term
from sds3d.guidance.time import UniformTime
from sds3d.guide import Guide
from sds3d.interfaces import (
    Cameras,
    Condition,
    Draw,
    Material,
    NoiseSchedule,
    ParamGroup,
    Render,
    Scene,
    Shading,
    Surface,
)
from sds3d.mesh.clean import to_surface
from sds3d.optim import Optimizer, OptimizerConfig
from sds3d.optimize import Loop, Parts, PenaltyConfig
from sds3d.priors.analytic import AnalyticPrior, Mixture
from sds3d.priors.text import PromptingConfig, TextBank
from sds3d.rng import Stream, Streams
from sds3d.scenes.gaussian_start import raw_values
from sds3d.scenes.gaussians import GaussianScene


class CanvasScene(Scene):
    """Every camera sees the same trainable image: distillation becomes plain sampling in image space."""

    penalty_names = ("opacity",)

    def __init__(self, size_px: int = 4, lr: float = 0.05) -> None:
        super().__init__()
        self.image = nn.Parameter(torch.full((3, size_px, size_px), 0.5))
        self.lr = lr

    def render(self, cameras: Cameras, shading: Shading, rng: Stream, *, progress: float = 1.0) -> Render:
        rgb = self.image[None].expand(len(cameras), -1, -1, -1)
        return Render(rgb=rgb, alpha=rgb.mean(1, keepdim=True), depth=torch.zeros_like(rgb[:, :1]))

    def groups(self) -> Sequence[ParamGroup]:
        return [ParamGroup(name="image", params=[self.image], lr=self.lr)]

    def surface(self, cells_per_side: int, *, iso_factor: float = 1.0) -> Surface:
        raise AssertionError("a canvas has no surface")

    def material(self, points: Tensor) -> Material:
        raise AssertionError("a canvas has no material")

    def penalties(self, view: Render) -> Mapping[str, Tensor]:
        return {"opacity": view.alpha.mean()}


def draw_at(t: Sequence[float], noise: Tensor, schedule: NoiseSchedule) -> Draw:
    """A draw with given times and noise, in the dtype of the noise."""
    return Draw(
        t=torch.tensor(t, dtype=noise.dtype), noise=noise, schedule=schedule, stream=Stream(0, "test")
    )


def told(text: Tensor, null: Tensor, count: int) -> Condition:
    """A condition of `count` views from one text and one null embedding (n d)."""
    return Condition(text=text.expand(count, -1, -1), null=null.expand(count, -1, -1))


CANVAS_TARGET = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(1))


def canvas_loop(steps: int = 60, hold: int = 1, rule: str = "sds", seed: int = 0, **options: Any) -> Loop:
    """A loop that pulls a canvas to CANVAS_TARGET; `options` are those of Loop and some of its parts."""
    prior = AnalyticPrior(
        {"y": Mixture.gaussian(CANVAS_TARGET, 0.01), "": Mixture.gaussian(CANVAS_TARGET * 0 + 0.5, 0.01)}
    )
    scene = CanvasScene()
    rules = {"sds": SDS(SDS.Config(cfg_scale=1.0), prior), "csd": CSD(CSD.Config(), prior)}
    guide = Guide(
        prior=prior,
        terms=options.pop("terms", None) or (Term(rule=rules[rule]),),
        bank=TextBank(prior, "y", "", PromptingConfig(view_dependent=False)),
        time=UniformTime(UniformTime.Config()),
        noise=FreshNoise(FreshNoise.Config()),
        streams=Streams(seed),
        hold=hold,
    )
    parts = Parts(
        scene=scene,
        guide=guide,
        camera=CameraLaw(CameraConfig(batch=2, render_px=Ramp.constant(8.0), hold_steps=hold)),
        shading=ShadingLaw(ShadingConfig()),
        optimizer=Optimizer(scene.groups(), options.pop("optimizer", OptimizerConfig())),
        penalties=options.pop("penalties", PenaltyConfig()),
        streams=Streams(seed),
    )
    return Loop(parts, steps, **options)


RED, GREEN, WHITE = (0.8, 0.15, 0.1), (0.1, 0.6, 0.2), (0.95, 0.95, 0.9)


class Mug(Scene):
    """A signed distance field: cup minus hollow plus ring; colours by region; sphere-traced renders.

    Red in front, green behind, white inside, the handle on +x: no mirror image of it is the same.
    """

    def __init__(self, *, shiny_handle: bool = False) -> None:
        super().__init__()
        self.shiny_handle = shiny_handle

    def distance(self, p):
        radial = p[:, [0, 2]].norm(dim=1)
        cup = torch.maximum(radial - 0.5, p[:, 1].abs() - 0.6)
        hollow = torch.maximum(radial - 0.38, (p[:, 1] - 0.2).abs() - 0.65)
        ring = (
            torch.stack([(p[:, [0, 1]] - torch.tensor([0.55, 0.0])).norm(dim=1) - 0.3, p[:, 2]], 1).norm(
                dim=1
            )
            - 0.09
        )
        return torch.maximum(torch.minimum(cup, ring), -hollow)

    def normal(self, p):
        steps = 1e-3 * torch.eye(3)
        return torch.stack([self.distance(p + s) - self.distance(p - s) for s in steps], dim=1)

    def color(self, p):
        radial = p[:, [0, 2]].norm(dim=1, keepdim=True)
        outside = torch.where(p[:, 2:] > 0, torch.tensor(RED), torch.tensor(GREEN))
        return torch.where(radial < 0.44, torch.tensor(WHITE), outside)

    def material(self, points):
        metallic = torch.zeros(len(points), 1)
        if self.shiny_handle:
            metallic = (points[:, :1] > 0.55).float()
        return Material(
            base_color=self.color(points), metallic=metallic, roughness=torch.full_like(metallic, 0.7)
        )

    def surface(self, cells_per_side, *, iso_factor=1.0):
        axis = torch.linspace(-1, 1, cells_per_side + 1)
        grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).reshape(-1, 3)
        field = self.distance(grid).reshape([cells_per_side + 1] * 3).numpy()
        vertices, faces, _, _ = marching_cubes(field, 0.0, gradient_direction="ascent")
        return to_surface(vertices * 2.0 / cells_per_side - 1.0, faces)

    def render(self, cameras, shading, rng, *, progress=1.0):
        fine = cameras.resized(2 * cameras.width_px)
        size = fine.width_px
        v, u = torch.meshgrid(*[torch.arange(size) + 0.5] * 2, indexing="ij")
        rgb, alpha = [], []
        for c2w, k in zip(fine.c2w, fine.intrinsics, strict=True):
            local = torch.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], torch.ones_like(u)], -1)
            rays = torch.nn.functional.normalize(local.reshape(-1, 3) @ c2w[:3, :3].T, dim=1)
            t = torch.full((len(rays),), 2.0)
            for _ in range(60):
                t += self.distance(c2w[:3, 3] + t[:, None] * rays)
            points = c2w[:3, 3] + t[:, None] * rays
            hit = (self.distance(points).abs() < 3e-3) & (t < 6)
            alpha.append(hit.float().reshape(1, size, size))
            rgb.append((self.color(points) * hit[:, None]).T.reshape(3, size, size))
        alpha, rgb = (torch.nn.functional.avg_pool2d(torch.stack(x), 2) for x in (alpha, rgb))
        rgb = rgb + (1 - alpha) * shading.background[:, :, None, None]
        return Render(rgb=rgb, alpha=alpha, depth=torch.zeros_like(alpha))

    def groups(self):
        return []


def shell(count: int = 3000, radius: float = 0.6) -> Tensor:
    """Points spread evenly over a sphere."""
    i = torch.arange(count) + 0.5
    y = 1 - 2 * i / count
    a = math.pi * (3 - math.sqrt(5)) * i
    ring = (1 - y * y).sqrt()
    return radius * torch.stack([ring * a.sin(), y, ring * a.cos()], -1)


def gaussians_at(
    means: Tensor, scale: float = 0.03, opacity: float = 0.9, color: Tensor | None = None
) -> GaussianScene:
    """A scene that consists of exactly these round Gaussians."""
    made = GaussianScene(
        GaussianScene.Config(count=300, cap=600, adapt_every_steps=5), Stream(3, "gaussians")
    )
    count = len(means)
    color = torch.full((count, 3), 0.5) if color is None else color
    quats = torch.tensor([[1.0, 0, 0, 0]]).repeat(count, 1)
    scales, opacities = torch.full((count, 3), scale), torch.full((count,), opacity)
    made.start_from(raw_values(means.float(), quats, scales, opacities, color))
    return made
