"""Variational score distillation, with entropic (ESD) and random-scale (PG-SB) guidance as options."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.guidance.predict import predict
from sds3d.guidance.student_loss import StudentConfig, student_loss, student_of, told_student
from sds3d.interfaces import Condition, Draw, ParamGroup, Prior, Residual, Rule, RuleInfo, Told
from sds3d.mathx.weight import WeightName, weight
from sds3d.rng import Stream

Image = Float[Tensor, "b c h w"]


class VSD(Rule):
    """Variational score distillation: grad = w(t) (eps_hat(x_t; y) - eps_student(x_t; y, camera)).

    The student is a trainable copy of the prior that follows the distribution of the renders; it is told the prompt
    without view words, and the camera. With `entropy` = eta (ESD) its prediction is
    (1 - eta) eps_student(y, camera) + eta eps_student(y): eta = 1 maximises the entropy over views. With
    `random_scale` (PG-SB) one k ~ U(range) per step is the guidance scale of the prior and of the student.

    Source: Wang et al. 2023 (ProlificDreamer, arXiv:2305.16213); Wang et al. 2024 (ESD, arXiv:2401.00909); Nguyen et
    al. 2024 (SNOOPI, arXiv:2412.02687).
    """

    info = RuleInfo(
        title="variational score distillation",
        paper="Wang et al. 2023, arXiv:2305.16213",
        passes="2, and 1-3 of the student",
        state="LoRA student",
        needs=("student",),
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of VSD."""

        cfg_scale: float = option(7.5, help="classifier-free guidance of the prior; 1 = conditional", ge=0.0)
        weight: WeightName = option("sds", help="w(t) on the eps residual")
        entropy: float = option(
            0.0, help="ESD's eta: share of the student without camera; 1 - eta is its camera scale", le=1.0
        )
        random_scale: tuple[float, float] | None = option(
            None, help="PG-SB: guidance scale of both sides, drawn once per step from this range", ge=0.0
        )
        student: StudentConfig = field(default_factory=StudentConfig)

    def __init__(self, config: Config, prior: Prior, stream: Stream | None = None) -> None:
        super().__init__(config, prior, stream)
        self.student = student_of(prior, config.student, stream)

    def residual(self, x: Image, draw: Draw, cond: Condition) -> Residual:
        """Grad = w (eps_hat - eps_student); the student learns from the same renders."""
        hat, own = self.scores(draw.diffuse(x), draw, cond)
        loss = self.learning(x, draw, cond)
        return Residual(
            grad=weight(self.config.weight, draw.alpha, draw.sigma) * (hat - own),
            aux_loss=loss,
            log={"student_loss": loss.detach()},
        )

    @torch.no_grad()
    def scores(self, x_t: Image, draw: Draw, cond: Condition) -> tuple[Image, Image]:
        """What prior and student see in x_t, after guidance; two network calls."""
        config, scale, own_scale = self.config, self.config.cfg_scale, 1.0
        if config.random_scale is not None:
            low, high = config.random_scale
            scale = own_scale = low + (high - low) * float(draw.stream.fork("scale").uniform(1))
        parts: list[tuple[float, Told]] = [
            (own_scale * (1.0 - config.entropy), told_student(cond)),
            (own_scale * config.entropy, told_student(cond, camera=False)),
            (1.0 - own_scale, cond.as_null()),
        ]
        parts = [(share, told) for share, told in parts if share != 0.0]
        seen = self.student.eps(x_t, draw.t, *(told for _, told in parts))
        own = sum((share * eps for (share, _), eps in zip(parts, seen, strict=True)), torch.zeros_like(x_t))
        return predict(self.prior, x_t, draw.t, cond, scale).guided, own

    def learning(self, x: Image, draw: Draw, cond: Condition) -> Float[Tensor, ""]:
        """The student's own loss."""
        return student_loss(self.student, self.config.student, x, draw, cond)

    def groups(self) -> list[ParamGroup]:
        """The student's parameters."""
        return list(self.student.groups())
