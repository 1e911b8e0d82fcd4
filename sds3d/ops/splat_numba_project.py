"""Projection of Gaussians on the CPU, forward and by-hand backward; mathematics and letters as in `splat_reference`.

With A = axes = R diag(scales) (so Sigma = A A^T), the two rows of J W A are u and v, the image covariance is
C = [[u.u, u.v], [u.v, v.v]] + 0.3 I, and its inverse is the conic Q.
"""

import math

from sds3d.ops.splat_numba_blocks import (
    BAND_ROWS,
    H0,
    HALF_X,
    HALF_Y,
    HX,
    HXX,
    HXY,
    HY,
    HYY,
    MOMENTS,
    OPACITY,
    REACH,
    ROW_FIRST,
    ROW_LAST,
    S_XX,
    S_XY,
    S_YY,
    SIDE,
    TILT,
    W_B,
    W_G,
    W_R,
    W_Z,
    B,
    Floats,
    G,
    Ints,
    R,
    X,
    Y,
    Z,
    inlined,
    kernel,
)
from sds3d.ops.splat_reference import ALPHA_MIN, BLUR_PX2, DETERMINANT_MIN, NEAR_M, NORM_MIN

# A camera as one row: rotation (row-major) and translation of world-to-camera, intrinsics, and the slopes x/z, y/z
# between which the Jacobian is evaluated.
W, SHIFT, FX, FY, CX, CY, X_LOW, X_HIGH, Y_LOW, Y_HIGH = 0, 9, 12, 13, 14, 15, 16, 17, 18, 19
CAMERA_WIDTH = 20


@inlined
def _rotation(quats: Floats, i: int) -> tuple[float, ...]:
    """Unit quaternion w, x, y, z and the inverse of its former length."""
    real = quats.dtype.type
    w, x, y, z = quats[i, 0], quats[i, 1], quats[i, 2], quats[i, 3]
    inverse = real(1.0) / max(math.sqrt(w * w + x * x + y * y + z * z), real(NORM_MIN))
    return w * inverse, x * inverse, y * inverse, z * inverse, inverse


@kernel
def make_axes(first: int, last: int, quats: Floats, scales: Floats, axes: Floats) -> None:
    """Fill axes (g, 9) = R(q) diag(scales), row-major."""
    real = quats.dtype.type
    one, two = real(1.0), real(2.0)
    for i in range(first, last):
        w, x, y, z, _ = _rotation(quats, i)
        s0, s1, s2 = scales[i, 0], scales[i, 1], scales[i, 2]
        axes[i, 0] = (one - two * (y * y + z * z)) * s0
        axes[i, 1] = two * (x * y - w * z) * s1
        axes[i, 2] = two * (x * z + w * y) * s2
        axes[i, 3] = two * (x * y + w * z) * s0
        axes[i, 4] = (one - two * (x * x + z * z)) * s1
        axes[i, 5] = two * (y * z - w * x) * s2
        axes[i, 6] = two * (x * z - w * y) * s0
        axes[i, 7] = two * (y * z + w * x) * s1
        axes[i, 8] = (one - two * (x * x + y * y)) * s2


@kernel
def find_visible(means: Floats, opacity: Floats, camera: Floats, ids: Ints, depth: Floats) -> int:
    """Indices and depths of the Gaussians before the camera that can reach alpha 1/255; returns their number."""
    real = means.dtype.type
    found = 0
    for i in range(means.shape[0]):
        z = camera[6] * means[i, 0] + camera[7] * means[i, 1] + camera[8] * means[i, 2] + camera[11]
        if z > real(NEAR_M) and opacity[i] >= real(ALPHA_MIN):
            ids[found] = i
            depth[found] = z
            found += 1
    return found


