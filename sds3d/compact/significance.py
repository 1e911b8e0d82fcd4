"""How much each Gaussian matters to what is seen."""

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.interfaces import Cameras
from sds3d.mesh.splat_cloud import GaussianCloud
from sds3d.ops.splat import rasterize_gaussians
from sds3d.slices import Slice

VOLUME_POWER = 0.1
_VOLUME_RANK = 0.9  # of the volumes in descending order, the one that counts as 1
_VIEWS_AT_ONCE = 4


def significance(
    cloud: GaussianCloud, cameras: Cameras, volume_power: float = VOLUME_POWER
) -> Float[Tensor, " g"]:
    """S_j = (V_j / V_90)^volume_power sum over views and pixels of a_j T_j.

    a_j is opacity times the splat's falloff where it hits a pixel, T_j the transmittance in front of it. Their product
    is the weight of the Gaussian's colour, so the sum over a picture is the derivative of its sum by that colour: one
    backward pass of the rasteriser that is used, with its cut-offs, on any device. V is the product of the scales.

    Source: Fan et al. 2023, LightGaussian, arXiv:2311.17245, section 3.1; the volume as in the published code.
    """
    means, quats, scales, opacity = (
        value.detach() for value in (cloud.means, cloud.quats_wxyz, cloud.scales, cloud.opacity)
    )
    total = torch.zeros_like(opacity)
    for piece in Slice.whole(len(cameras)).pieces(_VIEWS_AT_ONCE):
        white = torch.ones_like(means).requires_grad_(True)
        black = white.new_zeros(len(piece), 3)
        with torch.enable_grad():
            image = rasterize_gaussians(means, quats, scales, opacity, white, piece.of(cameras), black)
            (shown,) = torch.autograd.grad(image.rgb[:, 0].sum(), white)
        total += shown[:, 0]
    volume = scales.double().prod(-1)
    rank = min(int(_VOLUME_RANK * len(volume)), len(volume) - 1)
    unit = volume.sort(descending=True).values[rank].clamp_min(1e-300)
    return total * ((volume / unit) ** volume_power).to(total)
