"""Steps of the probability-flow ODE between two times of one schedule."""

from jaxtyping import Float
from torch import Tensor

from sds3d.interfaces import NoiseSchedule
from sds3d.mathx.predict import x0_from_eps


def ddim_step(
    x_t: Float[Tensor, "b c h w"],
    eps: Float[Tensor, "b c h w"],
    schedule: NoiseSchedule,
    t: Float[Tensor, " b"],
    s: Float[Tensor, " b"],
) -> Float[Tensor, "b c h w"]:
    """x_s = alpha(s) x0_hat + sigma(s) eps, x0_hat = (x_t - sigma(t) eps) / alpha(t); s < t samples, s > t inverts.

    Source: Song et al. 2020 (arXiv:2010.02502), eq. 12 with eta = 0. For a flow schedule this is Euler's step.
    """
    x0 = x0_from_eps(x_t, eps, schedule.alpha(t), schedule.sigma(t))
    return schedule.alpha(s) * x0 + schedule.sigma(s) * eps
