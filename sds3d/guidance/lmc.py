"""Score distillation with a learned manifold corrective (reconstruction)."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.guidance.predict import predict
from sds3d.guidance.time_net import TimeNet
from sds3d.interfaces import Condition, Draw, ParamGroup, Prior, Residual, Rule, RuleInfo
from sds3d.mathx.predict import x0_from_eps
from sds3d.mathx.weight import WeightName, weight
from sds3d.rng import Stream

Image = Float[Tensor, "b c h w"]


class LMC(Rule):
    """Learned manifold corrective: grad = w (alpha / sigma) [b(x, t) - x0_hat(null) + g d].

    SDS in its clean form, d = (sigma / alpha) (eps_y - eps_null), with x replaced by b(x, t), a shallow net that
    predicts what the denoiser makes of a noised clean image: only what exceeds this expected corruption pulls. No
    gradient passes through b.

    Source: Alldieck et al. 2024 (LMC-SDS, arXiv:2401.05293). Reconstructed from the abstract: the net, what it learns
    from and the treatment of its Jacobian are ours. Here it learns during the run, on clean estimates of the prior.
    """

    info = RuleInfo(
        title="learned manifold corrective",
        paper="Alldieck et al. 2024, arXiv:2401.05293",
        passes="2, and 1 to train its net",
        state="small corrective net",
        experimental=True,
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of LMC-SDS."""

        cfg_scale: float = option(20.0, help="factor g of the guidance direction", ge=0.0)
        weight: WeightName = option("recon", help="w(t) on the eps residual; recon = clean residual")
        learn_from: Literal["estimate", "render"] = option(
            "estimate", help="the net's images: clean estimates of the prior, or the renders (saves one pass)"
        )
        lr: float = option(1e-3, help="learning rate of the corrective net", ge=0.0)
        width: int = option(32, help="channels of the corrective net", ge=4)

    def __init__(self, config: Config, prior: Prior, stream: Stream | None = None) -> None:
        super().__init__(config, prior, stream)
        channels, stream = prior.shape[0], stream or Stream(0, "lmc")
        self.net = TimeNet(channels, channels, config.width, 1, stream).to(prior.device)

    def residual(self, x: Image, draw: Draw, cond: Condition) -> Residual:
        """Grad = w (alpha / sigma) (P' + C): corrected manifold part and guidance part."""
        a, s, x_t = draw.alpha, draw.sigma, draw.diffuse(x)
        seen = predict(self.prior, x_t, draw.t, cond, self.config.cfg_scale)
        blurred = x0_from_eps(x_t, seen.base, a, s)
        guidance = s / a * (seen.guided - seen.base)
        corrected = self.corrupted(x, draw.t).detach() - blurred
        if self.config.learn_from == "render":
            loss = (self.corrupted(x, draw.t) - blurred).square().mean()
        else:
            loss = self._loss(x0_from_eps(x_t, seen.guided, a, s), draw.fork(0), cond)
        return Residual(
            grad=weight(self.config.weight, a, s) * a / s * (corrected + guidance),
            aux_loss=loss,
            log={"corrective_loss": loss.detach()},
        )

    def _loss(self, clean: Image, draw: Draw, cond: Condition) -> Float[Tensor, ""]:
        """|| b(z, t) - x0_hat(alpha z + sigma noise) ||^2, mean, for a clean image z and the unguided prior."""
        z_t = draw.diffuse(clean)
        (eps,) = self.prior.eps(z_t, draw.t, cond.as_base())
        return (self.corrupted(clean, draw.t) - x0_from_eps(z_t, eps, draw.alpha, draw.sigma)).square().mean()

    def corrupted(self, z: Image, t: Float[Tensor, " b"]) -> Image:
        """b(z, t) = z + net(z, t): the identity at the start, where the rule is SDS."""
        answer: Tensor = self.net(z, t)
        return z + answer

    def groups(self) -> list[ParamGroup]:
        """The corrective net's parameters."""
        return [ParamGroup(name="corrective", params=list(self.net.parameters()), lr=self.config.lr)]
