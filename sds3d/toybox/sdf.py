"""Signed distance functions of the six toybox primitives, compiled with numba.

Every primitive lives in its own local frame, centred at the origin, and is described by five
lengths (metres), the columns of a toy's ``params`` array:

========== =====================================================================
ELLIPSOID  (radius x, radius y, radius z, -, -)
BOX        (half x, half y, half z, rounding, -)
FRUSTUM    (half height, bottom radius, top radius, rounding, -), axis y
TORUS      (ring radius, tube radius, -, -, -), axis y
CAPSULE    (half length of the core segment, radius, -, -, -), axis y
WEDGE      (bottom half x, top half x, half y, half z, rounding): a trapezoid extruded along z
========== =====================================================================

Because all parameters are lengths, scaling a toy is one multiplication of the whole array.
"""

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

ELLIPSOID, BOX, FRUSTUM, TORUS, CAPSULE, WEDGE = range(6)
PARAM_COUNT = 5

# "nnan" and "ninf" are left out of the fast-math flags on purpose: the renderer compares against
# huge sentinel values. The numpy error model drops the division-by-zero checks.
#
# Numba's disk cache only watches the file of the function that Python calls: after editing this file
# or trace.py, touch march.py (or delete __pycache__) to have the renderer compiled anew.
kernel = njit(
    cache=True,
    nogil=True,
    error_model="numpy",
    fastmath={"contract", "reassoc", "nsz", "arcp", "afn"},
)


@kernel
def _trapezoid(x: float, y: float, half_height: float, bottom: float, top: float) -> float:
    """Exact distance to a symmetric trapezoid in the plane, for a point with x >= 0."""
    end = bottom if y < 0.0 else top
    cap_x = x - min(x, end)
    cap_y = abs(y) - half_height
    slope_x = top - bottom
    slope_y = 2.0 * half_height
    along = ((top - x) * slope_x + (half_height - y) * slope_y) / (slope_x * slope_x + slope_y * slope_y)
    along = min(1.0, max(0.0, along))
    side_x = x - top + slope_x * along
    side_y = y - half_height + slope_y * along
    sign = -1.0 if (side_x < 0.0 and cap_y < 0.0) else 1.0
    nearest = min(cap_x * cap_x + cap_y * cap_y, side_x * side_x + side_y * side_y)
    return sign * math.sqrt(nearest)


@kernel
def primitive_distance(
    shape: int, q0: float, q1: float, q2: float, q3: float, q4: float, x: float, y: float, z: float
) -> float:
    """Signed distance (metres, negative inside) from a local point to one primitive.

    Exact for all shapes but the ellipsoid, whose value is the usual first-order estimate; the
    renderer never relies on it to step towards an ellipsoid from outside.
    """
    if shape == ELLIPSOID:
        ax = x / q0
        ay = y / q1
        az = z / q2
        level = math.sqrt(ax * ax + ay * ay + az * az)
        ax /= q0
        ay /= q1
        az /= q2
        slope = math.sqrt(ax * ax + ay * ay + az * az)
        if slope < 1e-6:
            return -min(q0, min(q1, q2))
        return level * (level - 1.0) / slope
    if shape == BOX:
        bx = abs(x) - q0 + q3
        by = abs(y) - q1 + q3
        bz = abs(z) - q2 + q3
        ox = max(bx, 0.0)
        oy = max(by, 0.0)
        oz = max(bz, 0.0)
        return math.sqrt(ox * ox + oy * oy + oz * oz) + min(max(bx, max(by, bz)), 0.0) - q3
    if shape == FRUSTUM:
        radial = math.sqrt(x * x + z * z)
        return _trapezoid(radial, y, q0 - q3, max(q1 - q3, 0.0), max(q2 - q3, 0.0)) - q3
    if shape == TORUS:
        radial = math.sqrt(x * x + z * z) - q0
        return math.sqrt(radial * radial + y * y) - q1
    if shape == CAPSULE:
        beyond = y - min(max(y, -q0), q0)
        return math.sqrt(x * x + beyond * beyond + z * z) - q1
    flat = _trapezoid(abs(x), y, q2 - q4, max(q0 - q4, 0.0), max(q1 - q4, 0.0))
    deep = abs(z) - q3 + q4
    ox = max(flat, 0.0)
    oz = max(deep, 0.0)
    return math.sqrt(ox * ox + oz * oz) + min(max(flat, deep), 0.0) - q4


@kernel
def distances(shape: int, params: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Signed distances (n,) of local ``points`` (n, 3) to one primitive with ``params`` (5,)."""
    out = np.zeros(points.shape[0], np.float64)
    for i in range(points.shape[0]):
        out[i] = primitive_distance(
            shape,
            params[0],
            params[1],
            params[2],
            params[3],
            params[4],
            points[i, 0],
            points[i, 1],
            points[i, 2],
        )
    return out


def support_points(
    shape: int, params: NDArray[np.float64], directions: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Farthest points (n, 3) of a primitive along local unit ``directions`` (n, 3)."""
    q0, q1, q2, q3, q4 = (float(value) for value in params)
    signs = np.where(directions >= 0.0, 1.0, -1.0)
    if shape == ELLIPSOID:
        radii = params[:3]
        stretched = directions * radii
        return stretched * radii / np.linalg.norm(stretched, axis=1, keepdims=True)
    if shape == BOX:
        return signs * (params[:3] - q3) + q3 * directions
    if shape == CAPSULE:
        points = q1 * directions
        points[:, 1] += signs[:, 1] * q0
        return points
    if shape == WEDGE:
        ends = _trapezoid_ends(np.abs(directions[:, 0]), directions[:, 1], q2 - q4, q0 - q4, q1 - q4)
        depth = signs[:, 2] * (q3 - q4)
        return np.stack([signs[:, 0] * ends[:, 0], ends[:, 1], depth], axis=1) + q4 * directions
    radial = directions * np.array([1.0, 0.0, 1.0])
    length = np.linalg.norm(radial, axis=1, keepdims=True)
    radial = radial / np.maximum(length, 1e-9)
    if shape == TORUS:
        return q0 * radial + q1 * directions
    ends = _trapezoid_ends(length[:, 0], directions[:, 1], q0 - q3, q1 - q3, q2 - q3)
    return radial * ends[:, :1] + ends[:, 1:] * np.array([0.0, 1.0, 0.0]) + q3 * directions


def _trapezoid_ends(
    outward: NDArray[np.float64],
    upward: NDArray[np.float64],
    half_height: float,
    bottom: float,
    top: float,
) -> NDArray[np.float64]:
    """Corner (n, 2) as (x, y) of a trapezoid that is farthest along each plane direction."""
    bottom, top = max(bottom, 0.0), max(top, 0.0)
    use_top = outward * top + upward * half_height >= outward * bottom - upward * half_height
    return np.stack([np.where(use_top, top, bottom), np.where(use_top, half_height, -half_height)], axis=1)


def half_extents(shape: int, params: NDArray[np.float64]) -> tuple[float, float, float]:
    """Half sizes (x, y, z) of the local axis-aligned box that contains a primitive."""
    q0, q1, q2, q3, q4 = (float(value) for value in params)
    if shape in (ELLIPSOID, BOX):
        return q0, q1, q2
    if shape == FRUSTUM:
        radius = max(q1, q2, q3)
        return radius, q0, radius
    if shape == TORUS:
        return q0 + q1, q1, q0 + q1
    if shape == CAPSULE:
        return q1, q0 + q1, q1
    return max(q0, q1, q4), q2, q3
