"""Weights w(t) that multiply the eps residual (eps_hat - noise) = (alpha / sigma) (x - x0_hat)."""

from collections.abc import Callable
from typing import Literal

from jaxtyping import Float
from torch import Tensor

Column = Float[Tensor, "b 1 1 1"]
WeightName = Literal["sds", "uniform", "fantasia3d", "recon", "velocity"]

WEIGHTS: dict[str, Callable[[Column, Column], Column]] = {
    "sds": lambda a, s: s**2,  # DreamFusion (arXiv:2209.14988)
    "uniform": lambda a, s: s**0,
    "fantasia3d": lambda a, s: a * s**2,  # Fantasia3D (arXiv:2303.13873), strategy 0
    "recon": lambda a, s: s / a,  # gradient x - x0_hat: every t weighs alike in image space
    "velocity": lambda a, s: (
        1 / a
    ),  # RFDS (arXiv:2406.03293): on a flow prior the velocity residual v_hat - v
}


def weight(name: WeightName, a: Column, s: Column) -> Column:
    """w(t) by name from a = alpha(t), s = sigma(t).

    sds: sigma^2; uniform: 1; fantasia3d: alpha sigma^2; recon: sigma / alpha; velocity: 1 / alpha.
    """
    return WEIGHTS[name](a, s)
