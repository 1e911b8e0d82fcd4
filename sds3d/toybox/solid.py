"""A toy as geometry: its signed distance, its surface as triangles, and its true colours at points."""

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from sds3d.interfaces import Surface
from sds3d.mesh.isosurface import marching_cubes
from sds3d.toybox.sdf import distances
from sds3d.toybox.shapes import SLOT_FIXED, SLOT_SECOND, Toy

HALF_EXTENT_M = 1.05


def toy_distance(toy: Toy, points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(distances in metres, negative inside; indices of the primitives that are nearest) at world points (n, 3).

    Primitives are added or cut in their order. Exact at the surface; inside, and around cuts, an estimate.
    """
    best = np.full(len(points), np.inf)
    owner = np.full(len(points), -1, np.int64)
    for index in range(len(toy.shape)):
        local = (points - toy.center[index]) @ toy.rotation[index].T.astype(np.float64)
        value = distances(int(toy.shape[index]), toy.params[index].astype(np.float64), local)
        nearer = -value > best if toy.cut[index] else value < best
        best = np.where(nearer, -value if toy.cut[index] else value, best)
        owner[nearer] = index
    return best, owner


def toy_surface(toy: Toy, cells: int = 96) -> Surface:
    """The toy's surface by marching cubes on `cells` per side of the cube of half side HALF_EXTENT_M."""
    axis = np.linspace(-HALF_EXTENT_M, HALF_EXTENT_M, cells + 1)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    distance, _ = toy_distance(toy, points)
    inside = torch.from_numpy(-distance.reshape(cells + 1, cells + 1, cells + 1)).float()
    return marching_cubes(inside, 0.0, HALF_EXTENT_M)


def toy_colors(
    toy: Toy, points: Float[Tensor, "n 3"], main: NDArray[np.floating], second: NDArray[np.floating]
) -> Float[Tensor, "n 3"]:
    """The sRGB base colour at points on the surface for these main and second colours (3,)."""
    _, owner = toy_distance(toy, points.detach().cpu().double().numpy())
    paint = np.where((toy.slot == SLOT_SECOND)[:, None], second, main) * toy.tint[:, :1]
    paint = np.where((toy.slot == SLOT_FIXED)[:, None], toy.tint, paint)
    return torch.from_numpy(paint[owner].astype(np.float32)).to(points.device)
