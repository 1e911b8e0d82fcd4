"""From a density on a lattice to a closed surface: the choice of the iso value, and marching cubes."""

import math

import numpy as np
import torch
from jaxtyping import Float
from skimage import measure
from torch import Tensor

from sds3d.errors import NoSurfaceError
from sds3d.interfaces import Surface

_BINS = 256
_HAZE = 0.02  # share of the highest opacity up to which a cell counts as empty


def auto_iso(density: Float[Tensor, "n n n"], cell_m: float) -> float:
    """The density (1/m) that best parts matter from empty space, by Otsu's criterion on the opacity of a cell.

    Density sigma becomes the opacity a = 1 - exp(-cell_m sigma) of one cell, which tames the unbounded tail of
    dense interiors. The threshold maximises the variance between the classes a <= a* and a > a*, with at most as
    many empty cells counted as there are others, so that the size of the box does not matter.
    Source: Otsu 1979, A Threshold Selection Method from Gray-Level Histograms. Raises NoSurfaceError if all is
    empty: no point would make a wall of four cells 2 % opaque.
    """
    highest = float(density.max())
    if not 4 * cell_m * highest > _HAZE:
        raise NoSurfaceError(
            f"the scene is empty: its densest point has {highest:.3g} 1/m, too thin for a surface. "
            "Train longer, or lower the weight of the opacity penalty."
        )
    top = -math.expm1(-cell_m * highest)
    share = -torch.expm1(-density.detach().cpu().double().flatten() * cell_m) / top
    matter = share[share > _HAZE]
    count = torch.histc(matter, _BINS, 0.0, 1.0).numpy()
    count[0] += min(share.numel() - matter.numel(), matter.numel())
    middle = (np.arange(_BINS) + 0.5) / _BINS
    low, low_sum = np.cumsum(count)[:-1], np.cumsum(count * middle)[:-1]
    high, high_sum = count.sum() - low, (count * middle).sum() - low_sum
    between = low * high * (low_sum / np.maximum(low, 1) - high_sum / np.maximum(high, 1)) ** 2
    # Vacant bins between two classes make a plateau of equally good thresholds: take its middle.
    best = np.flatnonzero(between >= between.max() * (1 - 1e-9))
    threshold = (best[0] + best[-1] + 2) / (2 * _BINS)
    return -math.log1p(-threshold * top) / cell_m


def marching_cubes(
    density: Float[Tensor, "n n n"], iso: float, half_extent: float, *, outside: float = 0.0
) -> Surface:
    """The surface density = iso, closed and counter-clockwise seen from outside (positive signed volume).

    Axes of `density` are x, y, z; its first and last samples lie at -half_extent and +half_extent metres.
    `density` may be any rising function of it; `outside` is its value beyond the border, where matter is closed at most
    one cell away. Raises NoSurfaceError where no sample exceeds iso.
    """
    if not float(density.max()) > iso:
        raise NoSurfaceError(
            f"no surface: the density stays below iso {iso:.3g} 1/m (highest: {float(density.max()):.3g} 1/m)"
        )
    cell = 2 * half_extent / (density.shape[0] - 1)
    padded = np.pad(density.detach().cpu().numpy().astype(np.float32), 1, constant_values=outside)
    # skimage's "ascent" winds faces so that they look towards lower values, which here is outside.
    vertices, faces, _, _ = measure.marching_cubes(padded, iso, gradient_direction="ascent")
    world = (vertices - 1) * cell - half_extent
    return Surface(
        vertices=torch.from_numpy(world.astype(np.float32)),
        faces=torch.from_numpy(faces.astype(np.int64)),
    )
