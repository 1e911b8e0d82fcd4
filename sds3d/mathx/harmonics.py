"""Real spherical harmonics up to degree 3, as splat files store how colour depends on direction."""

import torch
from jaxtyping import Float
from torch import Tensor

SH_DC = 0.28209479177387814  # 1 / (2 sqrt(pi)), the constant one
COUNTS = {0: 0, 1: 3, 2: 8, 3: 15}  # coefficients beyond the constant, per degree


def sh_basis(direction: Float[Tensor, "n 3"], count: int) -> Float[Tensor, "n k"]:
    """The first `count` (3, 8 or 15) harmonics beyond the constant, at unit vectors; in the order of 3DGS files.

    Y_1 = c1 (-y, z, -x), and so on, with the signs of Sloan 2013, Efficient Spherical Harmonic Evaluation.
    """
    x, y, z = direction.unbind(-1)
    xx, yy, zz = x * x, y * y, z * z
    all_ = [
        -0.4886025119029199 * y,
        0.4886025119029199 * z,
        -0.4886025119029199 * x,
        1.0925484305920792 * x * y,
        -1.0925484305920792 * y * z,
        0.31539156525252005 * (2 * zz - xx - yy),
        -1.0925484305920792 * x * z,
        0.5462742152960396 * (xx - yy),
        -0.5900435899266435 * y * (3 * xx - yy),
        2.890611442640554 * x * y * z,
        -0.4570457994644658 * y * (4 * zz - xx - yy),
        0.3731763325901154 * z * (2 * zz - 3 * xx - 3 * yy),
        -0.4570457994644658 * x * (4 * zz - xx - yy),
        1.445305721320277 * z * (xx - yy),
        -0.5900435899266435 * x * (xx - 3 * yy),
    ]
    return torch.stack(all_[:count], -1)


def sh_colors(
    constant: Float[Tensor, "n 3"], harmonics: Float[Tensor, "n k 3"], direction: Float[Tensor, "n 3"]
) -> Float[Tensor, "n 3"]:
    """The colour that n Gaussians show when looked at along unit vectors, at least 0.

    `constant` is the colour of degree 0 (sRGB), `harmonics` the coefficients beyond it.
    """
    basis = sh_basis(direction, harmonics.shape[1])
    return (constant + (basis[..., None] * harmonics).sum(1)).clamp_min(0.0)
