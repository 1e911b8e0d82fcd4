"""CPU kernels of the dense voxel ray-marcher (see `voxel.py` for the model), float32 only.

Layout: a grid is a flat array of (z, y, x, channel), channels = (density logit, r, g, b); `row` and `slab` are the
offsets to the next y and z. Positions are in cells: the first voxel lies at 0, the last at n - 1.

`view` holds one camera in cells: [0:3] eye, [3:6] forward, [6:9] right, [9:12] down (x y z, in cells per metre),
[12:16] 1/focal x, 1/focal y, centre x, centre y in pixels, [16:19] cells per metre along x y z.

A `tape` row records one sample of the forward pass for the backward pass: distance t, transmittance behind it,
d(optical depth)/d(logit), r, g, b.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

TAPE_COLUMNS = 6
_f = np.float32
_ZERO, _ONE, _HALF = _f(0.0), _f(1.0), _f(0.5)
_TINY = _f(1e-9)

# Without "nnan" and "ninf": a NaN in the grid must come out as a NaN in the image.
_FLAGS = {"contract", "reassoc", "nsz", "arcp", "afn"}
_kernel = njit(cache=True, nogil=True, error_model="numpy", fastmath=_FLAGS)
_inline = njit(cache=True, nogil=True, error_model="numpy", fastmath=_FLAGS, forceinline=True)

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_FOUR = ir.VectorType(_FLOAT, 4)
_CONTRACT = ("contract",)


def _splat(builder: Any, value: Any) -> Any:
    """The vector (value, value, value, value)."""
    blank = ir.Constant(_FOUR, ir.Undefined)
    first = builder.insert_element(blank, value, _INT(0))
    return builder.shuffle_vector(first, blank, ir.Constant(ir.VectorType(_INT, 4), [0, 0, 0, 0]))


def _voxel(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    """Pointer to the four channels at grid[offset]."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), _FOUR.as_pointer())


# Numba does not combine scalar code into vectors, so the two inner loops over channels are written as LLVM vectors.
@intrinsic
def _blend(typingctx, grid, at, row, slab, fx, fy, fz):  # type: ignore[no-untyped-def]
    """Trilinear blend of the voxels around the cell that starts at grid[at]: (logit, r, g, b)."""
    f, i = types.float32, types.int64
    signature = types.UniTuple(f, 4)(grid, i, i, i, f, f, f)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, at, row, slab, *place = args
        wx, wy, wz = (_splat(builder, w) for w in place)

        def mix(a: Any, b: Any, w: Any) -> Any:
            change = builder.fmul(w, builder.fsub(b, a, flags=_CONTRACT), flags=_CONTRACT)
            return builder.fadd(a, change, flags=_CONTRACT)

        def load(offset: Any) -> Any:
            return builder.load(_voxel(context, builder, signature.args[0], array, offset), align=4)

        def edge(offset: Any) -> Any:
            return mix(load(offset), load(builder.add(offset, offset.type(4))), wx)

        def face(offset: Any) -> Any:
            return mix(edge(offset), edge(builder.add(offset, row)), wy)

        blend = mix(face(at), face(builder.add(at, slab)), wz)
        values = [builder.extract_element(blend, _INT(k)) for k in range(4)]
        return context.make_tuple(builder, signature.return_type, values)

    return signature, codegen


@intrinsic
def _scatter(typingctx, grid, at, row, slab, fx, fy, fz, d_logit, d_r, d_g, d_b):  # type: ignore[no-untyped-def]
    """The adjoint of `_blend`: adds the four numbers, trilinearly weighted, to the voxels around a cell."""
    f, i = types.float32, types.int64
    signature = types.void(grid, i, i, i, f, f, f, f, f, f, f)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, at, row, slab, *numbers = args
        wx, wy, wz = (_splat(builder, w) for w in numbers[:3])
        value = ir.Constant(_FOUR, ir.Undefined)
        for k, number in enumerate(numbers[3:]):
            value = builder.insert_element(value, number, _INT(k))

        def split(value: Any, w: Any) -> Any:
            far = builder.fmul(value, w, flags=_CONTRACT)
            return builder.fsub(value, far, flags=_CONTRACT), far

        def add(offset: Any, value: Any) -> None:
            pointer = _voxel(context, builder, signature.args[0], array, offset)
            builder.store(builder.fadd(builder.load(pointer, align=4), value), pointer, align=4)

        for z, slab_value in zip((at, builder.add(at, slab)), split(value, wz), strict=True):
            for y, row_value in zip((z, builder.add(z, row)), split(slab_value, wy), strict=True):
                near, far = split(row_value, wx)
                add(y, near)
                add(builder.add(y, y.type(4)), far)
        return context.get_dummy_value()

    return signature, codegen


