"""Compositing of projected Gaussians on the CPU, forward and backward, in blocks of 4 x 4 pixels.

All state of a block lies in one row of one array, so LLVM can prove that nothing overlaps and turns the 16-pixel
loops into straight vector code without a remainder. Per Gaussian and row of blocks the ellipse a(x) >= 1/255 is
solved for its x-interval: hardly any block is visited in vain, and a block whose pixels are all closed is skipped.
The forward pass writes down which blocks each Gaussian touched; the backward pass walks that list from back to front
and searches nothing.

Kernels are generic in the float type: float32 in use, float64 in tests. Numba makes float64 of float32 times a plain
literal, hence the casts through `real`. Letters as in `splat_reference`.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from numpy.typing import NDArray

from sds3d.ops.splat_reference import ALPHA_MAX, TRANSMITTANCE_MIN

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int32]

SIDE = 4  # pixels along a block
LANES = SIDE * SIDE
BAND_PX = 32  # rows of pixels per task
BAND_ROWS = BAND_PX // SIDE
SLACK_PX = 0.01  # covers the rounding of the solved interval; the test of each pixel decides

# Parts of a block's state, each LANES wide; the forward pass has no BEHIND.
T, RED, GREEN, BLUE, DEPTH, LAST, BEHIND = (LANES * part for part in range(7))
FORWARD_WIDTH, BACKWARD_WIDTH = 6 * LANES, 7 * LANES

# A projected Gaussian (15 numbers in a cache line of 16): centre in pixel indices, s = a dx^2 + b dx dy + c dy^2,
# opacity, the s at which alpha falls to 1/255, colour, depth, half sides of the box of that ellipse, dy of its
# rightmost point, first and last row of blocks (first > last where it misses the image).
X, Y, S_XX, S_XY, S_YY, OPACITY, REACH, R, G, B, Z, HALF_X, HALF_Y, TILT, ROW_FIRST, ROW_LAST = range(16)
SPLAT_WIDTH = 16

# Gradient of one Gaussian in one band: moments of h = a dL/da about the centre, then of colour and depth.
H0, HX, HY, HXX, HXY, HYY, W_R, W_G, W_B, W_Z = range(10)
MOMENTS = 10

# `nnan` and `ninf` are left out: nothing may turn an overflow into a plausible number.
_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract", "nsz", "arcp", "reassoc"},
}
kernel = njit(cache=True, **_OPTIONS)
inlined = njit(inline="always", **_OPTIONS)


def _exp_coefficients() -> list[np.float32]:
    """exp(-0.7 - v) for v in [-0.7, 0.7]: interpolated at the Chebyshev points of degree 7, error 2e-8."""
    nodes = np.cos((np.arange(8) + 0.5) * np.pi / 8)
    power = np.polynomial.Polynomial.fit(nodes, np.exp(-0.7 * (nodes + 1.0)), 7, domain=[-1, 1]).coef
    return [np.float32(c / 0.7**i) for i, c in enumerate(power)]


_E0, _E1, _E2, _E3, _E4, _E5, _E6, _E7 = _exp_coefficients()
_QUARTER, _SEVEN_TENTHS = np.float32(0.25), np.float32(0.7)


def _exp_minus(s: Any) -> Any:
    """exp(-s) for s in [0, 5.6], relative error 8e-7 at float32: no call, so loops around it become vector code."""
    return math.exp(-s)


@overload(_exp_minus)
def _compile_exp_minus(s: Any) -> Callable[[Any], Any]:
    def library(s: Any) -> Any:
        return math.exp(-s)

    def polynomial(s: Any) -> Any:
        v = s * _QUARTER - _SEVEN_TENTHS
        p = ((_E7 * v + _E6) * v + _E5) * v + _E4
        p = (((p * v + _E3) * v + _E2) * v + _E1) * v + _E0
        p = p * p
        return p * p

    return polynomial if s == types.float32 else library


@intrinsic
def _stack_pointer(typing_context: Any, like: types.Type) -> Any:
    """Pointer to uninitialised stack memory: LLVM keeps it in vector registers, which it cannot do with the heap."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        size = context.get_constant(types.intp, MOMENTS * LANES)
        return cgutils.alloca_once(builder, context.get_value_type(like), size=size)

    return types.CPointer(like)(like), generate


