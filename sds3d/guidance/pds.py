"""Posterior distillation sampling: editing by the difference of two stochastic latents."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.guidance.dds import SOURCE, clean_pair
from sds3d.interfaces import Condition, Draw, Residual, Rule, RuleInfo


class PDS(Rule):
    """Posterior distillation sampling: grad = z(x) - z(source), z = (x_s - c0 x0_hat - c1 x_t) / std, s = t - 1/grid.

    x_t and x_s are diffused with noises shared by both sides, so the noise drops out:
    grad = ((alpha_s - c1 alpha_t) (x - source) - c0 (x0_hat(x) - x0_hat(source))) / std, where c0, c1, std belong to
    the posterior of x_s given x_t with variance beta of one step of 1/betas:
    c0 = alpha_s beta / sigma_t^2, c1 = alpha_t / alpha_(t - 1/betas) sigma_s^2 / sigma_t^2,
    std^2 = beta sigma_s^2 / sigma_t^2. With betas = grid it is the exact posterior, for which
    alpha_s - c1 alpha_t = c0 and PDS is DDS with another weight; betas > grid keeps closer to the source.

    Source: Koo et al. 2023 (arXiv:2311.13831); grid and betas are those of their code.
    """

    info = RuleInfo(
        title="posterior distillation sampling (editing)",
        paper="Koo et al. 2023, arXiv:2311.13831",
        passes="4",
        needs=("source",),
    )
    has_target = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of PDS."""

        source_prompt: str = option("", help="what the asset that is edited shows; empty = no text")
        cfg_scale: float = option(
            100.0, help="classifier-free guidance on both sides; 1 = conditional", ge=0.0
        )
        grid: int = option(500, help="s = t - 1/grid", ge=2)
        betas: int = option(1000, help="beta is the variance added in a step of 1/betas; grid = exact", ge=2)

    def prompts(self) -> Mapping[str, str]:
        """What the edited asset shows."""
        return {SOURCE: self.config.source_prompt}

    def residual(self, x: Float[Tensor, "b c h w"], draw: Draw, cond: Condition) -> Residual:
        """Grad = keep (x - source) - change (x0_hat(x) - x0_hat(source))."""
        keep, change = self.coefficients(draw)
        source, clean, clean_source = clean_pair(self.prior, x, draw, cond, self.config.cfg_scale)
        target = source + change / keep * (clean - clean_source)
        return Residual(grad=keep * (x - target), target=target, weight=keep)

    def coefficients(self, draw: Draw) -> tuple[Float[Tensor, "b 1 1 1"], Float[Tensor, "b 1 1 1"]]:
        """(alpha_s - c1 alpha_t) / std and c0 / std."""
        schedule, t, a, sigma = draw.schedule, draw.t, draw.alpha, draw.sigma
        # Below one grid step t is halved, so that s stays noisy.
        s, before = (torch.maximum(t - 1.0 / n, 0.5 * t) for n in (self.config.grid, self.config.betas))
        a_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
        ratio = a / schedule.alpha(before)
        beta = sigma.square() - (ratio * schedule.sigma(before)).square()
        c0, c1 = a_s * beta / sigma.square(), ratio * (sigma_s / sigma).square()
        std = beta.sqrt() * sigma_s / sigma
        return (a_s - c1 * a) / std, c0 / std