@_inline
def _ray(view, v, u):  # type: ignore[no-untyped-def]
    """Direction of a pixel's ray in cells per metre, and camera-z per metre."""
    a = (_f(u) + _HALF - view[14]) * view[12]
    b = (_f(v) + _HALF - view[15]) * view[13]
    cosine = _ONE / math.sqrt(_ONE + a * a + b * b)
    dx = (view[3] + a * view[6] + b * view[9]) * cosine
    dy = (view[4] + a * view[7] + b * view[10]) * cosine
    dz = (view[5] + a * view[8] + b * view[11]) * cosine
    return dx, dy, dz, cosine


@_inline
def _cell(x, n):  # type: ignore[no-untyped-def]
    """Cell index of a position, inside the grid whatever the position (NaN included)."""
    return min(max(np.int64(x), np.int64(0)), np.int64(n - 2))


@_inline
def _inverse(d):  # type: ignore[no-untyped-def]
    return _ONE / d if abs(d) > _TINY else _ONE / _TINY


@_inline
def _first_step(t, jitter, per_metre):  # type: ignore[no-untyped-def]
    """The smallest whole k with (k + jitter) / per_metre >= t, and at least 0."""
    x = max(t * per_metre - jitter, _ZERO)
    k = _f(np.int32(x))
    return k + _ONE if k < x else k


@_inline
def _exit(o, inverse, brick, leap, shift):  # type: ignore[no-untyped-def]
    """Distance at which a ray leaves the slab of bricks within leap - 1 of `brick`, along one axis."""
    edge = (brick + leap) << shift if inverse > _ZERO else (brick - leap + 1) << shift
    return (_f(edge) - o) * inverse


@_inline
def _beyond(transmittance, opaque):  # type: ignore[no-untyped-def]
    """max(0, transmittance - opaque), NaN kept."""
    return _ZERO if transmittance < opaque else transmittance - opaque


@_inline
def _slope(grid, at, row, slab, fx, fy, fz):  # type: ignore[no-untyped-def]
    """Gradient of the blended logit along x, y, z, per cell."""
    ex, ey, ez = _ONE - fx, _ONE - fy, _ONE - fz
    a, b = grid[at], grid[at + 4]
    c, d = grid[at + row], grid[at + row + 4]
    e, f = grid[at + slab], grid[at + slab + 4]
    g, h = grid[at + slab + row], grid[at + slab + row + 4]
    sx = ez * (ey * (b - a) + fy * (d - c)) + fz * (ey * (f - e) + fy * (h - g))
    sy = ez * (ex * (c - a) + fx * (d - b)) + fz * (ex * (g - e) + fx * (h - f))
    sz = ey * (ex * (e - a) + fx * (f - b)) + fy * (ex * (g - c) + fx * (h - d))
    return sx, sy, sz


@_inline
def _scatter_slope(grid, at, row, slab, fx, fy, fz, qx, qy, qz):  # type: ignore[no-untyped-def]
    """The adjoint of `_slope`: adds the gradient of qx sx + qy sy + qz sz to the eight logits."""
    for corner in range(8):
        wx = fx if corner & 1 else _ONE - fx
        wy = fy if corner & 2 else _ONE - fy
        wz = fz if corner & 4 else _ONE - fz
        sx = _ONE if corner & 1 else -_ONE
        sy = _ONE if corner & 2 else -_ONE
        sz = _ONE if corner & 4 else -_ONE
        to = at + (4 if corner & 1 else 0) + (row if corner & 2 else 0) + (slab if corner & 4 else 0)
        grid[to] += qx * sx * wy * wz + qy * sy * wx * wz + qz * sz * wx * wy


@_inline
def _normal(view, sx, sy, sz):  # type: ignore[no-untyped-def]
    """Unit vector against the slope, world frame, and 1 / |slope| per metre."""
    gx, gy, gz = sx * view[16], sy * view[17], sz * view[18]
    inverse = _ONE / math.sqrt(gx * gx + gy * gy + gz * gz + _f(1e-12))
    return -gx * inverse, -gy * inverse, -gz * inverse, inverse


@_inline
def _has_matter(grid, ny, nx, z0, z1, y0, y1, x0, x1, empty):  # type: ignore[no-untyped-def]
    """Whether a logit in a block of voxels is above `empty`, or a NaN."""
    for z in range(z0, z1):
        for y in range(y0, y1):
            base = (z * ny + y) * nx * 4
            for x in range(x0, x1):
                if not grid[base + 4 * x] <= empty:
                    return True
    return False


