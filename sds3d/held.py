"""Residuals that several steps share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.interfaces import Residual
from sds3d.parallel import Team
from sds3d.slices import Slice


@dataclass(frozen=True, kw_only=True)
class Held:
    """A residual that several steps share: grad = weight (x - target), and its image-space companion."""

    target: Float[Tensor, "b c h w"]
    weight: Float[Tensor, "b 1 1 1"]
    image_target: Float[Tensor, "b 3 P P"] | None = None
    image_weight: float = 0.0

    @classmethod
    def from_residual(cls, residual: Residual) -> "Held | None":
        """What can be held of a residual; None where it has no clean target."""
        if residual.target is None or residual.weight is None:
            return None
        return cls(
            target=residual.target,
            weight=residual.weight,
            image_target=residual.image_target,
            image_weight=residual.image_weight,
        )

    def of(self, part: Slice) -> "Held":
        """The same for some of the views."""
        image = None if self.image_target is None else self.image_target[part.rows]
        return replace(self, target=self.target[part.rows], weight=self.weight[part.rows], image_target=image)

    def pull(self, x: Float[Tensor, "b c h w"]) -> Residual:
        """The residual at another x."""
        return Residual(
            grad=self.weight * (x - self.target),
            image_target=self.image_target,
            image_weight=self.image_weight,
        )


def joined(pieces: Sequence[Held], team: Team) -> Held:
    """What was held of the pieces of a step, in all processes, as one."""

    def whole(parts: list[Tensor]) -> Tensor:
        return team.gather(parts[0] if len(parts) == 1 else torch.cat(parts))

    images = [held.image_target for held in pieces if held.image_target is not None]
    return Held(
        target=whole([held.target for held in pieces]),
        weight=whole([held.weight for held in pieces]),
        image_target=whole(images) if images else None,
        image_weight=pieces[0].image_weight,
    )
