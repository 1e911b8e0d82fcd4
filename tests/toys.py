"""Small stand-ins shared by tests: an image that is its own scene, and draws with fixed numbers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

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
from sds3d.rng import Stream


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
