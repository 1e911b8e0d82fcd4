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
    *,
    eta: float = 0.0,
    noise: Float[Tensor, "b c h w"] | None = None,
) -> Float[Tensor, "b c h w"]:
    """x_s = alpha(s) x0_hat + sigma(s) eps, x0_hat = (x_t - sigma(t) eps) / alpha(t); s < t samples, s > t inverts.

    With `eta` > 0 (and s < t) a part eta sigma_s sqrt(1 - (lambda_s / lambda_t)^2), lambda = sigma / alpha, of eps is
    replaced by `noise`; eta = 1 is the ancestral step.

    Source: Song et al. 2020 (arXiv:2010.02502), eq. 12 and 16. For a flow schedule this is Euler's step.
    """
    a_t, s_t, a_s, s_s = schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s)
    x0 = x0_from_eps(x_t, eps, a_t, s_t)
    if eta == 0.0 or noise is None:
        return a_s * x0 + s_s * eps
    fresh = eta * s_s * (1.0 - (s_s * a_t / (a_s * s_t)).square()).clamp(min=0.0).sqrt()
    return a_s * x0 + (s_s.square() - fresh.square()).clamp(min=0.0).sqrt() * eps + fresh * noise