# ------------------------------------------------------------------------------------------------- geometry


@inlined
def block_span(splat: Floats, row: int, columns: int) -> tuple[int, int]:
    """First and last column of blocks that the Gaussian may touch in one row of blocks (first > last: none)."""
    real = splat.dtype.type
    a, b, c = splat[S_XX], splat[S_XY], splat[S_YY]
    low = max(real(row * SIDE) - splat[Y], -splat[HALF_Y])
    high = min(real(row * SIDE + SIDE - 1) - splat[Y], splat[HALF_Y])
    # The ellipse reaches furthest right at dy = TILT, furthest left at -TILT, or at the nearest dy in the row.
    dy_right = min(max(splat[TILT], low), high)
    dy_left = min(max(-splat[TILT], low), high)
    a4 = real(4.0) * a
    det = a4 * c - b * b
    root_right = math.sqrt(max(a4 * splat[REACH] - det * dy_right * dy_right, real(0.0)))
    root_left = math.sqrt(max(a4 * splat[REACH] - det * dy_left * dy_left, real(0.0)))
    inverse = real(0.5) / a
    right = splat[X] + (root_right - b * dy_right) * inverse + real(SLACK_PX)
    left = splat[X] - (root_left + b * dy_left) * inverse - real(SLACK_PX)
    # Clipped while still a float: a very large one has no integer.
    first = math.ceil(max(left, real(0.0))) // SIDE
    last = math.floor(min(right, real(columns * SIDE - 1)) + real(SIDE)) // SIDE - 1
    return first, last


# -------------------------------------------------------------------------------------------------- forward


@inlined
def _composite_block(state: Floats, entry: float, splat: Floats, x0: int, y0: int) -> int:
    """Put one Gaussian behind what the block shows so far; returns how many pixels stay open."""
    real = state.dtype.type
    left, top = real(x0) - splat[X], real(y0) - splat[Y]
    a, b, c, opacity, reach = splat[S_XX], splat[S_XY], splat[S_YY], splat[OPACITY], splat[REACH]
    red, green, blue, z = splat[R], splat[G], splat[B], splat[Z]
    still_open = 0
    for lane in range(LANES):
        dx, dy = left + real(lane & 3), top + real(lane >> 2)
        s = (a * dx + b * dy) * dx + c * dy * dy
        alpha = min(real(ALPHA_MAX), opacity * _exp_minus(s))
        t = state[T + lane]
        t_next = t * (real(1.0) - alpha)
        hit = s <= reach
        lives = hit & (t_next > real(TRANSMITTANCE_MIN))
        weight = alpha * t if lives else real(0.0)
        state[RED + lane] += weight * red
        state[GREEN + lane] += weight * green
        state[BLUE + lane] += weight * blue
        state[DEPTH + lane] += weight * z
        state[LAST + lane] = entry if lives else state[LAST + lane]
        # A closed pixel keeps its transmittance as a negative number.
        t = t_next if lives else (-abs(t) if hit else t)
        state[T + lane] = t
        still_open += 1 if t > real(0.0) else 0
    return still_open


