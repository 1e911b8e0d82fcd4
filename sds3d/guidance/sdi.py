"""Score distillation via inversion."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.guidance.predict import predict
from sds3d.guidance.trajectory import guided_eps, integrate, noised
from sds3d.interfaces import Condition, Draw, Residual, Rule, RuleInfo
from sds3d.mathx.predict import x0_from_eps
from sds3d.mathx.weight import WeightName, weight

Image = Float[Tensor, "b c h w"]

LATEST = 0.999  # where alpha is 0 (flows at t = 1) no clean estimate exists


class SDI(Rule):
    """Score distillation via inversion: grad = w(u) (alpha / sigma) (x - x0_hat(x_u; u, y)), u = t + jitter.

    x_u is the DDIM inversion of x under the prompt with guidance `inversion_scale` < 0, plus extra_noise sigma n. In
    terms of clean estimates this is a DDIM step whose noise solves a fixed-point equation: SDS without its averaging.
    All levels belong to u (the released code inverts to u but evaluates at t). With `random_noise` it is SDS.

    Source: Lukoianov et al. 2024 (SDI, arXiv:2405.15891).
    """

    info = RuleInfo(
        title="score distillation via inversion",
        paper="Lukoianov et al. 2024, arXiv:2405.15891",
        passes="4-22",
    )
    has_target = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of SDI."""

        cfg_scale: float = option(7.5, help="classifier-free guidance of the clean estimate", ge=0.0)
        inversion_scale: float = option(-7.5, help="guidance of the inversion; the paper finds -7.5 best")
        steps: int = option(10, help="inversion strides from t = 0 to 1", ge=1, le=1000)
        start: float = option(0.0, help="the inversion starts at this t", ge=0.0, le=1.0)
        jitter: float = option(
            0.1, help="u - t is uniform in [0, jitter); the paper has 1/30", ge=0.0, le=1.0
        )
        extra_noise: float = option(0.3, help="noise added to the inverted image, in units of sigma", ge=0.0)
        weight: WeightName = option("recon", help="w on the eps residual; recon = x - x0_hat")
        clip_x0: bool = option(False, help="keep clean estimates in [-1, 1] (pixel priors only)")
        random_noise: bool = option(False, help="noise instead of inversion: SDS")

    def residual(self, x: Image, draw: Draw, cond: Condition) -> Residual:
        """Grad = w (alpha / sigma) (x - x0_hat); the target is x0_hat."""
        config, schedule = self.config, draw.schedule
        jitter = config.jitter * draw.stream.fork("jitter").uniform(1, device=draw.t.device).to(draw.t)
        u = schedule.snap((draw.t + jitter).clamp(max=LATEST))
        a, s = schedule.alpha(u), schedule.sigma(u)
        x_u = noised(x, draw, u) if config.random_noise else self._inverted(x, u, draw, cond)
        x0 = x0_from_eps(x_u, predict(self.prior, x_u, u, cond, config.cfg_scale).guided, a, s)
        if config.clip_x0:
            x0 = x0.clamp(-1.0, 1.0)
        pull = weight(config.weight, a, s) * a / s
        return Residual(grad=pull * (x - x0), target=x0, weight=pull)

    def _inverted(self, x: Image, u: Float[Tensor, " b"], draw: Draw, cond: Condition) -> Image:
        """x_u on the inversion path of x, plus extra noise."""
        config, schedule = self.config, draw.schedule
        bottom = torch.full_like(u, config.start).minimum(u)
        field = guided_eps(self.prior, cond, config.inversion_scale)
        path = integrate(noised(x, draw, bottom), field, schedule, bottom, u, 1.0 / config.steps)
        return path.x + config.extra_noise * schedule.sigma(u) * draw.noise
