"""How a step makes do with little memory, and how to tell that there was too little."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

import torch

from sds3d.errors import Sds3dError
from sds3d.parallel import Team

Result = TypeVar("Result")
MIN_RENDER_PX = 32  # renders are not made smaller than this
MIN_RENDER_SCALE = 0.25
_CPU_ALLOCATOR = ("DefaultCPUAllocator", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class NoRoomError(Sds3dError):
    """A step does not fit into memory however it is cut."""


@dataclass(frozen=True, kw_only=True)
class Economy:
    """How a step saves memory; the default saves nothing.

    The gradient does not depend on `micro_batch`, up to rounding.
    """

    micro_batch: int | None = None  # views rendered and guided at once, gradients accumulate; None = all
    render_scale: float = 1.0  # factor on the side of renders

    def tighter(self, views: int, multiple: int, render_px: int) -> "Economy | None":
        """The next level: half as many views at once, down to `multiple`; then smaller renders; then None.

        `views` is what one process handles per step, `render_px` the side of its renders at full size.
        """
        at_once = min(self.micro_batch or views, views)
        if at_once > multiple:
            return replace(self, micro_batch=max(-(-at_once // 2) // multiple, 1) * multiple)
        scale = 0.5 * self.render_scale
        if scale < MIN_RENDER_SCALE or scale * render_px < MIN_RENDER_PX:
            return None
        return replace(self, render_scale=scale)

    def both(self, other: "Economy") -> "Economy":
        """The tighter of two economies, setting by setting."""
        return Economy(
            micro_batch=_least(self.micro_batch, other.micro_batch),
            render_scale=min(self.render_scale, other.render_scale),
        )

    def size_px(self, full_px: int) -> int:
        """The side of renders."""
        return max(8, round(self.render_scale * full_px / 8) * 8)

    def words(self) -> str:
        """For messages."""
        said = []
        if self.micro_batch is not None:
            said.append(f"{self.micro_batch} view{'s' * (self.micro_batch > 1)} at a time")
        if self.render_scale < 1.0:
            said.append(f"renders {1 / self.render_scale:g} times smaller")
        return ", ".join(said) or "all views at once"

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "Economy":
        """What `as_dict` gave; unknown entries are ignored."""
        return cls(**{spec.name: plain[spec.name] for spec in fields(cls) if spec.name in plain})


def _least(a: int | None, b: int | None) -> int | None:
    given = [value for value in (a, b) if value is not None]
    return min(given) if given else None


def out_of_memory(error: BaseException) -> str | None:
    """The first line of an error that says that memory ran out, on any device; None for all other errors."""
    text = str(error).partition("\n")[0].strip()
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return text or type(error).__name__
    told = isinstance(error, RuntimeError) and any(mark in str(error) for mark in _CPU_ALLOCATOR)
    return text if told else None


def with_room(
    attempt: Callable[[], Result], undo: Callable[[], None], economize: Callable[[str], None], team: Team
) -> Result:
    """What `attempt` gives. Where memory runs out, in any process: undo, economize (told the reason), and again."""
    while True:
        results: list[Result] = []
        lack = None
        try:
            results.append(attempt())
        except Exception as error:
            lack = out_of_memory(error)
            if lack is None:
                raise
        # Out here the error is gone, and with it its hold on everything that the attempt had made.
        if not team.any(lack is not None):
            return results[0]
        results.clear()
        undo()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        economize(lack or "in another process")
