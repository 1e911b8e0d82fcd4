"""Several scenes that are optimised together under one rule: the particles of VSD."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sds3d.interfaces import (
    Cameras,
    Material,
    Optimizer,
    ParamGroup,
    Render,
    Scene,
    Shading,
    Surface,
)
from sds3d.rng import Stream


@dataclass(frozen=True)
class _Seen:
    """Whose view it is, and what that scene put into it."""

    index: int
    inside: object


@dataclass(frozen=True)
class _Prefixed:
    """An optimiser as one particle sees it: its groups carry the particle's number."""

    inner: Optimizer
    index: int

    def replace(
        self,
        name: str,
        old: nn.Parameter,
        new: nn.Parameter,
        gather: Int[Tensor, " m"],
        fresh: Bool[Tensor, " m"],
    ) -> None:
        """As the optimiser's, for a group of this particle."""
        self.inner.replace(_group(self.index, name), old, new, gather, fresh)


class Particles(Scene):
    """n scenes; every optimisation step shows one of them, drawn at random, to all cameras.

    The rule's student sees the renders of all particles in turn and so learns their common distribution. Outside
    optimisation (no gradients) the scene is its particle `shown`.

    Source: Wang et al. 2023 (ProlificDreamer, arXiv:2305.16213), algorithm 1.
    """

    def __init__(self, scenes: Sequence[Scene]) -> None:
        super().__init__()
        self.scenes = nn.ModuleList(scenes)
        self.penalty_names = scenes[0].penalty_names
        self.shown = 0

    def particle(self, index: int) -> Scene:
        """One of the scenes."""
        scene = self.scenes[index]
        assert isinstance(scene, Scene)
        return scene

    def pick(self, rng: Stream) -> int:
        """The particle of a step: a pure function of the stream."""
        return int(rng.fork("particle").uniform(1) * len(self.scenes))

    def render(self, cameras: Cameras, shading: Shading, rng: Stream, *, progress: float = 1.0) -> Render:
        """One particle from all cameras."""
        index = self.pick(rng) if torch.is_grad_enabled() else self.shown
        view = self.particle(index).render(cameras, shading, rng, progress=progress)
        return replace(view, private=_Seen(index, view.private))

    def groups(self) -> Sequence[ParamGroup]:
        """The groups of all particles, numbered."""
        return [
            replace(group, name=_group(index, group.name))
            for index in range(len(self.scenes))
            for group in self.particle(index).groups()
        ]

    def adapt(self, view: Render, optimizer: Optimizer, step: int) -> None:
        """The particle that was shown adapts."""
        index, inner = _unwrap(view)
        self.particle(index).adapt(inner, _Prefixed(optimizer, index), step)

    def surface(self, cells_per_side: int, *, iso_factor: float = 1.0) -> Surface:
        """The surface of the shown particle."""
        return self.particle(self.shown).surface(cells_per_side, iso_factor=iso_factor)

    def material(self, points: Float[Tensor, "n 3"]) -> Material:
        """The material of the shown particle."""
        return self.particle(self.shown).material(points)

    def penalties(self, view: Render) -> Mapping[str, Float[Tensor, ""]]:
        """Those of the particle in the view."""
        index, inner = _unwrap(view)
        return self.particle(index).penalties(inner)


def _group(index: int, name: str) -> str:
    return f"{index}/{name}"


def _unwrap(view: Render) -> tuple[int, Render]:
    seen = view.private
    if not isinstance(seen, _Seen):
        raise TypeError("this view was not rendered by a Particles scene")
    return seen.index, replace(view, private=seen.inside)
