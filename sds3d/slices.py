"""Some of a step's views: the batch is rendered and guided piece by piece, or by several processes.

What a step draws at random is drawn for all of its views and then cut, so that pieces add up to the whole batch.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from sds3d.rng import Stream
from sds3d.transfer import upload

Record = TypeVar("Record")


@dataclass(frozen=True)
class Slice:
    """Views `start` to `stop` of the `total` views of a step."""

    start: int
    stop: int
    total: int

    @classmethod
    def whole(cls, total: int) -> "Slice":
        """All views."""
        return cls(0, total, total)

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Whether these are all views."""
        return len(self) == self.total

    @property
    def rows(self) -> slice:
        """For indexing a tensor of all views."""
        return slice(self.start, self.stop)

    @property
    def share(self) -> float:
        """Weight of a mean over these views in the mean over all."""
        return len(self) / self.total

    def of(self, record: Record) -> Record:
        """These views of a record whose tensors have one row per view (`Cameras`, `Shading`)."""
        if self.is_whole:
            return record
        known: Any = record
        return replace(known, **{k: v[self.rows] for k, v in vars(known).items() if isinstance(v, Tensor)})

    def stream(self, stream: Stream, per_view: int = 1) -> Stream:
        """The stream that draws for these views what `stream` draws for all, see `SlicedStream`."""
        if self.is_whole:
            return stream
        return SlicedStream(stream.seed, stream.name, stream.counter, part=self, per_view=per_view)

    def pieces(self, size: int | None, multiple: int = 1) -> list["Slice"]:
        """Cut into even pieces of at most `size` views (None = no limit), each a multiple of `multiple` views.

        A size below `multiple` counts as `multiple`: views that belong together are never parted.
        """
        groups = -(-len(self) // multiple)
        count = 1 if size is None else -(-groups // max(size // multiple, 1))
        edges = [self.start + min(groups * i // count * multiple, len(self)) for i in range(count + 1)]
        return [Slice(a, b, self.total) for a, b in pairwise(edges)]


@dataclass(frozen=True)
class SlicedStream(Stream):
    """Draws for all views of a step and hands out the rows of some.

    Tensors whose first axis counts the slice's views, or `per_view` entries of each, are cut; one number alone, and
    anything else, is shared by all views. A stream at another counter is not about this step's views.
    """

    part: Slice = Slice(0, 1, 1)
    per_view: int = 1  # e.g. the pixels of a view, for draws with one row per ray

    def at(self, counter: int) -> Stream:
        """The same stream at another counter, uncut."""
        return Stream(self.seed, self.name, counter)

    def fork(self, name: str) -> Stream:
        """An independent child that is cut in the same way."""
        return replace(self, name=f"{self.name}/{name}")

    def normal(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Standard normal, float32."""
        drawn = super().normal(*self._whole(shape))
        return upload(self._cut(drawn, shape), device)

    def uniform(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Uniform in [0, 1), float32."""
        drawn = super().uniform(*self._whole(shape))
        return upload(self._cut(drawn, shape), device)

    def _block(self, shape: tuple[int, ...]) -> int:
        """Rows per view; 0 where the draw is shared."""
        if not shape or shape == (1,):
            return 0
        return next((n for n in (1, self.per_view) if shape[0] == n * len(self.part)), 0)

    def _whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        block = self._block(shape)
        return (block * self.part.total, *shape[1:]) if block else shape

    def _cut(self, drawn: Tensor, shape: tuple[int, ...]) -> Tensor:
        block = self._block(shape)
        return drawn[block * self.part.start : block * self.part.stop] if block else drawn
