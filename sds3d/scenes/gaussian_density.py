"""From Gaussians to a solid: their density on a lattice, the interior behind their shell, their colour at points.

A Gaussian of opacity o is read as matter that a ray through its middle, along its thinnest axis, meets with optical
depth -log(1 - o): sigma(x) = -log(1 - o) / (sqrt(2 pi) s_min) exp(-1/2 (x - m)^T Sigma^-1 (x - m)), in 1/m.
"""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float
from numba import njit
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree
from torch import Tensor

from sds3d.ops.splat_reference import rotation_matrices
from sds3d.ops.threads import run_tasks

Floats = NDArray[np.float32]
_REACH = 3.0  # standard deviations
_SLAB = 8  # planes of the lattice per task
_NEIGHBOURS = 8
_OPACITY_MAX = 0.995


@njit(nogil=True, cache=True, error_model="numpy")
def _add_slab(first, last, means, precision, peak, reach, low, cell, density):  # type: ignore[no-untyped-def]
    """density[i, j, k] += sum of all Gaussians at low + cell (i, j, k), for planes i of first..last."""
    side = density.shape[1]
    for g in range(means.shape[0]):
        i0 = max(math.ceil((means[g, 0] - reach[g, 0] - low) / cell), first)
        i1 = min(math.floor((means[g, 0] + reach[g, 0] - low) / cell), last - 1)
        j0 = max(math.ceil((means[g, 1] - reach[g, 1] - low) / cell), 0)
        j1 = min(math.floor((means[g, 1] + reach[g, 1] - low) / cell), side - 1)
        k0 = max(math.ceil((means[g, 2] - reach[g, 2] - low) / cell), 0)
        k1 = min(math.floor((means[g, 2] + reach[g, 2] - low) / cell), side - 1)
        xx, xy, xz = precision[g, 0, 0], precision[g, 0, 1], precision[g, 0, 2]
        yy, yz, zz = precision[g, 1, 1], precision[g, 1, 2], precision[g, 2, 2]
        for i in range(i0, i1 + 1):
            x = low + i * cell - means[g, 0]
            for j in range(j0, j1 + 1):
                y = low + j * cell - means[g, 1]
                plane = xx * x * x + yy * y * y + 2.0 * xy * x * y
                line = 2.0 * (xz * x + yz * y)
                for k in range(k0, k1 + 1):
                    z = low + k * cell - means[g, 2]
                    distance = plane + (line + zz * z) * z
                    if distance < 9.0:
                        density[i, j, k] += peak[g] * math.exp(-0.5 * distance)


def density_lattice(
    means: Float[Tensor, "g 3"],
    quats_wxyz: Float[Tensor, "g 4"],
    scales: Float[Tensor, "g 3"],
    opacity: Float[Tensor, " g"],
    half_extent: float,
    cells_per_side: int,
) -> Float[Tensor, "n n n"]:
    """Density in 1/m at n = cells + 1 points per side of the cube [-half_extent, half_extent]^3, axes x, y, z.

    Each Gaussian is blurred by half a cell, keeping its mass, so that a thin one cannot fall between the points;
    cut off at three standard deviations.
    """
    cell = 2 * half_extent / cells_per_side
    m, s, o = means.detach().cpu().double(), scales.detach().cpu().double(), opacity.detach().cpu().double()
    rotation = rotation_matrices(quats_wxyz.detach().cpu().double())
    blurred = s.square() + (0.5 * cell) ** 2
    depth = -torch.log1p(-o.clamp_max(_OPACITY_MAX))
    peak = depth / (math.sqrt(2 * math.pi) * s.amin(-1)) * (s.square() / blurred).prod(-1).sqrt()
    precision = (rotation / blurred[:, None, :]) @ rotation.transpose(1, 2)
    spread = ((rotation.square() * blurred[:, None, :]).sum(-1)).sqrt()
    arrays = [t.float().contiguous().numpy() for t in (m, precision, peak, _REACH * spread)]
    density = np.zeros((cells_per_side + 1,) * 3, np.float32)
    slabs = [(i, min(i + _SLAB, len(density))) for i in range(0, len(density), _SLAB)]
    run_tasks(_add_slab, [(*slab, *arrays, -half_extent, cell, density) for slab in slabs])
    return torch.from_numpy(density)


def enclosed(matter: Bool[Tensor, "n n n"], reach_cells: int) -> Bool[Tensor, "n n n"]:
    """Empty cells inside a thin, leaky shell: those that a ball of radius `reach_cells` cannot enter from outside.

    The shell is thickened until its gaps close, the hollow core behind it is found, and grown back up to the shell
    and into the gaps. An opening wider than two radii (a mug's mouth) stays open, and what is too narrow for the
    ball to stand in stays empty.
    """
    # The margin keeps the thickened shell from walling off the corners of the box.
    solid = np.pad(matter.cpu().numpy(), reach_cells + 1)
    # Distance maps instead of repeated dilation: round, and as fast for any radius.
    thick = ndimage.distance_transform_edt(~solid) <= reach_cells
    core = ndimage.binary_fill_holes(thick) & ~thick
    if not core.any():
        return torch.zeros_like(matter)
    inside = (ndimage.distance_transform_edt(~core) <= reach_cells + 1) & ~solid
    crop = slice(reach_cells + 1, -reach_cells - 1)
    return torch.from_numpy(inside[crop, crop, crop].copy())


def colors_at(
    points: Float[Tensor, "n 3"],
    means: Float[Tensor, "g 3"],
    quats_wxyz: Float[Tensor, "g 4"],
    scales: Float[Tensor, "g 3"],
    opacity: Float[Tensor, " g"],
    color: Float[Tensor, "g 3"],
) -> Float[Tensor, "n 3"]:
    """Mean colour of the eight nearest Gaussians, weighted by opacity and by their density at the point."""
    tree = cKDTree(means.cpu().numpy())
    wanted = min(_NEIGHBOURS, len(means))
    nearest = tree.query(points.cpu().numpy(), k=list(range(1, wanted + 1)), workers=1)[1]
    index = torch.from_numpy(nearest).to(means.device)
    away = points[:, None] - means[index]
    along = (rotation_matrices(quats_wxyz)[index].transpose(2, 3) @ away[..., None]).squeeze(-1) / scales[
        index
    ]
    # A softmax of logarithms: far from every Gaussian the nearest one still counts.
    weight = torch.softmax(torch.log(opacity[index]) - 0.5 * along.square().sum(-1), -1)
    return (weight[..., None] * color[index]).sum(1)
