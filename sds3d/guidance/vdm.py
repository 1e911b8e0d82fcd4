"""Variational distribution mapping with distribution coefficient annealing (reconstruction)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.config.ramp import Ramp
from sds3d.guidance.predict import predict
from sds3d.guidance.time_net import TimeNet
from sds3d.interfaces import Condition, Draw, ParamGroup, Prior, Residual, Rule, RuleInfo
from sds3d.mathx.predict import eps_from_x0, x0_from_eps
from sds3d.mathx.weight import WeightName, weight
from sds3d.rng import Stream

Image = Float[Tensor, "b c h w"]


class VDM(Rule):
    """Variational distribution mapping: grad = w(t) (eps_hat - [k eps_map + (1 - k) noise]).

    Renders are seen as degraded outputs of the prior: a small net M learns M(x0_hat(y), t) -> x, and
    eps_map = (x_t - alpha M) / sigma takes the place of VSD's student, without a gradient through the prior. The
    coefficient k = kappa (1 - t)^p is 0 for SDS and 1 for a VSD-like residual.

    Source: Cai et al. 2024 (DreamMapping, arXiv:2409.05099). Reconstructed from the abstract: the net, its loss and
    the annealing of k are ours.
    """

    info = RuleInfo(
        title="variational distribution mapping",
        paper="Cai et al. 2024, arXiv:2409.05099",
        passes="2",
        state="small mapping net",
        experimental=True,
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of VDM."""

        cfg_scale: float = option(7.5, help="classifier-free guidance; 1 = conditional", ge=0.0)
        weight: WeightName = option("sds", help="w(t) on the eps residual")
        kappa: Ramp = option(Ramp(start=0.0, end=1.0), help="share of the mapped noise", ge=0.0, le=1.0)
        power: float = option(1.0, help="p in k = kappa (1 - t)^p; 0 = the same at all t", ge=0.0)
        lr: float = option(1e-3, help="learning rate of the mapping net", ge=0.0)
        width: int = option(64, help="channels of the mapping net", ge=4)

    def __init__(self, config: Config, prior: Prior, stream: Stream | None = None) -> None:
        super().__init__(config, prior, stream)
        channels, stream = prior.shape[0], stream or Stream(0, "vdm")
        self.net = TimeNet(channels, channels, config.width, 2, stream).to(prior.device)

    def residual(self, x: Image, draw: Draw, cond: Condition) -> Residual:
        """Grad = w (eps_hat - k eps_map - (1 - k) noise); the map learns from the same renders."""
        config, a, s = self.config, draw.alpha, draw.sigma
        x_t = draw.diffuse(x)
        seen = predict(self.prior, x_t, draw.t, cond, config.cfg_scale)
        mapped = self.mapped(x0_from_eps(x_t, seen.text, a, s), draw.t)
        k = config.kappa.at(draw.now) * (1.0 - draw.t[:, None, None, None]) ** config.power
        # eps_map - noise = (a / s) (x - M): written so, k = 0 is SDS to the last bit.
        away = k * (eps_from_x0(x_t, mapped.detach(), a, s) - draw.noise)
        loss = (mapped - x).square().mean()
        return Residual(
            grad=weight(config.weight, a, s) * (seen.guided - draw.noise - away),
            aux_loss=loss,
            log={"map_loss": loss.detach()},
        )

    def mapped(self, x0: Image, t: Float[Tensor, " b"]) -> Image:
        """M(x0, t) = x0 + net(x0, t): the identity at the start."""
        answer: Tensor = self.net(x0, t)
        return x0 + answer

    def groups(self) -> list[ParamGroup]:
        """The mapping net's parameters."""
        return [ParamGroup(name="map", params=list(self.net.parameters()), lr=self.config.lr)]
