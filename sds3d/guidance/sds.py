"""Score distillation sampling, with one-step or multi-step clean targets."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.guidance.predict import predict
from sds3d.interfaces import Condition, Draw, Residual, Rule, RuleInfo
from sds3d.mathx.cfg import rescale
from sds3d.mathx.ode import ddim_step
from sds3d.mathx.predict import eps_from_x0, x0_from_eps
from sds3d.mathx.weight import WeightName, weight

Image = Float[Tensor, "b c h w"]


class SDS(Rule):
    """Score distillation sampling: grad = w(t) (eps_hat(x_t; t, y) - noise).

    Written with the clean estimate it is grad = w (alpha / sigma) (x - x0_hat). With `target_steps` = K > 1, x0_hat
    comes from K DDIM steps t, t (K-1)/K, ..., t/K instead of one: sharper and consistent with one image. With
    `image_weight` the decoded target also pulls at the image itself. On a flow prior, weight `velocity` is RFDS.

    Source: Poole et al. 2022 (arXiv:2209.14988), eq. 3; without the noise term: Wang et al. 2022 (SJC,
    arXiv:2212.00774); multi-step and image-space targets: Zhu & Zhuang 2023 (HiFA, arXiv:2305.18766), section 3.1;
    rescaled guidance: Shi et al. 2023 (MVDream, arXiv:2308.16512).
    """

    info = RuleInfo(
        title="score distillation sampling",
        paper="Poole et al. 2022, arXiv:2209.14988",
        passes="2 per target step",
    )
    has_target = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of SDS."""

        cfg_scale: float = option(
            7.5, help="classifier-free guidance; 0 = unconditional, 1 = conditional", ge=0.0
        )
        cfg_rescale: float = option(
            0.0, help="share of the std-rescaled clean estimate (MVDream)", ge=0, le=1
        )
        weight: WeightName = option("recon", help="w(t) on the eps residual; recon = x - x0_hat")
        target_steps: int = option(1, help="DDIM steps behind the clean target; 1 = plain SDS", ge=1, le=50)
        eta: float = option(0.0, help="DDIM noise between target steps; 1 = ancestral (HiFA)", ge=0.0, le=1.0)
        clip_x0: bool = option(False, help="keep clean estimates in [-1, 1] (pixel priors only)")
        subtract_noise: bool = option(True, help="false: SJC without variance reduction, grad = w eps_hat")
        image_weight: float = option(0.0, help="weight of (rgb - decoded target) in image space", ge=0.0)

    def residual(self, x: Image, draw: Draw, cond: Condition) -> Residual:
        """Grad = w (alpha / sigma) (x - x0_hat); the target is x0_hat."""
        a, s, config = draw.alpha, draw.sigma, self.config
        x_t, t, x0 = draw.diffuse(x), draw.t, x
        for k in range(config.target_steps):
            x0, eps = self._clean(x_t, t, cond)
            if k + 1 < config.target_steps:
                later = draw.schedule.snap(draw.t * (1.0 - (k + 1) / config.target_steps))
                noise = draw.fork(k).noise if config.eta > 0 else None
                x_t = ddim_step(x_t, eps, draw.schedule, t, later, eta=config.eta, noise=noise)
                t = later
        pull = weight(config.weight, a, s) * a / s
        if not config.subtract_noise:
            return Residual(grad=pull * (x - x0) + weight(config.weight, a, s) * draw.noise)
        return Residual(
            grad=pull * (x - x0),
            target=x0,
            weight=pull,
            image_target=self.prior.decode(x0) if config.image_weight > 0 else None,
            image_weight=config.image_weight,
        )

    def _clean(self, x_t: Image, t: Float[Tensor, " b"], cond: Condition) -> tuple[Image, Image]:
        """x0_hat and the eps that belongs to it."""
        a, s = self.prior.schedule.alpha(t), self.prior.schedule.sigma(t)
        seen = predict(self.prior, x_t, t, cond, self.config.cfg_scale)
        x0 = x0_from_eps(x_t, seen.guided, a, s)
        if self.config.cfg_rescale > 0:
            x0 = rescale(x0, x0_from_eps(x_t, seen.text, a, s), self.config.cfg_rescale)
        if self.config.clip_x0:
            x0 = x0.clamp(-1.0, 1.0)
        changed = self.config.clip_x0 or self.config.cfg_rescale > 0
        return x0, eps_from_x0(x_t, x0, a, s) if changed else seen.guided
