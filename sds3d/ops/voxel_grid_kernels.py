"""CPU kernels that build a voxel grid from its levels, and measure its variation (see `voxel_grid.py`), float32.

Every loop runs along x, the contiguous axis, so that the compiler can use vector instructions. `cell` and `part`
are the cell and the place in it, along one axis, of each fine voxel in a coarse level.
"""

import numpy as np
from numba import njit

_f = np.float32
_ZERO, _ONE, _TWO = _f(0.0), _f(1.0), _f(2.0)

# Without "nnan" and "ninf": a NaN in a parameter must come out as a NaN in the grid.
_FLAGS = {"contract", "reassoc", "nsz", "arcp", "afn"}
_kernel = njit(cache=True, nogil=True, error_model="numpy", fastmath=_FLAGS)
_inline = njit(cache=True, nogil=True, error_model="numpy", fastmath=_FLAGS, forceinline=True)


@_inline
def _sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + exp(-x)) to float32 accuracy, free of branches and calls so that loops over it vectorise."""
    y = x * _f(-1.4426950408889634)
    y = min(max(y, _f(-126.0)), _f(126.0))
    n = np.int32(y + _f(127.5))  # rounds: the sum is positive
    f = (y - _f(n - np.int32(127))) * _f(0.6931471805599453)
    power = _f(1 / 720)  # exp(f), |f| <= log(2) / 2, by its series
    power = power * f + _f(1 / 120)
    power = power * f + _f(1 / 24)
    power = power * f + _f(1 / 6)
    power = power * f + _f(0.5)
    power = power * f + _ONE
    power = power * f + _ONE
    return _ONE / (_ONE + power * np.int32(n << np.int32(23)).view(np.float32))


@_kernel
def expand(coarse, cell, part, rows, planes):  # type: ignore[no-untyped-def]
    """One channel (n n n) of a coarse level, interpolated along x and y: planes (n N N)."""
    n, fine = coarse.shape[0], cell.shape[0]
    for i in range(n):
        for j in range(n):
            for x in range(fine):
                near = coarse[i, j, cell[x]]
                rows[j, x] = near + part[x] * (coarse[i, j, cell[x] + 1] - near)
        for y in range(fine):
            j, w = cell[y], part[y]
            for x in range(fine):
                planes[i, y, x] = rows[j, x] + w * (rows[j + 1, x] - rows[j, x])


@_kernel
def assemble(z0, z1, fine, planes, first, part, base, density_gain, color_gain, rows, grid):  # type: ignore[no-untyped-def]
    """Slices z0..z1 of the grid: sums levels along z (`first` counts planes of all levels), then activates."""
    size = fine.shape[1]
    for z in range(z0, z1):
        for y in range(size):
            for c in range(4):
                for x in range(size):
                    rows[c, x] = fine[c, z, y, x]
                for level in range(first.shape[0]):
                    p, w = first[level, z], part[level, z]
                    for x in range(size):
                        near = planes[c, p, y, x]
                        rows[c, x] += near + w * (planes[c, p + 1, y, x] - near)
            for c in range(1, 4):
                for x in range(size):
                    rows[c, x] = _sigmoid(color_gain * rows[c, x])
            for x in range(size):
                grid[z, y, x, 0] = base[z, y, x] + density_gain * rows[0, x]
                grid[z, y, x, 1] = rows[1, x]
                grid[z, y, x, 2] = rows[2, x]
                grid[z, y, x, 3] = rows[3, x]


@_kernel
def assemble_adjoint(z0, z1, grid, d_grid, density_gain, color_gain, d_fine):  # type: ignore[no-untyped-def]
    """Slices z0..z1 of the gradient with respect to the sum of levels, channels first."""
    size = grid.shape[0]
    for z in range(z0, z1):
        for y in range(size):
            for x in range(size):
                r, g, b = grid[z, y, x, 1], grid[z, y, x, 2], grid[z, y, x, 3]
                d_fine[0, z, y, x] = density_gain * d_grid[z, y, x, 0]
                d_fine[1, z, y, x] = color_gain * (r - r * r) * d_grid[z, y, x, 1]
                d_fine[2, z, y, x] = color_gain * (g - g * g) * d_grid[z, y, x, 2]
                d_fine[3, z, y, x] = color_gain * (b - b * b) * d_grid[z, y, x, 3]


@_kernel
def expand_adjoint(d_fine, cell, part, planes, rows, d_coarse):  # type: ignore[no-untyped-def]
    """One channel (N N N) of the gradient, gathered along z, y and x into d_coarse (n n n)."""
    size, n = d_fine.shape[0], d_coarse.shape[0]
    planes[:] = _ZERO
    d_coarse[:] = _ZERO
    for z in range(size):
        i, w = cell[z], part[z]
        for y in range(size):
            for x in range(size):
                far = w * d_fine[z, y, x]
                planes[i, y, x] += d_fine[z, y, x] - far
                planes[i + 1, y, x] += far
    for i in range(n):
        rows[:] = _ZERO
        for y in range(size):
            j, w = cell[y], part[y]
            for x in range(size):
                far = w * planes[i, y, x]
                rows[j, x] += planes[i, y, x] - far
                rows[j + 1, x] += far
        for j in range(n):
            for x in range(size):
                far = part[x] * rows[j, x]
                d_coarse[i, j, cell[x]] += rows[j, x] - far
                d_coarse[i, j, cell[x] + 1] += far


@_inline
def _clamp(x, limit):  # type: ignore[no-untyped-def]
    """Clamped to +- limit; a NaN stays one."""
    return -limit if x < -limit else (limit if x > limit else x)


@_inline
def _square(a):  # type: ignore[no-untyped-def]
    return a * a


@_inline
def _row_variation(grid, z, y, to_z, to_y, to_x, limit):  # type: ignore[no-untyped-def]
    """Squared differences between a row and another one, or itself one voxel on: (clamped logits, colours)."""
    logit, color = _ZERO, _ZERO
    for x in range(grid.shape[2] - to_x):
        logit += _square(_clamp(grid[to_z, to_y, x + to_x, 0], limit) - _clamp(grid[z, y, x, 0], limit))
        color += _square(grid[to_z, to_y, x + to_x, 1] - grid[z, y, x, 1])
        color += _square(grid[to_z, to_y, x + to_x, 2] - grid[z, y, x, 2])
        color += _square(grid[to_z, to_y, x + to_x, 3] - grid[z, y, x, 3])
    return logit, color


@_kernel
def variation(z0, z1, grid, limit, sums):  # type: ignore[no-untyped-def]
    """Adds the squared forward differences that start in slices z0..z1: sums = (clamped logits, colours)."""
    for z in range(z0, z1):
        for y in range(grid.shape[1]):
            logit, color = _row_variation(grid, z, y, z, y, 1, limit)
            if y + 1 < grid.shape[1]:
                more = _row_variation(grid, z, y, z, y + 1, 0, limit)
                logit, color = logit + more[0], color + more[1]
            if z + 1 < grid.shape[0]:
                more = _row_variation(grid, z, y, z + 1, y, 0, limit)
                logit, color = logit + more[0], color + more[1]
            sums[0] += logit
            sums[1] += color


@_kernel
def variation_adjoint(z0, z1, grid, limit, by_logit, by_color, d_grid):  # type: ignore[no-untyped-def]
    """Slices z0..z1 of the gradient of by_logit sums[0] / 2 + by_color sums[1] / 2."""
    size_z, size_y, size_x, _ = grid.shape
    for z in range(z0, z1):
        z_before, z_next = max(z - 1, 0), min(z + 1, size_z - 1)
        for y in range(size_y):
            y_before, y_next = max(y - 1, 0), min(y + 1, size_y - 1)
            for x in range(size_x):
                x_before, x_next = max(x - 1, 0), min(x + 1, size_x - 1)
                raw = grid[z, y, x, 0]
                around = _clamp(grid[z, y, x_before, 0], limit) + _clamp(grid[z, y, x_next, 0], limit)
                around += _clamp(grid[z, y_before, x, 0], limit) + _clamp(grid[z, y_next, x, 0], limit)
                around += _clamp(grid[z_before, y, x, 0], limit) + _clamp(grid[z_next, y, x, 0], limit)
                slope = by_logit * (_f(6.0) * _clamp(raw, limit) - around)
                d_grid[z, y, x, 0] = _ZERO if abs(raw) > limit else slope
                for channel in range(1, 4):
                    around = grid[z, y, x_before, channel] + grid[z, y, x_next, channel]
                    around += grid[z, y_before, x, channel] + grid[z, y_next, x, channel]
                    around += grid[z_before, y, x, channel] + grid[z_next, y, x, channel]
                    d_grid[z, y, x, channel] = by_color * (_f(6.0) * grid[z, y, x, channel] - around)
