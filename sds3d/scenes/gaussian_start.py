"""How a set of Gaussians begins: in a ball, on a sphere, or as flat discs on a surface."""

import math
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from scipy.spatial import cKDTree
from torch import Tensor, nn

from sds3d.rng import Stream

if TYPE_CHECKING:
    from sds3d.scenes.gaussians import GaussianScene

_NEAREST = 3  # neighbours whose mean distance sets the first scales
_SCALE_MIN_M = 1e-4
_COLOR_RANGE = (0.005, 0.995)  # a logit beyond hardly learns any more
WIDTH = (
    0.75  # standard deviation of a disc in units of the distance to its neighbours: no gaps, little overhang
)
FLATNESS = 0.2  # its thickness in units of its width


def raw_values(
    means: Float[Tensor, "g 3"],
    quats_wxyz: Float[Tensor, "g 4"],
    scales: Float[Tensor, "g 3"],
    opacity: Float[Tensor, " g"],
    color: Float[Tensor, "g 3"],
) -> dict[str, Tensor]:
    """The parameters of a `GaussianScene` by name: logarithms of scales (m), logits of opacity and sRGB colour."""
    return {
        "means": means,
        "log_scales": scales.clamp_min(_SCALE_MIN_M).log(),
        "quats": nn.functional.normalize(quats_wxyz, dim=-1),
        "opacity_logits": torch.logit(opacity.clamp(1e-4, 1 - 1e-4)),
        "color_logits": torch.logit(color.clamp(*_COLOR_RANGE)),
    }


def random_values(config: "GaussianScene.Config", rng: Stream) -> dict[str, Tensor]:
    """Grey Gaussians of random rotation in a ball or on its surface, as wide as they are apart."""
    means = _start(config, rng.fork("means"))
    count = len(means)
    return {
        "means": means,
        "log_scales": spacing(means).log()[:, None].repeat(1, 3),
        "quats": nn.functional.normalize(rng.fork("quats").normal(count, 4), dim=-1),
        "opacity_logits": torch.full((count,), math.log(config.start_opacity / (1 - config.start_opacity))),
        "color_logits": 0.1 * rng.fork("colors").normal(count, 3),
    }


def disc_values(
    points: Float[Tensor, "g 3"],
    normals: Float[Tensor, "g 3"],
    color: Float[Tensor, "g 3"],
    opacity: float,
) -> dict[str, Tensor]:
    """Discs in the tangent planes of a surface, WIDTH as wide as they are apart, and flat."""
    radius = WIDTH * spacing(points).to(points)
    scales = radius[:, None] * radius.new_tensor([1.0, 1.0, FLATNESS])
    return raw_values(points, facing(normals), scales, torch.full_like(radius, opacity), color)


def spacing(means: Float[Tensor, "g 3"]) -> Float[Tensor, " g"]:
    """Mean distance (m) to the nearest neighbours, at least 0.1 mm; on the CPU."""
    at = means.detach().cpu().numpy()
    distances, _ = cKDTree(at).query(at, k=min(_NEAREST + 1, len(at)))
    return torch.from_numpy(distances[:, 1:].mean(1)).clamp_min(_SCALE_MIN_M).float()


def facing(normals: Float[Tensor, "g 3"]) -> Float[Tensor, "g 4"]:
    """Unit quaternions wxyz that turn +z into these unit normals the shortest way.

    q = (1 + n_z, -n_y, n_x, 0) / |.|; a normal of -z is a half turn about x.
    """
    x, y, z = normals.unbind(-1)
    quats = torch.stack([1 + z, -y, x, torch.zeros_like(x)], -1)
    half_turn = quats.new_tensor([0.0, 1.0, 0.0, 0.0])
    return nn.functional.normalize(torch.where((z < -1 + 1e-6)[:, None], half_turn, quats), dim=-1)


def _start(config: "GaussianScene.Config", rng: Stream) -> Float[Tensor, "g 3"]:
    direction = nn.functional.normalize(rng.fork("direction").normal(config.count, 3), dim=-1)
    if config.start == "sphere":
        return direction * config.start_radius_m
    return direction * rng.fork("radius").uniform(config.count, 1) ** (1 / 3) * config.start_radius_m
