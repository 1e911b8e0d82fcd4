"""Interval score matching."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.config.ramp import Ramp
from sds3d.guidance.predict import predict
from sds3d.guidance.trajectory import EpsField, eps_of, integrate, noised
from sds3d.interfaces import Condition, Draw, Prior, Residual, Rule, RuleInfo
from sds3d.mathx.cfg import cfg
from sds3d.mathx.ode import ddim_step
from sds3d.mathx.weight import WeightName, weight

Image = Float[Tensor, "b c h w"]


@dataclass(frozen=True, kw_only=True)
class IntervalConfig:
    """Options of rules that compare two predictions along one inversion path."""

    cfg_scale: float = option(7.5, help="classifier-free guidance at t; 1 = conditional", ge=0.0)
    delta: Ramp = option(
        Ramp(start=0.1, end=0.08, over_frac=(0.0, 0.3)), help="length t - s of the interval", ge=0.0, le=1.0
    )
    stride: float = option(0.2, help="stride of the inversion that leads to s", ge=0.001, le=1.0)
    strides: int = option(5, help="the inversion starts at most this many strides below s", ge=1, le=1000)
    start: float = option(0.0, help="the inversion starts no lower than this t", ge=0.0, le=1.0)
    inversion_scale: float = option(
        0.0, help="g of reversed CFG, eps_null + g (eps_negative - eps_null); 0 = empty prompt alone", ge=0.0
    )
    weight: WeightName = option("recon", help="w(t) on the eps residual")
    factor: float = option(0.1, help="constant factor on the gradient", ge=0.0)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The lower end of the interval."""

    s: Float[Tensor, " b"]
    x: Image  # x_s, on the inversion path of x
    eps: Image  # prediction there


def interval(
    config: IntervalConfig, prior: Prior, x: Image, draw: Draw, cond: Condition
) -> tuple[Interval, EpsField]:
    """x_s and eps_s: noise x to max(s - strides * stride, start), invert to s = t - delta; and the field used."""
    field = inversion(config, prior, cond)
    snap = draw.schedule.snap
    s = snap((draw.t - config.delta.at(draw.now)).clamp(min=0.0))
    bottom = snap((s - config.strides * config.stride).clamp(min=config.start)).minimum(s)
    x_s = integrate(noised(x, draw, bottom), field, draw.schedule, bottom, s, config.stride).x
    return Interval(s=s, x=x_s, eps=field(x_s, s)), field


def inversion(config: IntervalConfig, prior: Prior, cond: Condition) -> EpsField:
    """The eps field of the inversion: the empty prompt, or its reversed CFG against the negative prompt."""
    if config.inversion_scale == 0.0:
        return eps_of(prior, cond.as_null())

    def reversed_cfg(x_t: Image, t: Float[Tensor, " b"]) -> Image:
        null, base = prior.eps(x_t, t, cond.as_null(), cond.as_base())
        return cfg(null, base, config.inversion_scale)

    return reversed_cfg


class ISM(Rule):
    """Interval score matching: grad = factor w(t) (eps_hat(x_t; t, y) - eps(x_s; s, null)).

    x_s lies on the DDIM inversion of x under the empty prompt, s = t - delta, and x_t is one more step with eps_s, so
    that both predictions belong to one path and their difference holds no fresh noise. With `random_noise` x_t and
    eps_s are replaced by alpha x + sigma noise and the noise: that is SDS.

    Source: Liang et al. 2023 (LucidDreamer, arXiv:2311.11284).
    """

    info = RuleInfo(
        title="interval score matching",
        paper="Liang et al. 2023, arXiv:2311.11284",
        passes="4-8",
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(IntervalConfig):
        """Options of ISM."""

        random_noise: bool = option(False, help="noise instead of inversion: SDS with weight factor w(t)")

    def residual(self, x: Image, draw: Draw, cond: Condition) -> Residual:
        """Grad = factor w (eps_hat - eps_s)."""
        config = self.config
        if config.random_noise:
            x_t, target = draw.diffuse(x), draw.noise
        else:
            low, _ = interval(config, self.prior, x, draw, cond)
            x_t, target = ddim_step(low.x, low.eps, draw.schedule, low.s, draw.t), low.eps
        seen = predict(self.prior, x_t, draw.t, cond, config.cfg_scale)
        w = config.factor * weight(config.weight, draw.alpha, draw.sigma)
        return Residual(grad=w * (seen.guided - target))
