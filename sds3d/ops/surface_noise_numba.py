"""Surface noise of one view, compiled with numba; see `surface_noise.py` for what it computes."""

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

# The finaliser of SplitMix64 and its increment (the golden ratio), as signed 64-bit numbers.
GOLDEN = -7046029254386353131
_A, _B = -4658895280553007687, -7723592293110705685
_KEEP_34, _KEEP_37, _KEEP_33 = (1 << 34) - 1, (1 << 37) - 1, (1 << 33) - 1
KEY_BITS = 21  # per lattice coordinate
KEY_HALF, KEY_MASK = 1 << (KEY_BITS - 1), (1 << KEY_BITS) - 1
LOW_32, LOW_53 = (1 << 32) - 1, (1 << 53) - 1


@njit(cache=True, nogil=True)
def mix(x: int) -> int:
    """A bijection of 64-bit numbers whose output looks random; `mix.py_func` does the same on int64 tensors."""
    x = (x ^ ((x >> 30) & _KEEP_34)) * _A
    x = (x ^ ((x >> 27) & _KEEP_37)) * _B
    return x ^ ((x >> 31) & _KEEP_33)


@njit(cache=True, nogil=True)
def _add_cell(key: int, weight: float, seed: int, age: float, sums: NDArray[np.float64]) -> None:
    """Add weight * W(key, channel) to `sums` (c,)."""
    state = mix(key * GOLDEN + seed)
    turn = 0.0
    if age > 0.0:
        bits = mix(state)
        turn = age * math.tan(math.pi * ((((bits >> 11) & LOW_53) + 0.5) * 2.0**-53 - 0.5))
    for channel in range(0, len(sums), 2):
        state += GOLDEN
        bits = mix(state)
        radius = weight * math.sqrt(-2.0 * math.log((((bits >> 32) & LOW_32) + 0.5) * 2.0**-32))
        angle = 2.0 * math.pi * (((bits & LOW_32) + 0.5) * 2.0**-32) + turn
        sums[channel] += radius * math.cos(angle)
        if channel + 1 < len(sums):
            sums[channel + 1] += radius * math.sin(angle)


@njit(cache=True, nogil=True)
def draw_pixels(seed: int, age: float, noise: NDArray[np.float32]) -> None:
    """Fill `noise` (c, h, w) with one cell per pixel."""
    channels, height, width = noise.shape
    sums = np.zeros(channels, np.float64)
    for row in range(height):
        for column in range(width):
            sums[:] = 0.0
            _add_cell(-1 - (row * width + column), 1.0, seed, age, sums)
            noise[:, row, column] = sums


@njit(cache=True, nogil=True)
def _owned_cell(
    x: float,
    y: float,
    z: float,
    turn: NDArray[np.float64],
    origin: NDArray[np.float64],
    lens: NDArray[np.float64],
    row: int,
    column: int,
) -> int:
    """Key of the cell around a point in camera axes, or -1 where the pixel does not see the centre of that cell."""
    a = math.floor(turn[0, 0] * x + turn[0, 1] * y + turn[0, 2] * z + origin[0])
    b = math.floor(turn[1, 0] * x + turn[1, 1] * y + turn[1, 2] * z + origin[1])
    c = math.floor(turn[2, 0] * x + turn[2, 1] * y + turn[2, 2] * z + origin[2])
    da, db, dc = a + 0.5 - origin[0], b + 0.5 - origin[1], c + 0.5 - origin[2]
    depth = turn[0, 2] * da + turn[1, 2] * db + turn[2, 2] * dc
    if depth <= 0.0:
        return -1
    x = turn[0, 0] * da + turn[1, 0] * db + turn[2, 0] * dc
    y = turn[0, 1] * da + turn[1, 1] * db + turn[2, 1] * dc
    if (
        math.floor(x / depth * lens[0] + lens[2]) != column
        or math.floor(y / depth * lens[1] + lens[3]) != row
    ):
        return -1
    i, j, k = (int(a) + KEY_HALF) & KEY_MASK, (int(b) + KEY_HALF) & KEY_MASK, (int(c) + KEY_HALF) & KEY_MASK
    return (i << (2 * KEY_BITS)) | (j << KEY_BITS) | k


@njit(cache=True, nogil=True)
def draw_view(
    near: NDArray[np.float64],
    tilt_x: NDArray[np.float64],
    tilt_y: NDArray[np.float64],
    turn: NDArray[np.float64],
    origin: NDArray[np.float64],
    lens: NDArray[np.float64],
    ray_x: NDArray[np.float64],
    ray_y: NDArray[np.float64],
    u_pixel: NDArray[np.int64],
    v_pixel: NDArray[np.int64],
    u_rest: NDArray[np.float64],
    v_rest: NDArray[np.float64],
    seed: int,
    age: float,
    noise: NDArray[np.float32],
    covered: NDArray[np.bool_],
) -> None:
    """Fill `covered` (h, w) and, where it is set, `noise` (c, h, w) of one view. For the rest see `Views`, `Grid`."""
    channels, height, width = noise.shape
    across = len(u_pixel) // width
    keys, hits = np.zeros(across * across, np.int64), np.zeros(across * across, np.float64)
    sums = np.zeros(channels, np.float64)
    for row in range(height):
        for column in range(width):
            found = 0
            for sample in range(across * across):
                i, j = row * across + sample // across, column * across + sample % across
                v, u = v_pixel[i], u_pixel[j]
                inverse = near[v, u] + u_rest[j] * tilt_x[v, u] + v_rest[i] * tilt_y[v, u]
                if near[v, u] == 0.0 or inverse <= 0.0:
                    continue
                z = 1.0 / inverse
                key = _owned_cell(ray_x[j] * z, ray_y[i] * z, z, turn, origin, lens, row, column)
                if key < 0:
                    continue
                place = 0
                while place < found and keys[place] != key:
                    place += 1
                if place == found:
                    keys[place], hits[place] = key, 0.0
                    found += 1
                hits[place] += 1.0
            covered[row, column] = found > 0
            if found == 0:
                continue
            sums[:] = 0.0
            for place in range(found):
                _add_cell(keys[place], hits[place], seed, age, sums)
            sums /= math.sqrt(np.sum(hits[:found] ** 2))
            noise[:, row, column] = sums