@kernel
def composite_band(
    splats: Floats,
    ranks: Ints,
    row_first: int,
    columns: int,
    state: Floats,
    open_px: Ints,
    items: Ints,
    ends: Ints,
) -> None:
    """Composite the Gaussians `ranks` (front to back) over the blocks of one band.

    `state` (blocks, FORWARD_WIDTH) and `open_px` (blocks,) come initialised. Entry e touched the blocks
    items[ends[e - 1]:ends[e]], each packed as row << 16 | column.
    """
    rows = open_px.shape[0] // columns
    open_blocks = open_px.shape[0]
    used = 0
    for entry in range(ranks.shape[0]):
        if open_blocks > 0:
            splat = splats[ranks[entry]]
            top = max(int(splat[ROW_FIRST]) - row_first, 0)
            bottom = min(int(splat[ROW_LAST]) - row_first, rows - 1)
            for row in range(top, bottom + 1):
                first, last = block_span(splat, row + row_first, columns)
                for column in range(first, last + 1):
                    block = row * columns + column
                    if open_px[block] == 0:
                        continue
                    open_px[block] = _composite_block(
                        state[block], state.dtype.type(entry), splat, column * SIDE, (row + row_first) * SIDE
                    )
                    items[used] = (row << 16) | column
                    used += 1
                    if open_px[block] == 0:
                        open_blocks -= 1
        ends[entry] = used


