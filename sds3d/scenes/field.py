"""`Field`: what a volume scene asks of the function it renders."""

from collections.abc import Sequence
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from sds3d.interfaces import ParamGroup


class Field(Protocol):
    """Density and colour at points of the world. Differentiable in the parameters.

    `progress` in [0, 1] is the fraction of the run done, for coarse-to-fine fields.
    """

    def density(self, points: Float[Tensor, "n 3"], *, progress: float = 1.0) -> Float[Tensor, " n"]:
        """Volume density in 1/m, not negative; 0 outside the field's bounds."""
        ...

    def density_color(
        self, points: Float[Tensor, "n 3"], *, progress: float = 1.0
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n 3"]]:
        """Density (1/m) and sRGB base colour in [0, 1], from one evaluation."""
        ...

    def groups(self) -> Sequence[ParamGroup]:
        """The field's parameters with their learning rates."""
        ...
