"""Variational score distillation under other divergences than the reverse KL."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sds3d.config.option import option
from sds3d.guidance.time_net import TimeNet
from sds3d.guidance.vsd import VSD
from sds3d.interfaces import Condition, Draw, ParamGroup, Prior, Residual, Rule, RuleInfo
from sds3d.mathx.predict import x0_from_eps
from sds3d.mathx.weight import weight
from sds3d.rng import Stream

Ratio = Float[Tensor, " b"]
Divergence = Literal[
    "reverse_kl", "forward_kl", "js", "softened", "hellinger", "jeffreys", "pearson", "neyman"
]

# h(r) = r^2 f''(r) up to a constant, for D_f = E_q f(r), r = p / q with p the prior and q the renders.
FACTORS: dict[str, Callable[[Ratio], Ratio]] = {
    "reverse_kl": torch.ones_like,
    "forward_kl": lambda r: r,
    "js": lambda r: r / (1.0 + r),
    "softened": lambda r: 1.0 / (1.0 + r),
    "hellinger": lambda r: r.sqrt(),
    "jeffreys": lambda r: 1.0 + r,
    "pearson": lambda r: r.square(),
    "neyman": lambda r: 1.0 / r,
}
LOGIT_LIMIT = 10.0


def importance(divergence: Divergence, logit: Ratio, clip: tuple[float, float]) -> Ratio:
    """h(r) of every view, with mean 1; r = exp(logit), clipped, then divided by its mean over the batch."""
    r = logit.clamp(-LOGIT_LIMIT, LOGIT_LIMIT).exp().clamp(*clip)
    h = FACTORS[divergence](r / r.mean())
    return h / h.mean()


class FDiv(Rule):
    """f-divergence distillation: grad = h(r) w(t) (eps_hat - eps_student), h(r) = r^2 f''(r), r = p(x_t) / q(x_t).

    r = exp(D(x_t, t)), D a small network that tells noised renders from noised samples of the prior. In place of
    samples it learns from the prior's clean estimates x0_hat of the same step, noised anew. Views weigh against each
    other within a batch: a batch of one is plain VSD.

    Source: Xu et al. 2025 (f-distill, arXiv:2502.15681); Wang et al. 2025 (Uni-Instruct, arXiv:2505.20755).
    """

    info = RuleInfo(
        title="f-divergence score distillation",
        paper="Xu et al. 2025, arXiv:2502.15681",
        passes="2, and 1-3 of the student",
        state="LoRA student, density-ratio net",
        needs=("student",),
        experimental=True,
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of f-divergence distillation."""

        divergence: Divergence = option("js", help="which divergence from renders to prior is minimised")
        warmup_steps: int = option(2000, help="steps with h = 1 while the ratio is being learnt", ge=0)
        clip: tuple[float, float] = option((0.1, 20.0), help="range of the density ratio", ge=1e-6)
        critic_lr: float = option(1e-4, help="learning rate of the density-ratio net", ge=0.0)
        critic_width: int = option(64, help="its channels", ge=4)
        vsd: VSD.Config = field(default_factory=VSD.Config)

    def __init__(self, config: Config, prior: Prior, stream: Stream | None = None) -> None:
        super().__init__(config, prior, stream)
        stream = stream or Stream(0, "fdiv")
        self.vsd = VSD(config.vsd, prior, stream)
        self.critic = TimeNet(prior.shape[0], 1, config.critic_width, 2, stream.fork("critic")).to(
            prior.device
        )

    def residual(self, x: Float[Tensor, "b c h w"], draw: Draw, cond: Condition) -> Residual:
        """Grad = h w (eps_hat - eps_student); student and density ratio learn from the same renders."""
        a, s = draw.alpha, draw.sigma
        x_t = draw.diffuse(x)
        hat, own = self.vsd.scores(x_t, draw, cond)
        h = torch.ones_like(draw.t)
        if draw.now.step >= self.config.warmup_steps:
            h = importance(self.config.divergence, self.logit(x_t, draw.t).detach(), self.config.clip)
        fresh = draw.fork(0)
        real = self.logit(fresh.diffuse(x0_from_eps(x_t, hat, a, s)), draw.t)
        fake = self.logit(fresh.diffuse(x), draw.t)
        critic_loss = (F.softplus(-real) + F.softplus(fake)).mean()
        student_loss = self.vsd.learning(x, draw, cond)
        return Residual(
            grad=h[:, None, None, None] * weight(self.config.vsd.weight, a, s) * (hat - own),
            aux_loss=student_loss + critic_loss,
            log={"student_loss": student_loss.detach(), "critic_loss": critic_loss.detach()},
        )

    def logit(self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"]) -> Ratio:
        """Log of the density ratio: the net's mean over channels and pixels."""
        answer: Tensor = self.critic(x_t, t)
        return answer.mean((1, 2, 3))

    def groups(self) -> list[ParamGroup]:
        """The student's parameters and the density-ratio net's."""
        critic = ParamGroup(name="critic", params=list(self.critic.parameters()), lr=self.config.critic_lr)
        return [*self.vsd.groups(), critic]