@kernel
def open_band(row_first: int, columns: int, width: int, height: int, state: Floats, open_px: Ints) -> None:
    """Initialise a zeroed band: transmittance 1 inside the image, closed outside."""
    real = state.dtype.type
    for block in range(open_px.shape[0]):
        x0, y0 = (block % columns) * SIDE, (block // columns + row_first) * SIDE
        for lane in range(LANES):
            inside = (x0 + (lane & 3) < width) & (y0 + (lane >> 2) < height)
            state[block, T + lane] = real(1.0) if inside else real(-1.0)
            state[block, LAST + lane] = real(-1.0)
            open_px[block] += 1 if inside else 0


@kernel
def write_band(
    row_first: int, columns: int, state: Floats, background: Floats, rgb: Floats, alpha: Floats, depth: Floats
) -> None:
    """Unpack a composited band into the images (3 H W), (H W), (H W) of its view."""
    height, width = alpha.shape
    one = state.dtype.type(1.0)
    for y in range(row_first * SIDE, min((row_first + state.shape[0] // columns) * SIDE, height)):
        for x in range(width):
            pixels = state[(y // SIDE - row_first) * columns + x // SIDE]
            lane = (y % SIDE) * SIDE + x % SIDE
            t_end = abs(pixels[T + lane])
            rgb[0, y, x] = pixels[RED + lane] + t_end * background[0]
            rgb[1, y, x] = pixels[GREEN + lane] + t_end * background[1]
            rgb[2, y, x] = pixels[BLUE + lane] + t_end * background[2]
            alpha[y, x] = one - t_end
            depth[y, x] = pixels[DEPTH + lane]


# ------------------------------------------------------------------------------------------------- backward


@inlined
def _differentiate_block(state: Floats, sums: Floats, entry: float, splat: Floats, x0: int, y0: int) -> None:
    """Take one Gaussian off the back of the block and add its moments to `sums`, lane by lane.

    dL/da_i = T_i <c_i, v> - (1 / (1 - a_i)) (sum_{j behind i} w_j <c_j, v> + dL/dT_end T_end);
    <c, v> = colour and depth times their image gradients.
    """
    real = state.dtype.type
    left, top = real(x0) - splat[X], real(y0) - splat[Y]
    a, b, c, opacity, reach = splat[S_XX], splat[S_XY], splat[S_YY], splat[OPACITY], splat[REACH]
    red, green, blue, z = splat[R], splat[G], splat[B], splat[Z]
    for lane in range(LANES):
        dx, dy = left + real(lane & 3), top + real(lane >> 2)
        s = (a * dx + b * dy) * dx + c * dy * dy
        full = opacity * _exp_minus(s)
        lives = (s <= reach) & (entry <= state[LAST + lane])
        alpha = min(real(ALPHA_MAX), full) if lives else real(0.0)
        inverse = real(1.0) / (real(1.0) - alpha)
        t = state[T + lane] * inverse
        weight = alpha * t
        v_r, v_g, v_b, v_z = state[RED + lane], state[GREEN + lane], state[BLUE + lane], state[DEPTH + lane]
        along = red * v_r + green * v_g + blue * v_b + z * v_z
        behind = state[BEHIND + lane]
        d_alpha = t * along - behind * inverse
        state[T + lane] = t
        state[BEHIND + lane] = behind + weight * along
        # The clamp at ALPHA_MAX passes nothing on.
        h = full * d_alpha if lives & (full <= real(ALPHA_MAX)) else real(0.0)
        h_x, h_y = h * dx, h * dy
        sums[H0 * LANES + lane] += h
        sums[HX * LANES + lane] += h_x
        sums[HY * LANES + lane] += h_y
        sums[HXX * LANES + lane] += h_x * dx
        sums[HXY * LANES + lane] += h_x * dy
        sums[HYY * LANES + lane] += h_y * dy
        sums[W_R * LANES + lane] += weight * v_r
        sums[W_G * LANES + lane] += weight * v_g
        sums[W_B * LANES + lane] += weight * v_b
        sums[W_Z * LANES + lane] += weight * v_z


@kernel
def differentiate_band(
    splats: Floats,
    ranks: Ints,
    slots: Ints,
    row_first: int,
    columns: int,
    state: Floats,
    items: Ints,
    ends: Ints,
    moments: Floats,
) -> None:
    """Backward of `composite_band`: row slots[e] of `moments` (n, MOMENTS) receives the gradient of entry e."""
    real = state.dtype.type
    sums = carray(_stack_pointer(real(0.0)), MOMENTS * LANES)  # type: ignore[call-arg]
    for entry in range(ranks.shape[0] - 1, -1, -1):
        begin, end = ends[entry - 1] if entry > 0 else 0, ends[entry]
        if begin == end:
            continue
        for i in range(MOMENTS * LANES):
            sums[i] = real(0.0)
        splat = splats[ranks[entry]]
        for i in range(begin, end):
            row, column = items[i] >> 16, items[i] & 0xFFFF
            _differentiate_block(
                state[row * columns + column],
                sums,
                real(entry),
                splat,
                column * SIDE,
                (row + row_first) * SIDE,
            )
        for moment in range(MOMENTS):
            total = real(0.0)
            for lane in range(LANES):
                total += sums[moment * LANES + lane]
            moments[slots[entry], moment] = total


@kernel
def load_band(
    row_first: int,
    columns: int,
    forward: Floats,
    background: Floats,
    d_rgb: Floats,
    d_alpha: Floats,
    d_depth: Floats,
    state: Floats,
    d_background: Floats,
) -> None:
    """Fill the zeroed backward state (blocks, BACKWARD_WIDTH) of a band and sum the gradient of its background."""
    height, width = d_alpha.shape
    real = state.dtype.type
    sum_r, sum_g, sum_b = 0.0, 0.0, 0.0
    for block in range(state.shape[0]):
        pixels, gradients = forward[block], state[block]
        x0, y0 = (block % columns) * SIDE, (block // columns + row_first) * SIDE
        for lane in range(LANES):
            x, y = x0 + (lane & 3), y0 + (lane >> 2)
            gradients[LAST + lane] = real(-1.0)
            if x >= width or y >= height:
                continue
            t_end = abs(pixels[T + lane])
            v_r, v_g, v_b = d_rgb[0, y, x], d_rgb[1, y, x], d_rgb[2, y, x]
            gradients[T + lane] = t_end
            gradients[RED + lane], gradients[GREEN + lane], gradients[BLUE + lane] = v_r, v_g, v_b
            gradients[DEPTH + lane] = d_depth[y, x]
            gradients[LAST + lane] = pixels[LAST + lane]
            d_t_end = background[0] * v_r + background[1] * v_g + background[2] * v_b - d_alpha[y, x]
            gradients[BEHIND + lane] = t_end * d_t_end
            sum_r += t_end * v_r
            sum_g += t_end * v_g
            sum_b += t_end * v_b
    d_background[0], d_background[1], d_background[2] = sum_r, sum_g, sum_b