@inlined
def _image_axes(mean: Floats, axes: Floats, camera: Floats) -> tuple[float, ...]:
    """Camera-frame mean, clamped slopes, third row of W A, and the rows u and v of J W A."""
    m0, m1, m2 = mean[0], mean[1], mean[2]
    x = camera[0] * m0 + camera[1] * m1 + camera[2] * m2 + camera[9]
    y = camera[3] * m0 + camera[4] * m1 + camera[5] * m2 + camera[10]
    z = camera[6] * m0 + camera[7] * m1 + camera[8] * m2 + camera[11]
    slope_x = min(max(x / z, camera[X_LOW]), camera[X_HIGH])
    slope_y = min(max(y / z, camera[Y_LOW]), camera[Y_HIGH])
    scale_x, scale_y = camera[FX] / z, camera[FY] / z
    r0 = camera[6] * axes[0] + camera[7] * axes[3] + camera[8] * axes[6]
    r1 = camera[6] * axes[1] + camera[7] * axes[4] + camera[8] * axes[7]
    r2 = camera[6] * axes[2] + camera[7] * axes[5] + camera[8] * axes[8]
    u0 = (camera[0] * axes[0] + camera[1] * axes[3] + camera[2] * axes[6] - slope_x * r0) * scale_x
    u1 = (camera[0] * axes[1] + camera[1] * axes[4] + camera[2] * axes[7] - slope_x * r1) * scale_x
    u2 = (camera[0] * axes[2] + camera[1] * axes[5] + camera[2] * axes[8] - slope_x * r2) * scale_x
    v0 = (camera[3] * axes[0] + camera[4] * axes[3] + camera[5] * axes[6] - slope_y * r0) * scale_y
    v1 = (camera[3] * axes[1] + camera[4] * axes[4] + camera[5] * axes[7] - slope_y * r1) * scale_y
    v2 = (camera[3] * axes[2] + camera[4] * axes[5] + camera[5] * axes[8] - slope_y * r2) * scale_y
    return x, y, z, slope_x, slope_y, r0, r1, r2, u0, u1, u2, v0, v1, v2


