"""Score distillation sampling, with one-step or multi-step clean targets."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.guidance.predict import predict
from sds3d.interfaces import Condition, Draw, Prior, Residual, Rule
from sds3d.mathx.ode import ddim_step
from sds3d.mathx.predict import eps_from_x0, x0_from_eps
from sds3d.mathx.weight import WeightName, weight

Image = Float[Tensor, "b c h w"]


class SDS(Rule):
    """Score distillation sampling: grad = w(t) (eps_hat(x_t; t, y) - noise).

    Written with the clean estimate it is grad = w (alpha / sigma) (x - x0_hat). With `target_steps` = K > 1, x0_hat
    comes from K DDIM steps t, t (K-1)/K, ..., t/K instead of one: sharper and consistent with one image.

    Source: Poole et al. 2022 (arXiv:2209.14988), eq. 3; multi-step targets: Zhu & Zhuang 2023 (HiFA,
    arXiv:2305.18766), section 3.1.
    """

    has_target = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of SDS."""

        cfg_scale: float = option(
            7.5, help="classifier-free guidance; 0 = unconditional, 1 = conditional", ge=0.0
        )
        weight: WeightName = option("recon", help="w(t) on the eps residual; recon = x - x0_hat")
        target_steps: int = option(1, help="DDIM steps behind the clean target; 1 = plain SDS", ge=1, le=50)
        clip_x0: bool = option(False, help="keep clean estimates in [-1, 1] (pixel priors only)")

    def __init__(self, config: Config, prior: Prior) -> None:
        super().__init__()
        self.config, self.prior = config, prior

    def residual(self, x: Image, draw: Draw, cond: Condition) -> Residual:
        """Grad = w (alpha / sigma) (x - x0_hat); the target is x0_hat."""
        a, s = draw.schedule.alpha(draw.t), draw.schedule.sigma(draw.t)
        x_t, t, x0 = draw.diffuse(x), draw.t, x
        steps = self.config.target_steps
        for k in range(steps):
            x0, eps = self._clean(x_t, t, cond)
            if k + 1 < steps:
                later = draw.schedule.snap(draw.t * (1.0 - (k + 1) / steps))
                x_t = ddim_step(x_t, eps, draw.schedule, t, later)
                t = later
        pull = weight(self.config.weight, a, s) * a / s
        return Residual(grad=pull * (x - x0), target=x0, weight=pull)

    def _clean(self, x_t: Image, t: Float[Tensor, " b"], cond: Condition) -> tuple[Image, Image]:
        """x0_hat and the eps that belongs to it."""
        a, s = self.prior.schedule.alpha(t), self.prior.schedule.sigma(t)
        eps = predict(self.prior, x_t, t, cond, self.config.cfg_scale).guided
        x0 = x0_from_eps(x_t, eps, a, s)
        if self.config.clip_x0:
            x0 = x0.clamp(-1.0, 1.0)
            eps = eps_from_x0(x_t, x0, a, s)
        return x0, eps