@_kernel
def mark_bricks(grid, nz, ny, nx, shift, empty, leap):  # type: ignore[no-untyped-def]
    """Sets leap (z, y, x) to 0 for bricks of 2^shift cells that touch matter, else to 255."""
    bz, by, bx = leap.shape
    side = (1 << shift) + 1  # cells + 1 voxels: bricks share the voxels on their borders
    for k in range(bz):
        z0 = k << shift
        for j in range(by):
            y0 = j << shift
            for i in range(bx):
                x0 = i << shift
                z1, y1, x1 = min(z0 + side, nz), min(y0 + side, ny), min(x0 + side, nx)
                full = _has_matter(grid, ny, nx, z0, z1, y0, y1, x0, x1, empty)
                leap[k, j, i] = 0 if full else 255


@_kernel
def chessboard(leap):  # type: ignore[no-untyped-def]
    """Replaces each 255 by the chessboard distance to the nearest 0: one running minimum to and fro per pass."""
    bz, by, bx = leap.shape
    for sweep in range(2):
        back = sweep == 1
        for k0 in range(bz):
            k = bz - 1 - k0 if back else k0
            for j0 in range(by):
                j = by - 1 - j0 if back else j0
                for i0 in range(bx):
                    i = bx - 1 - i0 if back else i0
                    if leap[k, j, i] == 0:
                        continue
                    best = np.int64(leap[k, j, i])
                    for dk in range(-1, 2):
                        for dj in range(-1, 2):
                            for di in range(-1, 2):
                                a, b, c = k + dk, j + dj, i + di
                                if 0 <= a < bz and 0 <= b < by and 0 <= c < bx:
                                    best = min(best, np.int64(leap[a, b, c]) + 1)
                    leap[k, j, i] = best


@_kernel
def march_forward(  # type: ignore[no-untyped-def]
    grid, nz, ny, nx, leap, shift, box, view, step, table, per_logit, empty, opaque,
    jitter, background, row0, row1, rgb, alpha, depth, normal, tape, counts,
):  # fmt: skip
    """Renders rows row0..row1 of one view; `box` bounds the matter (cells); see `voxel.py` for the other names."""
    _, bricks_y, bricks_x = leap.shape
    leaps = leap.reshape(-1)
    row, slab = np.int64(nx * 4), np.int64(nx * ny * 4)
    ox, oy, oz = view[0], view[1], view[2]
    last = np.int64(table.shape[0] - 1)
    per_metre, scale = _ONE / step, _ONE / (_ONE - opaque)
    recording, with_normals = tape.shape[0] > 0, normal.shape[1] > 0
    used = np.int64(0)
    for v in range(row0, row1):
        for u in range(jitter.shape[1]):
            dx, dy, dz, cosine = _ray(view, v, u)
            ix, iy, iz = _inverse(dx), _inverse(dy), _inverse(dz)
            x0, x1 = (box[0] - ox) * ix, (box[3] - ox) * ix
            y0, y1 = (box[1] - oy) * iy, (box[4] - oy) * iy
            z0, z1 = (box[2] - oz) * iz, (box[5] - oz) * iz
            near = max(max(min(x0, x1), min(y0, y1)), min(z0, z1))
            far = min(min(max(x0, x1), max(y0, y1)), max(z0, z1))
            left = _ONE  # transmittance so far
            r, g, b, z_sum = _ZERO, _ZERO, _ZERO, _ZERO
            nx_sum, ny_sum, nz_sum = _ZERO, _ZERO, _ZERO
            start = used
            k = _first_step(near, jitter[v, u], per_metre)
            t = (k + jitter[v, u]) * step
            while t <= far:
                x, y, z = ox + t * dx, oy + t * dy, oz + t * dz
                i, j, m = _cell(x, nx), _cell(y, ny), _cell(z, nz)
                bi, bj, bm = i >> shift, j >> shift, m >> shift
                skip = np.int64(leaps[(bm * bricks_y + bj) * bricks_x + bi])
                if skip > 0:
                    leave = _exit(ox, ix, bi, skip, shift)
                    leave = min(leave, _exit(oy, iy, bj, skip, shift))
                    leave = min(leave, _exit(oz, iz, bm, skip, shift))
                    k = max(k + _ONE, _first_step(leave, jitter[v, u], per_metre))
                    t = (k + jitter[v, u]) * step
                    continue
                at = (m * ny + j) * row + i * 4
                fx, fy, fz = x - _f(i), y - _f(j), z - _f(m)
                logit, cr, cg, cb = _blend(grid, at, row, slab, fx, fy, fz)  # type: ignore[call-arg, var-annotated]
                if not logit <= empty:
                    entry = (logit - empty) * per_logit
                    q = min(max(np.int64(entry), np.int64(0)), last)
                    part = min(entry - _f(q), _ONE) if entry >= _ZERO else entry
                    behind = left * (table[q, 0] + part * table[q, 1])
                    w = left - max(behind, opaque)
                    r += w * cr
                    g += w * cg
                    b += w * cb
                    z_sum += w * t
                    if with_normals:
                        sx, sy, sz = _slope(grid, at, row, slab, fx, fy, fz)
                        hx, hy, hz, _ = _normal(view, sx, sy, sz)
                        nx_sum += w * hx
                        ny_sum += w * hy
                        nz_sum += w * hz
                    if recording:
                        tape[used, 0] = t
                        tape[used, 1] = behind
                        tape[used, 2] = table[q, 2] + part * table[q, 3]
                        tape[used, 3] = cr
                        tape[used, 4] = cg
                        tape[used, 5] = cb
                        used += 1
                    left = behind
                    if left < opaque:
                        break
                k += _ONE
                t = (k + jitter[v, u]) * step
            clear = _beyond(left, opaque) * scale
            rgb[0, v, u] = r * scale + clear * background[0]
            rgb[1, v, u] = g * scale + clear * background[1]
            rgb[2, v, u] = b * scale + clear * background[2]
            alpha[0, v, u] = _ONE - clear
            depth[0, v, u] = z_sum * scale * cosine
            if with_normals:
                normal[0, v, u] = nx_sum * scale
                normal[1, v, u] = ny_sum * scale
                normal[2, v, u] = nz_sum * scale
            counts[v, u] = used - start


