"""Rectified flow distillation sampling and the ways to choose its noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sds3d.config.option import option
from sds3d.config.ramp import Ramp
from sds3d.guidance.predict import predict
from sds3d.guidance.trajectory import eps_of, integrate, noised
from sds3d.interfaces import Condition, Draw, ParamGroup, Prior, Residual, Rule, RuleInfo
from sds3d.mathx.predict import flow_from_eps, x0_from_eps
from sds3d.rng import Stream

Image = Float[Tensor, "b c h w"]


class RFDS(Rule):
    """Rectified flow distillation sampling: grad = w (v_hat(x_t; t, y) - (noise - x)) = (w / t) (x - x0_hat).

    x_t = (1 - t) x + t noise. The noise is `fresh` (RFDS); `rev`: replaced by the prompt's prediction eps_y(x_t), then
    x is noised anew (RFDS-Rev: noise + (1 - t) (v_y + x - noise) = eps_y); `ucm`: after a warm-up, the end at t = 1 of
    the prompt's flow from x, in a few Euler steps (UCM); `learned`: a parameter that follows v_y + x (iRFDS).

    Source: Yang et al. 2024 (RFDS, arXiv:2406.03293); UCM: Li et al. 2024 (FlowDreamer, arXiv:2408.05008).
    """

    info = RuleInfo(
        title="rectified flow distillation sampling",
        paper="Yang et al. 2024, arXiv:2406.03293",
        passes="2 (rev 3, ucm 5)",
        state="noise: learned keeps noise images",
        needs=("flow",),
    )
    has_target = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of the RFDS family."""

        noise: Literal["fresh", "rev", "ucm", "learned"] = option("fresh", help="how the noise is chosen")
        cfg_scale: Ramp = option(
            Ramp.constant(100.0), help="classifier-free guidance; 1 = conditional", ge=0.0
        )
        random_weight: bool = option(False, help="w = batch mean of sigmoid(N(0, 1)), as the code has on SD3")
        rev_step: Literal["eps", "velocity"] = option(
            "eps", help="rev: noise = eps_y (as on SD3) or x + v_y (as on InstaFlow)"
        )
        ucm_steps: int = option(3, help="ucm: Euler steps from t = 0 to 1", ge=1, le=1000)
        ucm_warmup: float = option(0.18, help="ucm: part of the run with fresh noise", ge=0.0, le=1.0)
        ucm_start: float = option(0.0, help="ucm: the flow starts at this t", ge=0.0, le=0.9)
        noise_lr: float = option(0.01, help="learned: learning rate of the noise", ge=0.0)
        noise_images: int = option(1, help="learned: view i uses image i modulo this", ge=1, le=4096)

    def __init__(self, config: Any, prior: Prior, stream: Stream | None = None) -> None:
        super().__init__(config, prior, stream)
        self.noise: nn.Parameter | None = None
        if config.noise == "learned":
            start = (stream or Stream(0, "rfds")).fork("noise").normal(config.noise_images, *prior.shape)
            self.noise = nn.Parameter(start.to(prior.device))

    def groups(self) -> Sequence[ParamGroup]:
        """The learned noise."""
        return (
            ()
            if self.noise is None
            else (ParamGroup(name="noise", params=[self.noise], lr=self.config.noise_lr),)
        )

    def residual(self, x: Image, draw: Draw, cond: Condition) -> Residual:
        """Grad = (w / t) (x - x0_hat); the target is x0_hat."""
        noise, (a, s) = self._noise(x, draw, cond), (draw.alpha, draw.sigma)
        x_t = a * x + s * noise.detach()
        seen = predict(self.prior, x_t, draw.t, cond, self.config.cfg_scale.at(draw.now))
        x0, pull = x0_from_eps(x_t, seen.guided, a, s), self._weight(draw) / s
        aux = None
        if self.config.noise == "learned":
            aux = (noise - x - flow_from_eps(x_t, seen.text, s)).square().mean()
        return Residual(grad=pull * (x - x0), target=x0, weight=pull, aux_loss=aux)

    def _noise(self, x: Image, draw: Draw, cond: Condition) -> Image:
        config, field = self.config, eps_of(self.prior, cond.as_text())
        if self.noise is not None:
            return self.noise.to(x)[torch.arange(len(x), device=x.device) % len(self.noise)]
        if config.noise == "rev":
            x_t = draw.diffuse(x)
            eps = field(x_t, draw.t)
            return eps if config.rev_step == "eps" else x + flow_from_eps(x_t, eps, draw.sigma)
        if config.noise == "ucm" and draw.now.progress >= config.ucm_warmup:
            start = torch.full_like(draw.t, config.ucm_start)
            end, stride = torch.ones_like(start), (1.0 - config.ucm_start) / config.ucm_steps
            return integrate(noised(x, draw, start), field, draw.schedule, start, end, stride).x
        return draw.noise

    def _weight(self, draw: Draw) -> Float[Tensor, "b 1 1 1"]:
        if not self.config.random_weight:
            return torch.ones_like(draw.sigma)
        each = draw.stream.fork("weight").normal(len(draw.t)).sigmoid()
        return each.mean().to(draw.sigma).expand_as(draw.sigma)
