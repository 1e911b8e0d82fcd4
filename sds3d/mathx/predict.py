"""Conversions between what networks predict; the only place where they exist.

a = alpha(t), s = sigma(t) broadcast over x; x_t = a x0 + s eps; v = a eps - s x0 (variance preserving, Salimans &
Ho 2022, arXiv:2202.00512); u = eps - x0 (rectified flow with a = 1 - t, s = t). Keep inputs in float32: the
divisions lose precision near the ends of the schedule.
"""

from jaxtyping import Float
from torch import Tensor

Image = Float[Tensor, "b c h w"]
Column = Float[Tensor, "b 1 1 1"]


def x0_from_eps(x_t: Image, eps: Image, a: Column, s: Column) -> Image:
    """x0 = (x_t - s eps) / a."""
    return (x_t - s * eps) / a


def eps_from_x0(x_t: Image, x0: Image, a: Column, s: Column) -> Image:
    """Eps = (x_t - a x0) / s."""
    return (x_t - a * x0) / s


def eps_from_v(x_t: Image, v: Image, a: Column, s: Column) -> Image:
    """Eps = a v + s x_t, for a^2 + s^2 = 1."""
    return a * v + s * x_t


def v_from_eps(x_t: Image, eps: Image, a: Column, s: Column) -> Image:
    """V = (eps - s x_t) / a, for a^2 + s^2 = 1."""
    return (eps - s * x_t) / a


def eps_from_flow(x_t: Image, u: Image, t: Column) -> Image:
    """Eps = x_t + (1 - t) u, for x_t = (1 - t) x0 + t eps and u = eps - x0."""
    return x_t + (1.0 - t) * u


def flow_from_eps(x_t: Image, eps: Image, t: Column) -> Image:
    """U = (eps - x_t) / (1 - t)."""
    return (eps - x_t) / (1.0 - t)
