"""Tracing single rays against one toy: hits, normals and the openness around a point.

Each ray first intersects the primitives' oriented bounding boxes (exactly the surface, for
ellipsoids) and then only ever evaluates a primitive while inside its interval.
"""

import math

import numpy as np
from numpy.typing import NDArray

from sds3d.toybox.sdf import ELLIPSOID, kernel, primitive_distance

FAR = 1e9
HIT_DISTANCE = 0.002  # metres
MIN_STEP = 0.008  # metres; keeps grazing rays moving, far below the thinnest part
MAX_STEPS = 64
# A minimal step may overshoot the far wall of a cut; it must still be recognised as the wall.
CUT_MARGIN = 2.0 * MIN_STEP
NORMAL_STEP = 1e-3  # metres, finite difference for normals
OCCLUSION_REACH = 0.16  # metres, how far above the surface other parts still darken it

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


# Numba passes a few plain arrays far faster than tuples of many, so the p primitives of a toy, as
# one camera sees them, travel as four tables:
#
#   code   (p, 2) int32    primitive shape, 1 if it is a cut
#   solid  (p, 8) float32  five parameters, three half extents
#   pose   (p, 3, 3)       rotation, world to local
#   eye    (p, 8) float32  eye minus centre (world), bounding radius, eye (local),
#                          squared distance from eye to centre minus squared bounding radius
#
# together with the working memory of one ray, about the primitives it may touch, in order:
#
#   active (p,) int32      their indices
#   beam   (p, 5) float32  ray direction in their local frames, entry distance, exit distance


@kernel
def eye_table(center: Floats, rotation: Floats, extent: Floats, eye: Floats) -> Floats:
    """The table ``eye`` (p, 8), which all rays from the camera position ``eye`` (3,) share."""
    table = np.zeros((center.shape[0], 8), np.float32)
    for i in range(center.shape[0]):
        distance = 0.0
        bound = 0.0
        for axis in range(3):
            table[i, axis] = eye[axis] - center[i, axis]
            distance += table[i, axis] * table[i, axis]
            bound += extent[i, axis] * extent[i, axis]
        for axis in range(3):
            m = rotation[i, axis]
            table[i, 4 + axis] = m[0] * table[i, 0] + m[1] * table[i, 1] + m[2] * table[i, 2]
        table[i, 3] = math.sqrt(bound)
        table[i, 7] = distance - bound
    return table


@kernel
def _local_distance(shape: int, q: Floats, x: float, y: float, z: float) -> float:
    return primitive_distance(shape, q[0], q[1], q[2], q[3], q[4], x, y, z)


@kernel
def openness(code: Ints, solid: Floats, pose: Floats, eye: Floats, dx: float, dy: float, dz: float) -> float:
    """Distance from a point to the toy, in [0, 1] as a fraction of OCCLUSION_REACH.

    The point is given by its world offset (dx, dy, dz) from the camera.
    """
    best = OCCLUSION_REACH
    for i in range(code.shape[0]):
        x = eye[i, 0] + dx
        y = eye[i, 1] + dy
        z = eye[i, 2] + dz
        limit = eye[i, 3] + max(best, 0.0)
        if x * x + y * y + z * z > limit * limit:
            continue
        m = pose[i]
        value = _local_distance(
            code[i, 0],
            solid[i],
            m[0, 0] * x + m[0, 1] * y + m[0, 2] * z,
            m[1, 0] * x + m[1, 1] * y + m[1, 2] * z,
            m[2, 0] * x + m[2, 1] * y + m[2, 2] * z,
        )
        best = min(best, value) if code[i, 1] == 0 else max(best, -value)
    return min(max(best, 0.0) / OCCLUSION_REACH, 1.0)


@kernel
def _interval(
    shape: int,
    q: Floats,
    ox: float,
    oy: float,
    oz: float,
    dx: float,
    dy: float,
    dz: float,
) -> tuple[float, float]:
    """Entry and exit along a local ray: exact for ellipsoids, bounding box otherwise."""
    if shape == ELLIPSOID:
        ox, oy, oz = ox / q[0], oy / q[1], oz / q[2]
        dx, dy, dz = dx / q[0], dy / q[1], dz / q[2]
        a = dx * dx + dy * dy + dz * dz
        b = ox * dx + oy * dy + oz * dz
        root = b * b - a * (ox * ox + oy * oy + oz * oz - 1.0)
        if root <= 0.0:
            return FAR, -FAR
        root = math.sqrt(root)
        return (-b - root) / a, (-b + root) / a
    near = -FAR
    far = FAR
    for axis in range(3):
        o = ox if axis == 0 else (oy if axis == 1 else oz)
        d = dx if axis == 0 else (dy if axis == 1 else dz)
        if abs(d) < 1e-9:
            d = 1e-9
        inverse = 1.0 / d
        middle = -o * inverse
        half = abs(q[5 + axis] * inverse)
        near = max(near, middle - half)
        far = min(far, middle + half)
    return near, far


