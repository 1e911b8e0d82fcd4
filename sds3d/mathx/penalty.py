"""Regularisers of scenes as pure functions, one value per ray, point or image unless a name says otherwise.

Notation: w weights of the samples of a ray ("r s", see ops/volume.py), m and delta their midpoints and
lengths (m), o opacity of a pixel, n unit normals, d unit ray directions that leave the camera.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def opacity(alpha: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """sqrt(o^2 + 0.01): pushes pixels towards empty, with a finite slope at 0.

    Source: Poole et al. 2022, DreamFusion, arXiv:2209.14988, appendix A.2.
    """
    return torch.sqrt(alpha.square() + 0.01)


def binary_entropy(alpha: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """-(o log o + (1 - o) log(1 - o)) in nats, o clamped to [1e-3, 1 - 1e-3]: pushes pixels to 0 or 1."""
    o = alpha.clamp(1e-3, 1 - 1e-3)
    return -(o * o.log() + (1 - o) * (1 - o).log())


def orientation(
    weights: Float[Tensor, " n"], normals: Float[Tensor, "n 3"], directions: Float[Tensor, "n 3"]
) -> Float[Tensor, " n"]:
    """sg(w) max(0, n.d)^2 of each sample: normals that face away from the camera that sees them.

    Only the normals receive a gradient. Source: Verbin et al. 2022, Ref-NeRF, arXiv:2112.03907, eq. 11.
    """
    return weights.detach() * (normals * directions).sum(-1).clamp_min(0).square()


def distortion(
    weights: Float[Tensor, "r s"], middle: Float[Tensor, "r s"], delta: Float[Tensor, "r s"]
) -> Float[Tensor, " r"]:
    """sum_ij w_i w_j |m_i - m_j| + 1/3 sum_i w_i^2 delta_i, in metres: concentrates the weight of a ray.

    Exact for weights that are constant within their bins; midpoints must rise along each ray where w > 0.
    Source: Barron et al. 2022, mip-NeRF 360, arXiv:2111.12077, eq. 15.
    """
    # Sorted midpoints: sum_ij w_i w_j |m_i - m_j| = 2 sum_i w_i (m_i sum_{j<i} w_j - sum_{j<i} w_j m_j).
    moment = weights * middle
    below, moment_below = weights.cumsum(-1) - weights, moment.cumsum(-1) - moment
    between = 2 * (weights * (middle * below - moment_below)).sum(-1)
    return between + (weights.square() * delta).sum(-1) / 3


def z_variance(weights: Float[Tensor, "r s"], middle: Float[Tensor, "r s"]) -> Float[Tensor, " r"]:
    """sum_i p_i (m_i - mean)^2 with p = w / sum w, in square metres; 0 for rays without weight.

    Source: Zhu et al. 2023, HiFA, arXiv:2305.18766, section 3.3.
    """
    share = weights / weights.sum(-1, keepdim=True).clamp_min(1e-6)
    mean = (share * middle).sum(-1, keepdim=True)
    return (share * (middle - mean).square()).sum(-1)


def total_variation(value: Float[Tensor, " n"], shifted: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """sum_k |f(x + e_k) - f(x)| at n points, from the values at k shifted points each."""
    return (shifted - value[:, None]).abs().sum(-1)


def grid_total_variation(grid: Float[Tensor, "*c x y z"]) -> Float[Tensor, ""]:
    """Mean squared forward difference over the three axes of a voxel grid."""
    return torch.stack([grid.diff(dim=axis).square().mean() for axis in (-3, -2, -1)]).mean()


def normal_smoothness(normal: Float[Tensor, "b 3 H W"]) -> Float[Tensor, " b"]:
    """Mean squared forward difference of a normal image along both axes."""
    return normal.diff(dim=-1).square().mean((1, 2, 3)) + normal.diff(dim=-2).square().mean((1, 2, 3))