@_kernel
def march_backward(  # type: ignore[no-untyped-def]
    grid, nz, ny, nx, view, opaque, background, row0, row1, counts, tape,
    d_rgb, d_alpha, d_depth, d_normal, d_grid,
):  # fmt: skip
    """Adds the gradient of rows row0..row1 of one view to `d_grid`, walking each ray from back to front.

    With T_i the transmittance behind sample i and L_i the gradient of a unit weight at sample i, the sum
    S_i = sum_{j > i} T_{j-1} (L_j - L_{j-1}) over what lies behind gives d(loss)/d(logit_i) = -slope_i S_i.
    """
    row, slab = np.int64(nx * 4), np.int64(nx * ny * 4)
    ox, oy, oz = view[0], view[1], view[2]
    scale = _ONE / (_ONE - opaque)
    with_normals = d_normal.shape[1] > 0
    end = np.int64(0)
    for v in range(row0, row1):
        for u in range(counts.shape[1]):
            start = end
            end += counts[v, u]
            if start == end:
                continue
            dx, dy, dz, cosine = _ray(view, v, u)
            g0, g1, g2 = d_rgb[0, v, u], d_rgb[1, v, u], d_rgb[2, v, u]
            ga, gt = d_alpha[0, v, u], d_depth[0, v, u] * cosine
            behind_value = g0 * background[0] + g1 * background[1] + g2 * background[2]
            s = _ZERO
            for q in range(end - 1, start - 1, -1):
                t, behind = tape[q, 0], tape[q, 1]
                x, y, z = ox + t * dx, oy + t * dy, oz + t * dz
                i, j, m = _cell(x, nx), _cell(y, ny), _cell(z, nz)
                at = (m * ny + j) * row + i * 4
                fx, fy, fz = x - _f(i), y - _f(j), z - _f(m)
                before = tape[q - 1, 1] if q > start else _ONE
                w = (before - max(behind, opaque)) * scale
                value = g0 * tape[q, 3] + g1 * tape[q, 4] + g2 * tape[q, 5] + ga + gt * t
                if with_normals:
                    n0, n1, n2 = d_normal[0, v, u], d_normal[1, v, u], d_normal[2, v, u]
                    sx, sy, sz = _slope(grid, at, row, slab, fx, fy, fz)
                    hx, hy, hz, inverse = _normal(view, sx, sy, sz)
                    along = n0 * hx + n1 * hy + n2 * hz
                    value += along
                    # d(n)/d(slope) = -(I - n n^T) / |slope|
                    f = -w * inverse
                    qx = f * (n0 - along * hx) * view[16]
                    qy = f * (n1 - along * hy) * view[17]
                    qz = f * (n2 - along * hz) * view[18]
                    _scatter_slope(d_grid, at, row, slab, fx, fy, fz, qx, qy, qz)
                if not behind < opaque:
                    s += behind * (behind_value - value)
                d_logit = -tape[q, 2] * s * scale
                _scatter(d_grid, at, row, slab, fx, fy, fz, d_logit, w * g0, w * g1, w * g2)  # type: ignore[call-arg]
                behind_value = value
