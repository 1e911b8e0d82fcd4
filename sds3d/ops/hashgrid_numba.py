"""CPU kernels of the multiresolution hash encoding: one level per call, generic over float32 / float64.

Notation: n points, L levels, F features per level; `positions` in [0, 1]; `cells` is the number of cells per
side of the level, so its lattice has cells + 1 corners per side. Its rows of the table start at `first`; a
`dense` level stores every corner, a hashed one folds them into `size` rows (a power of two).
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from sds3d.ops.threads import run_tasks

Levels = tuple[tuple[int, int, int, bool], ...]  # (cells, first, size, dense) of every active level

_PRIME_Y = 2654435761
_PRIME_Z = 805459861
_FASTMATH = {"contract"}  # NaN in, NaN out: nothing here may hide a non-finite value


@njit(nogil=True, cache=True, inline="always", fastmath=_FASTMATH)
def _locate(positions, i, cells):  # type: ignore[no-untyped-def]
    """Cell of point i and its place in it; positions outside [0, 1] extrapolate the border cell."""
    px, py, pz = positions[i, 0] * cells, positions[i, 1] * cells, positions[i, 2] * cells
    x, y, z = (
        min(max(int(px), 0), cells - 1),
        min(max(int(py), 0), cells - 1),
        min(max(int(pz), 0), cells - 1),
    )
    return x, y, z, px - x, py - y, pz - z


@njit(nogil=True, cache=True, inline="always")
def _row(x, y, z, cells, size, dense):  # type: ignore[no-untyped-def]
    """Row of a corner within its level."""
    if dense:
        return x + (cells + 1) * (y + (cells + 1) * z)
    return (x ^ (y * _PRIME_Y) ^ (z * _PRIME_Z)) & (size - 1)


@njit(nogil=True, cache=True, inline="always", fastmath=_FASTMATH)
def _corner_weight(corner, fx, fy, fz):  # type: ignore[no-untyped-def]
    """Trilinear weight of corner 0..7, bits (x, y, z) from the lowest."""
    wx = fx if corner & 1 else 1 - fx
    wy = fy if corner & 2 else 1 - fy
    wz = fz if corner & 4 else 1 - fz
    return wx * wy * wz


@njit(nogil=True, cache=True, fastmath=_FASTMATH)
def encode_level(positions, table, cells, first, size, dense, out):  # type: ignore[no-untyped-def]
    """out[n, F] += trilinear interpolation of the level's corner features at the n positions."""
    for i in range(positions.shape[0]):
        x, y, z, fx, fy, fz = _locate(positions, i, cells)
        if table.shape[1] == 2:  # the usual width, kept in registers
            a = out[i, 0]
            b = out[i, 1]
            for corner in range(8):
                weight = _corner_weight(corner, fx, fy, fz)
                cx, cy, cz = x + (corner & 1), y + ((corner >> 1) & 1), z + (corner >> 2)
                row = first + _row(cx, cy, cz, cells, size, dense)
                a += weight * table[row, 0]
                b += weight * table[row, 1]
            out[i, 0] = a
            out[i, 1] = b
        else:
            for corner in range(8):
                weight = _corner_weight(corner, fx, fy, fz)
                cx, cy, cz = x + (corner & 1), y + ((corner >> 1) & 1), z + (corner >> 2)
                row = first + _row(cx, cy, cz, cells, size, dense)
                for f in range(table.shape[1]):
                    out[i, f] += weight * table[row, f]


@njit(nogil=True, cache=True, fastmath=_FASTMATH)
def scatter_level(positions, grad_out, cells, first, size, dense, grad_table):  # type: ignore[no-untyped-def]
    """Adjoint of `encode_level` in the table; points are added in order, so the sums never vary."""
    for i in range(positions.shape[0]):
        x, y, z, fx, fy, fz = _locate(positions, i, cells)
        for corner in range(8):
            weight = _corner_weight(corner, fx, fy, fz)
            cx, cy, cz = x + (corner & 1), y + ((corner >> 1) & 1), z + (corner >> 2)
            row = first + _row(cx, cy, cz, cells, size, dense)
            for f in range(grad_table.shape[1]):
                grad_table[row, f] += weight * grad_out[i, f]


def encode(
    positions: NDArray[np.floating], table: NDArray[np.floating], levels: Levels
) -> NDArray[np.floating]:
    """Features (L, n, F) of the given levels at the positions (n, 3); one task per level."""
    out = np.zeros((len(levels), positions.shape[0], table.shape[1]), table.dtype)
    run_tasks(encode_level, [(positions, table, *level, out[i]) for i, level in enumerate(levels)])
    return out


def scatter(
    positions: NDArray[np.floating], grad_out: NDArray[np.floating], rows: int, levels: Levels
) -> NDArray[np.floating]:
    """Gradient (rows, F) of the table from that of the features (L, n, F); levels own disjoint rows."""
    grad = np.zeros((rows, grad_out.shape[2]), grad_out.dtype)
    run_tasks(scatter_level, [(positions, grad_out[i], *level, grad) for i, level in enumerate(levels)])
    return grad
