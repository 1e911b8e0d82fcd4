"""How a set of Gaussians changes its members: relocation of the dead, cloning and splitting of the busy.

Pure functions on `Rows`; the scene applies the result to its parameters and to the optimiser's state.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sds3d.ops.splat_reference import rotation_matrices
from sds3d.rng import Stream

MAX_COPIES = 16  # the alternating sum of `split_mass` loses digits beyond
SPLIT_SHRINK = 1.6  # Kerbl et al. 2023, section 5.2
_OPACITY_RANGE = (1e-4, 1.0 - 1e-4)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Raw parameters of g Gaussians, and where each row comes from.

    `values` holds means (m), log_scales (log m), quats (wxyz), opacity_logits, color_logits.
    """

    values: Mapping[str, Tensor]
    gather: Int[Tensor, " g"]  # row of the previous set
    fresh: Bool[Tensor, " g"]  # the optimiser's memory of that row is void

    @classmethod
    def of(cls, values: Mapping[str, Tensor]) -> "Rows":
        """The rows as they stand."""
        means = values["means"]
        gather = torch.arange(len(means), device=means.device)
        return cls(values=values, gather=gather, fresh=torch.zeros_like(gather, dtype=torch.bool))

    def take(self, index: Tensor) -> "Rows":
        """A selection of rows, repetitions allowed."""
        values = {name: value[index] for name, value in self.values.items()}
        return Rows(values=values, gather=self.gather[index], fresh=self.fresh[index])


def split_mass(
    opacity: Float[Tensor, " n"], scales: Float[Tensor, "n 3"], copies: Int[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n 3"]]:
    """Opacity and scales of N equal Gaussians at one place that together look like one.

    o' = 1 - (1 - o)^(1/N),  S' = S o / sum_{i=1}^{N} sum_{k=0}^{i-1} C(i-1, k) (-1)^k o'^(k+1) / sqrt(k + 1).
    Source: Kheradmand et al. 2024, 3DGS-MCMC, arXiv:2404.09591, eq. 9. N is cut at MAX_COPIES.
    """
    o, copies = opacity.double(), copies.clamp(1, MAX_COPIES)
    each = 1 - (1 - o) ** (1 / copies.double())
    total = torch.zeros_like(o)
    for i in range(1, int(copies.max()) + 1):
        term = sum(math.comb(i - 1, k) * (-1) ** k * each ** (k + 1) / math.sqrt(k + 1) for k in range(i))
        total += torch.where(copies >= i, term, torch.zeros_like(o))
    return each.to(opacity), scales * (o / total).to(scales)[:, None]


def relocate(rows: Rows, dead: Bool[Tensor, " g"], rng: Stream) -> Rows:
    """Move dead Gaussians onto live ones, drawn in proportion to opacity; source and copies share its mass.

    Copies are displaced within their Gaussian: at one place all would receive one gradient. No-op where nothing
    is dead or nothing lives.
    """
    lost, live = dead.nonzero().squeeze(-1), (~dead).nonzero().squeeze(-1)
    if not len(lost) or not len(live):
        return rows
    weight = torch.sigmoid(rows.values["opacity_logits"])[live].double().cpu().numpy()
    drawn = rng.fork("source").numpy_generator().choice(len(live), len(lost), p=weight / weight.sum())
    source = live[torch.from_numpy(drawn).to(live)]
    index = torch.arange(len(dead), device=dead.device)
    index[lost] = source
    copies = torch.bincount(source, minlength=len(dead)) + 1
    moved = rows.take(index)
    changed = (copies > 1)[index]
    values = dict(moved.values)
    opacity, scales = split_mass(
        _opacity(values)[changed], values["log_scales"][changed].exp(), copies[index][changed]
    )
    values["opacity_logits"] = values["opacity_logits"].masked_scatter(changed, _logit(opacity))
    values["log_scales"] = values["log_scales"].masked_scatter(changed[:, None], scales.log())
    values["means"] = values["means"] + _within(values, rng.fork("offset")) * dead[:, None]
    return Rows(values=values, gather=moved.gather, fresh=moved.fresh | changed)


def grow(rows: Rows, chosen: Int[Tensor, " n"], split_above_m: float, rng: Stream) -> Rows:
    """Add one Gaussian per chosen row: large ones split in two smaller ones, small ones are cloned.

    A split puts both parts at opposite places within the old Gaussian, SPLIT_SHRINK times smaller (Kerbl et al.
    2023). A clone shares the old one's mass (`split_mass`) and is displaced like a relocated one.
    """
    first = len(rows.gather)
    index = torch.cat([torch.arange(first, device=chosen.device), chosen])
    grown = rows.take(index)
    values = dict(grown.values)
    large = rows.values["log_scales"][chosen].exp().amax(-1) > split_above_m
    offset = _within(rows.take(chosen).values, rng.fork("offset"))
    old, new = chosen, torch.arange(first, len(index), device=chosen.device)
    opacity, scales = split_mass(
        _opacity(rows.values)[chosen], rows.values["log_scales"][chosen].exp(), torch.full_like(chosen, 2)
    )
    scales = torch.where(large[:, None], rows.values["log_scales"][chosen].exp() / SPLIT_SHRINK, scales)
    logits = torch.where(large, rows.values["opacity_logits"][chosen], _logit(opacity))
    means = values["means"].clone()
    means[new] += offset
    means[old] -= offset * large[:, None]
    values["means"] = means
    for part in (old, new):
        values["log_scales"] = values["log_scales"].index_copy(0, part, scales.log())
        values["opacity_logits"] = values["opacity_logits"].index_copy(0, part, logits)
    fresh = grown.fresh.clone()
    fresh[old], fresh[new] = True, True
    return Rows(values=values, gather=grown.gather, fresh=fresh)


def _opacity(values: Mapping[str, Tensor]) -> Tensor:
    return torch.sigmoid(values["opacity_logits"])


def _logit(opacity: Tensor) -> Tensor:
    return torch.logit(opacity.clamp(*_OPACITY_RANGE))


def _within(values: Mapping[str, Tensor], rng: Stream) -> Tensor:
    """A random place of each Gaussian's own distribution, relative to its mean."""
    scales = values["log_scales"].exp()
    steps = rng.normal(*scales.shape, device=scales.device) * scales
    return (rotation_matrices(values["quats"]) @ steps[..., None]).squeeze(-1)