@kernel
def project_sorted(
    ids: Ints,
    means: Floats,
    axes: Floats,
    opacity: Floats,
    color: Floats,
    camera: Floats,
    width: int,
    height: int,
    splats: Floats,
) -> None:
    """Fill row k of `splats` (n, SPLAT_WIDTH) with Gaussian ids[k]."""
    real = means.dtype.type
    half = real(0.5)
    for k in range(ids.shape[0]):
        i, splat = ids[k], splats[k]
        x, y, z, _, _, _, _, _, u0, u1, u2, v0, v1, v2 = _image_axes(means[i], axes[i], camera)
        c_xx = u0 * u0 + u1 * u1 + u2 * u2 + real(BLUR_PX2)
        c_yy = v0 * v0 + v1 * v1 + v2 * v2 + real(BLUR_PX2)
        c_xy = u0 * v0 + u1 * v1 + u2 * v2
        inverse = real(1.0) / max(c_xx * c_yy - c_xy * c_xy, real(DETERMINANT_MIN))
        splat[X] = camera[FX] * x / z + camera[CX] - half
        splat[Y] = camera[FY] * y / z + camera[CY] - half
        splat[S_XX], splat[S_XY], splat[S_YY] = half * c_yy * inverse, -c_xy * inverse, half * c_xx * inverse
        splat[OPACITY] = opacity[i]
        splat[REACH] = math.log(opacity[i] / real(ALPHA_MIN))
        splat[R], splat[G], splat[B], splat[Z] = color[i, 0], color[i, 1], color[i, 2], z
        splat[HALF_X] = math.sqrt(real(2.0) * splat[REACH] * c_xx)
        splat[HALF_Y] = math.sqrt(real(2.0) * splat[REACH] * c_yy)
        splat[TILT] = splat[HALF_X] * c_xy / c_xx
        left, right = splat[X] - splat[HALF_X], splat[X] + splat[HALF_X]
        top = math.ceil(max(splat[Y] - splat[HALF_Y], real(0.0)))
        bottom = math.floor(min(splat[Y] + splat[HALF_Y], real(height - 1)))
        # An overflow makes the comparisons false: such a Gaussian is not drawn.
        if right >= real(0.0) and left <= real(width - 1) and top <= bottom:
            splat[ROW_FIRST], splat[ROW_LAST] = real(int(top) // SIDE), real(int(bottom) // SIDE)
        else:
            splat[ROW_FIRST], splat[ROW_LAST] = real(0.0), real(-1.0)


@kernel
def count_entries(splats: Floats, columns: int, starts: Ints, entries: Ints, capacity: Ints) -> None:
    """Entries per Gaussian (as running sum in `starts`), per band, and the most blocks a band's entries can touch."""
    real = splats.dtype.type
    last_px = real(columns * SIDE - 1)
    total = 0
    for k in range(splats.shape[0]):
        splat = splats[k]
        starts[k] = total
        row_first, row_last = int(splat[ROW_FIRST]), int(splat[ROW_LAST])
        if row_first > row_last:
            continue
        first = int(max(splat[X] - splat[HALF_X], real(0.0))) // SIDE
        last = int(min(splat[X] + splat[HALF_X], last_px)) // SIDE
        for band in range(row_first // BAND_ROWS, row_last // BAND_ROWS + 1):
            rows = min(row_last, band * BAND_ROWS + BAND_ROWS - 1) - max(row_first, band * BAND_ROWS) + 1
            entries[band] += 1
            # One block of slack on either side, as in `block_span`.
            capacity[band] += rows * (last - first + 3)
            total += 1
    starts[splats.shape[0]] = total


@kernel
def list_entries(splats: Floats, starts: Ints, offsets: Ints, ranks: Ints, slots: Ints) -> None:
    """Per band, front to back: the Gaussian's rank and the row of the gradient table that is its own."""
    filled = offsets[:-1].copy()
    for k in range(splats.shape[0]):
        slot = starts[k]
        row_first, row_last = int(splats[k, ROW_FIRST]), int(splats[k, ROW_LAST])
        if row_first > row_last:
            continue
        for band in range(row_first // BAND_ROWS, row_last // BAND_ROWS + 1):
            ranks[filled[band]] = k
            slots[filled[band]] = slot
            filled[band] += 1
            slot += 1


@inlined
def _conic_to_axes(splat: Floats, sums: Floats) -> tuple[float, float, float]:
    """P = Q H Q with H the second moments: dL/du = P_xx u + P_xy v, dL/dv = P_xy u + P_yy v.

    From dL/dQ = -H/2 (both off-diagonal halves), dL/dC = -Q (dL/dQ) Q, and C = [u; v] [u; v]^T.
    """
    q_xx, q_xy, q_yy = splat[S_XX] + splat[S_XX], splat[S_XY], splat[S_YY] + splat[S_YY]
    h_xx, h_xy, h_yy = sums[HXX], sums[HXY], sums[HYY]
    a, b = q_xx * h_xx + q_xy * h_xy, q_xx * h_xy + q_xy * h_yy
    c, d = q_xy * h_xx + q_yy * h_xy, q_xy * h_xy + q_yy * h_yy
    return a * q_xx + b * q_xy, a * q_xy + b * q_yy, c * q_xy + d * q_yy


@kernel
def differentiate_projection(
    first: int,
    last: int,
    rank_of: Ints,
    starts: Ints,
    splats: Floats,
    moments: Floats,
    means: Floats,
    axes: Floats,
    camera: Floats,
    d_means: Floats,
    d_axes: Floats,
    d_opacity: Floats,
    d_color: Floats,
) -> None:
    """Add one view's gradients of Gaussians first..last to d_means, d_axes, d_opacity and d_color."""
    for i in range(first, last):
        k = rank_of[i]
        if k < 0 or starts[k] == starts[k + 1]:
            continue
        # The first band's row takes the sum over the bands.
        sums = moments[starts[k]]
        for slot in range(starts[k] + 1, starts[k + 1]):
            for moment in range(MOMENTS):
                sums[moment] += moments[slot, moment]
        d_opacity[i] += sums[H0] / splats[k, OPACITY]
        d_color[i, 0] += sums[W_R]
        d_color[i, 1] += sums[W_G]
        d_color[i, 2] += sums[W_B]
        _differentiate_geometry(splats[k], sums, means[i], axes[i], camera, d_means[i], d_axes[i])


@inlined
def _differentiate_geometry(
    splat: Floats, sums: Floats, mean: Floats, axes: Floats, camera: Floats, d_mean: Floats, d_axes: Floats
) -> None:
    x, y, z, slope_x, slope_y, r0, r1, r2, u0, u1, u2, v0, v1, v2 = _image_axes(mean, axes, camera)
    p_xx, p_xy, p_yy = _conic_to_axes(splat, sums)
    scale_x, scale_y = camera[FX] / z, camera[FY] / z

    # Through u = (row 0 of W A - slope_x row 2 of W A) fx / z; the same for v.
    du0, du1, du2 = p_xx * u0 + p_xy * v0, p_xx * u1 + p_xy * v1, p_xx * u2 + p_xy * v2
    dv0, dv1, dv2 = p_xy * u0 + p_yy * v0, p_xy * u1 + p_yy * v1, p_xy * u2 + p_yy * v2
    dz = -(du0 * u0 + du1 * u1 + du2 * u2 + dv0 * v0 + dv1 * v1 + dv2 * v2) / z
    du0, du1, du2 = du0 * scale_x, du1 * scale_x, du2 * scale_x
    dv0, dv1, dv2 = dv0 * scale_y, dv1 * scale_y, dv2 * scale_y
    for row in range(3):
        w0, w1 = camera[row], camera[3 + row]
        w2 = camera[6 + row]
        d_axes[3 * row] += w0 * du0 + w1 * dv0 - w2 * (slope_x * du0 + slope_y * dv0)
        d_axes[3 * row + 1] += w0 * du1 + w1 * dv1 - w2 * (slope_x * du1 + slope_y * dv1)
        d_axes[3 * row + 2] += w0 * du2 + w1 * dv2 - w2 * (slope_x * du2 + slope_y * dv2)

    # Through the image centre, s = a dx^2 + b dx dy + c dy^2 with d(dx)/d(centre) = -1.
    d_center_x = splat[S_XX] * (sums[HX] + sums[HX]) + splat[S_XY] * sums[HY]
    d_center_y = splat[S_YY] * (sums[HY] + sums[HY]) + splat[S_XY] * sums[HX]
    dx, dy = d_center_x * scale_x, d_center_y * scale_y
    dz += sums[W_Z] - (dx * x + dy * y) / z
    # Through the slopes, unless clamped.
    if camera[X_LOW] < slope_x < camera[X_HIGH]:
        d_slope = -(du0 * r0 + du1 * r1 + du2 * r2) / z
        dx += d_slope
        dz -= d_slope * slope_x
    if camera[Y_LOW] < slope_y < camera[Y_HIGH]:
        d_slope = -(dv0 * r0 + dv1 * r1 + dv2 * r2) / z
        dy += d_slope
        dz -= d_slope * slope_y
    for column in range(3):
        d_mean[column] += camera[column] * dx + camera[3 + column] * dy + camera[6 + column] * dz


@kernel
def differentiate_axes(
    first: int, last: int, quats: Floats, scales: Floats, d_axes: Floats, d_quats: Floats, d_scales: Floats
) -> None:
    """Backward of `make_axes`."""
    real = quats.dtype.type
    one, two = real(1.0), real(2.0)
    for i in range(first, last):
        w, x, y, z, inverse = _rotation(quats, i)
        g = d_axes[i]
        s0, s1, s2 = scales[i, 0], scales[i, 1], scales[i, 2]
        d_scales[i, 0] = (one - two * (y * y + z * z)) * g[0] + two * (
            (x * y + w * z) * g[3] + (x * z - w * y) * g[6]
        )
        d_scales[i, 1] = (one - two * (x * x + z * z)) * g[4] + two * (
            (x * y - w * z) * g[1] + (y * z + w * x) * g[7]
        )
        d_scales[i, 2] = (one - two * (x * x + y * y)) * g[8] + two * (
            (x * z + w * y) * g[2] + (y * z - w * x) * g[5]
        )
        g0, g1, g2 = g[0] * s0, g[1] * s1, g[2] * s2
        g3, g4, g5 = g[3] * s0, g[4] * s1, g[5] * s2
        g6, g7, g8 = g[6] * s0, g[7] * s1, g[8] * s2
        dw = two * (z * (g3 - g1) + y * (g2 - g6) + x * (g7 - g5))
        dx = two * (y * (g1 + g3) + z * (g2 + g6) + w * (g7 - g5) - two * x * (g4 + g8))
        dy = two * (x * (g1 + g3) + z * (g5 + g7) + w * (g2 - g6) - two * y * (g0 + g8))
        dz = two * (x * (g2 + g6) + y * (g5 + g7) + w * (g3 - g1) - two * z * (g0 + g4))
        # Through the normalisation: only the part across the quaternion counts.
        along = w * dw + x * dx + y * dy + z * dz
        d_quats[i, 0], d_quats[i, 1] = (dw - w * along) * inverse, (dx - x * along) * inverse
        d_quats[i, 2], d_quats[i, 3] = (dy - y * along) * inverse, (dz - z * along) * inverse