@kernel
def _gather(
    code: Ints,
    solid: Floats,
    pose: Floats,
    eye: Floats,
    active: Ints,
    beam: Floats,
    dx: float,
    dy: float,
    dz: float,
) -> tuple[int, float]:
    """Fill ``active`` and ``beam`` for one ray: (number of primitives, first solid entry)."""
    used = 0
    start = FAR
    for i in range(code.shape[0]):
        b = eye[i, 0] * dx + eye[i, 1] * dy + eye[i, 2] * dz
        if b * b <= eye[i, 7]:
            continue
        m = pose[i]
        lx = m[0, 0] * dx + m[0, 1] * dy + m[0, 2] * dz
        ly = m[1, 0] * dx + m[1, 1] * dy + m[1, 2] * dz
        lz = m[2, 0] * dx + m[2, 1] * dy + m[2, 2] * dz
        near, far = _interval(code[i, 0], solid[i], eye[i, 4], eye[i, 5], eye[i, 6], lx, ly, lz)
        if near >= far:
            continue
        active[used] = i
        beam[used, 0] = lx
        beam[used, 1] = ly
        beam[used, 2] = lz
        beam[used, 3] = near
        beam[used, 4] = far
        used += 1
        if code[i, 1] == 0:
            start = min(start, near)
        else:
            beam[used - 1, 4] += CUT_MARGIN
    return used, start


@kernel
def _look(
    code: Ints, solid: Floats, eye: Floats, active: Ints, beam: Floats, used: int, t: float
) -> tuple[float, int, float]:
    """Distance to the toy at ``t`` along the ray, its row of ``beam``, and the next entry ahead."""
    best = FAR
    ahead = FAR
    hit = -1
    for k in range(used):
        if t > beam[k, 4]:
            continue
        if t < beam[k, 3]:
            # Not reached yet: it cannot be hit here, it only limits the step.
            ahead = min(ahead, beam[k, 3] - t)
            continue
        i = active[k]
        if code[i, 0] == ELLIPSOID and code[i, 1] != 0:
            # The distance estimate is poor inside; the way out along the ray is exact.
            value = t + CUT_MARGIN - beam[k, 4]
        else:
            value = _local_distance(
                code[i, 0],
                solid[i],
                eye[i, 4] + t * beam[k, 0],
                eye[i, 5] + t * beam[k, 1],
                eye[i, 6] + t * beam[k, 2],
            )
        if code[i, 1] == 0:
            if value < best:
                best = value
                hit = k
        elif -value > best and best < FAR:
            best = -value
            hit = k
    return best, hit, ahead


@kernel
def trace(
    code: Ints,
    solid: Floats,
    pose: Floats,
    eye: Floats,
    active: Ints,
    beam: Floats,
    dx: float,
    dy: float,
    dz: float,
) -> tuple[float, int]:
    """First hit along a unit world direction: distance and row of ``beam``, or (FAR, -1)."""
    used, t = _gather(code, solid, pose, eye, active, beam, dx, dy, dz)
    if t >= FAR:
        return FAR, -1
    for _ in range(MAX_STEPS):
        best, hit, ahead = _look(code, solid, eye, active, beam, used, t)
        if best < HIT_DISTANCE:
            return t + max(best, -MIN_STEP), hit
        if best >= FAR and ahead >= FAR:
            break
        t += min(max(best, MIN_STEP), ahead + 1e-5)
    return FAR, -1


@kernel
def normal_at(
    shape: int,
    q: Floats,
    m: Floats,
    sign: float,
    x: float,
    y: float,
    z: float,
    dx: float,
    dy: float,
    dz: float,
) -> tuple[float, float, float]:
    """World unit normal of a primitive at a local point, made to face against the ray.

    ``q`` is the primitive's row of ``solid``, ``m`` that of ``pose``; ``sign`` is -1 for cuts.
    """
    e = NORMAL_STEP
    a = _local_distance(shape, q, x + e, y - e, z - e)
    b = _local_distance(shape, q, x - e, y - e, z + e)
    c = _local_distance(shape, q, x - e, y + e, z - e)
    d = _local_distance(shape, q, x + e, y + e, z + e)
    gx = sign * (a - b - c + d)
    gy = sign * (-a - b + c + d)
    gz = sign * (-a + b - c + d)
    nx = m[0, 0] * gx + m[1, 0] * gy + m[2, 0] * gz
    ny = m[0, 1] * gx + m[1, 1] * gy + m[2, 1] * gz
    nz = m[0, 2] * gx + m[1, 2] * gy + m[2, 2] * gz
    scale = 1.0 / (math.sqrt(nx * nx + ny * ny + nz * nz) + 1e-12)
    nx, ny, nz = nx * scale, ny * scale, nz * scale
    away = nx * dx + ny * dy + nz * dz
    if away > -1e-3:
        # Grazing hits can land a hair behind the silhouette; tilt those back to edge-on.
        away += 1e-3
        nx, ny, nz = nx - away * dx, ny - away * dy, nz - away * dz
        scale = 1.0 / (math.sqrt(nx * nx + ny * ny + nz * nz) + 1e-12)
        nx, ny, nz = nx * scale, ny * scale, nz * scale
    return nx, ny, nz
