"""Priors whose score is known in closed form: for tests, documentation and debugging.

A Gaussian mixture sum_k pi_k N(mu_k, q_k I) diffused to time t is again a mixture, with means a mu_k and variances
a^2 q_k + s^2, so eps(x_t) = -s grad log p_t(x_t) is exact (Karras et al. 2024, arXiv:2406.02507, appendix).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sds3d.interfaces import NoiseSchedule, ParamGroup, Student, Told
from sds3d.mathx.schedule import CosineSchedule
from sds3d.rng import Stream


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Isotropic Gaussian mixture over images of shape (c, h, w)."""

    means: Float[Tensor, "k c h w"]
    variances: Float[Tensor, " k"]  # q_k, variance per element
    weights: Float[Tensor, " k"]  # positive, any scale

    @classmethod
    def gaussian(cls, mean: Float[Tensor, "c h w"], variance: float) -> "Mixture":
        """A mixture of one."""
        return cls(
            means=mean[None],
            variances=mean.new_tensor([variance]),
            weights=mean.new_ones(1),
        )

    def eps(
        self, x_t: Float[Tensor, "b c h w"], a: Float[Tensor, "b 1 1 1"], s: Float[Tensor, "b 1 1 1"]
    ) -> Float[Tensor, "b c h w"]:
        """S sum_k r_k (x_t - a mu_k) / (a^2 q_k + s^2), r_k the posterior responsibilities."""
        means = self.means.to(x_t)
        spread = a[:, :, 0, 0] ** 2 * self.variances.to(x_t) + s[:, :, 0, 0] ** 2  # (b, k)
        away = x_t[:, None] - a[:, None] * means[None]  # (b, k, c, h, w)
        size = x_t[0].numel()
        log_p = (
            self.weights.to(x_t).log()
            - 0.5 * away.square().sum((2, 3, 4)) / spread
            - 0.5 * size * spread.log()
        )
        share = log_p.softmax(dim=1) / spread
        return s * (share[:, :, None, None, None] * away).sum(1)


class AnalyticPrior:
    """Exact eps of one mixture per prompt; unknown prompts are an error. x is the RGB image itself, in [0, 1].

    Text embeddings are one-hot rows (p, 1, P) over the known prompts, so linear blends are meaningless here.
    """

    def __init__(
        self,
        mixtures: Mapping[str, Mixture],
        schedule: NoiseSchedule | None = None,
    ) -> None:
        self.mixtures = dict(mixtures)
        self.schedule: NoiseSchedule = schedule or CosineSchedule()
        first = next(iter(self.mixtures.values())).means
        self.device = first.device
        self.dtype = first.dtype
        self.shape = (int(first.shape[1]), int(first.shape[2]), int(first.shape[3]))
        self.image_px = self.shape[1]
        self.calls = 0

    def encode_text(self, prompts: Sequence[str]) -> Float[Tensor, "p 1 P"]:
        """One-hot rows; KeyError for a prompt without a mixture."""
        names = list(self.mixtures)
        unknown = [prompt for prompt in prompts if prompt not in self.mixtures]
        if unknown:
            raise KeyError(f"analytic prior knows {names}, not {unknown}")
        index = torch.tensor([names.index(prompt) for prompt in prompts])
        return torch.nn.functional.one_hot(index, len(names)).to(self.dtype)[:, None]

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """Nothing to warn about."""
        return []

    def encode(self, rgb: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Resize only."""
        if rgb.shape[-1] == self.image_px:
            return rgb
        return torch.nn.functional.interpolate(
            rgb, size=self.shape[1:], mode="bilinear", antialias=rgb.shape[-1] > self.image_px
        )

    def decode(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Identity."""
        return x

    @torch.no_grad()
    def eps(
        self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], *told: Told
    ) -> tuple[Float[Tensor, "b c h w"], ...]:
        """Exact noise predictions, one per bundle."""
        self.calls += len(told)
        a, s = self.schedule.alpha(t), self.schedule.sigma(t)
        known = list(self.mixtures.values())
        results = []
        for bundle in told:
            which = bundle.text[:, 0].argmax(-1)
            rows = [
                known[int(k)].eps(x_t[i : i + 1], a[i : i + 1], s[i : i + 1]) for i, k in enumerate(which)
            ]
            results.append(torch.cat(rows))
        return tuple(results)

    def student(self, *, rank: int, lr: float, convolutions: bool, stream: Stream) -> Student:
        """A Gaussian per prompt; it has no network, so rank, convolutions and stream mean nothing to it."""
        return GaussianStudent(self, lr=lr)


class GaussianStudent(Student):
    """Exact eps of one learnable Gaussian N(m, q I) per prompt, at first with the moments of the prior's mixture."""

    def __init__(self, prior: AnalyticPrior, *, lr: float, spread: bool = True) -> None:
        """`spread` lets the variances learn too, otherwise only the means."""
        super().__init__()
        self.schedule, self.lr = prior.schedule, lr
        moments = [_moments(mixture) for mixture in prior.mixtures.values()]
        self.mean = nn.Parameter(torch.stack([mean for mean, _ in moments]))
        self.log_variance = nn.Parameter(torch.stack([q for _, q in moments]).log(), requires_grad=spread)
        self.calls = 0

    def eps(
        self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], *told: Told
    ) -> tuple[Float[Tensor, "b c h w"], ...]:
        """Eps = s (x_t - a m) / (a^2 q + s^2), one per bundle."""
        self.calls += len(told)
        a, s = self.schedule.alpha(t), self.schedule.sigma(t)
        which = [bundle.text[:, 0].argmax(-1) for bundle in told]
        q = self.log_variance.exp()
        return tuple(s * (x_t - a * self.mean[k]) / (a**2 * q[k, None, None, None] + s**2) for k in which)

    def groups(self) -> Sequence[ParamGroup]:
        """One group."""
        params = [p for p in self.parameters() if p.requires_grad]
        return [ParamGroup(name="student", params=params, lr=self.lr)]


def _moments(mixture: Mixture) -> tuple[Float[Tensor, "c h w"], Float[Tensor, ""]]:
    """Mean and mean variance per element of a mixture."""
    share = mixture.weights / mixture.weights.sum()
    mean = torch.einsum("k,kchw->chw", share, mixture.means)
    around = (mixture.means - mean).square().mean((1, 2, 3)) + mixture.variances
    return mean, (share * around).sum()
