"""Renderer for toys, compiled with numba.

It does not produce coloured images but *colour-linear layers* (see ``world.Layers``): how much of
each pixel shows the main colour, the second colour and the fixed colours, each times the shade.
One render can then be recoloured by a weighted sum.

Rays are cast only inside the toy's projected bounding boxes: one per pixel, then four more where
the 3x3 neighbourhood shows an edge. Nothing here needs the GIL, so callers may use threads.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sds3d.toybox.sdf import kernel
from sds3d.toybox.trace import FAR, OCCLUSION_REACH, Floats, Ints, eye_table, normal_at, openness, trace

OCCLUSION_WEIGHT = 0.12  # a fully occluded point keeps 1 - this much of its shade
DEPTH_EDGE = 0.15  # metres; a larger jump between neighbours is refined as an edge

# Rotated-grid 2x2 pattern: no two samples share a row or a column of the pixel.
_SUB_X = (-0.125, 0.375, 0.125, -0.375)
_SUB_Y = (-0.375, -0.125, 0.375, 0.125)

Bytes = NDArray[np.uint8]


class Tables(NamedTuple):
    """What the renderer knows of one toy (p primitives), or of n padded toys with a leading n."""

    code: Ints  # (p, 2) primitive shape, 1 if it is a cut
    solid: Floats  # (p, 8) five parameters, three half extents, metres
    pose: Floats  # (p, 3, 3) rotation, world to local
    center: Floats  # (p, 3) metres, world
    paint: Floats  # (p, 5) share of the main colour, of the second, and fixed sRGB


class Outputs(NamedTuple):
    """Output arrays of one image, or of n images with a leading n; all must come in as zeros."""

    main: Bytes  # (H, W)
    second: Bytes  # (H, W)
    fixed: Bytes  # (H, W, 3)
    alpha: Bytes  # (H, W)
    depth: Floats  # (H, W), or (0, 0) to skip depth and normals
    normals: Floats  # (H, W, 3), or (0, 0, 3)


@kernel
def _pixel_window(toy: Tables, camera: Floats, tan_half_fov: float, size: int) -> tuple[int, int, int, int]:
    """First row, end row, first column and end column of the pixels that can see the toy.

    One pixel wider than the projected boxes, for the anti-aliasing of their border.
    """
    low_u = low_v = FAR
    high_u = high_v = -FAR
    right = camera[1]
    up = camera[2]
    forward = camera[3]
    code, solid, pose, center, _ = toy
    extent = solid[:, 5:]
    for i in range(code.shape[0]):
        if code[i, 1] != 0:
            continue
        m = pose[i]
        for corner in range(8):
            a = extent[i, 0] if corner & 1 else -extent[i, 0]
            b = extent[i, 1] if corner & 2 else -extent[i, 1]
            c = extent[i, 2] if corner & 4 else -extent[i, 2]
            x = center[i, 0] + m[0, 0] * a + m[1, 0] * b + m[2, 0] * c - camera[0, 0]
            y = center[i, 1] + m[0, 1] * a + m[1, 1] * b + m[2, 1] * c - camera[0, 1]
            z = center[i, 2] + m[0, 2] * a + m[1, 2] * b + m[2, 2] * c - camera[0, 2]
            far = (forward[0] * x + forward[1] * y + forward[2] * z) * tan_half_fov
            if far < 1e-3:
                return 0, size, 0, size
            u = (right[0] * x + right[1] * y + right[2] * z) / far
            v = (up[0] * x + up[1] * y + up[2] * z) / far
            low_u, high_u = min(low_u, u), max(high_u, u)
            low_v, high_v = min(low_v, v), max(high_v, v)
    half = 0.5 * size
    return (
        max(int((1.0 - high_v) * half) - 1, 0),
        min(int((1.0 - low_v) * half) + 2, size),
        max(int((1.0 + low_u) * half) - 1, 0),
        min(int((1.0 + high_u) * half) + 2, size),
    )


@kernel
def _is_edge(ids: Ints, along: Floats, row: int, column: int) -> bool:
    """Whether the 3x3 neighbourhood shows another primitive or a depth jump."""
    size = ids.shape[0]
    own = ids[row, column]
    for r in range(max(row - 1, 0), min(row + 2, size)):
        for c in range(max(column - 1, 0), min(column + 2, size)):
            if ids[r, c] != own or abs(along[r, c] - along[row, column]) > DEPTH_EDGE:
                return True
    return False


@kernel
def _sample(
    code: Ints,
    solid: Floats,
    pose: Floats,
    eye: Floats,
    active: Ints,
    beam: Floats,
    light: Floats,
    dx: float,
    dy: float,
    dz: float,
) -> tuple[float, int, float, float, float, float]:
    """Distance, primitive (-1: a miss), unit normal and shade in [0, 1] seen along a direction."""
    t, k = trace(code, solid, pose, eye, active, beam, dx, dy, dz)
    if k < 0:
        return FAR, -1, 0.0, 0.0, 0.0, 0.0
    i = active[k]
    nx, ny, nz = normal_at(
        code[i, 0],
        solid[i],
        pose[i],
        1.0 - 2.0 * code[i, 1],
        eye[i, 4] + t * beam[k, 0],
        eye[i, 5] + t * beam[k, 1],
        eye[i, 6] + t * beam[k, 2],
        dx,
        dy,
        dz,
    )
    facing = max(0.0, nx * light[0] + ny * light[1] + nz * light[2])
    shade = light[3] + light[4] * (0.5 + 0.5 * ny) + light[5] * facing
    clear = openness(
        code,
        solid,
        pose,
        eye,
        t * dx + OCCLUSION_REACH * nx,
        t * dy + OCCLUSION_REACH * ny,
        t * dz + OCCLUSION_REACH * nz,
    )
    return t, i, nx, ny, nz, min(shade * (1.0 - OCCLUSION_WEIGHT * (1.0 - clear)), 1.0)


@kernel
def render_image(toy: Tables, camera: Floats, tan_half_fov: float, light: Floats, out: Outputs) -> None:
    """Render one toy into ``out``.

    ``camera`` (4, 3) stacks eye, right, up and forward; ``light`` (6,) is the unit direction
    towards the light, then the ambient, sky and diffuse weights (their sum at most 1). Depth
    (metres along the view axis) and normals belong to the pixel-centre rays.
    """
    code, solid, pose, center, paint = toy
    # Unpacked once: numba reference-counts every attribute access.
    main, second, fixed, alpha, depth, normals = out
    eye = eye_table(center, pose, solid[:, 5:], camera[0])
    active = np.zeros(code.shape[0], np.int32)
    beam = np.zeros((code.shape[0], 5), np.float32)
    total = np.zeros(6, np.float32)
    size = main.shape[0]
    ids = np.full((size, size), -1, np.int32)
    along = np.zeros((size, size), np.float32)
    top, bottom, left, end = _pixel_window(toy, camera, tan_half_fov, size)
    for refine in range(2):
        samples = 4 if refine == 1 else 1
        for row in range(top, bottom):
            for column in range(left, end):
                if refine == 1 and not _is_edge(ids, along, row, column):
                    continue
                total[:] = 0.0
                for sample in range(samples):
                    u = column + 0.5 + refine * _SUB_X[sample]
                    v = row + 0.5 + refine * _SUB_Y[sample]
                    u = (2.0 * u / size - 1.0) * tan_half_fov
                    v = (1.0 - 2.0 * v / size) * tan_half_fov
                    cosine = 1.0 / math.sqrt(1.0 + u * u + v * v)  # to the view axis
                    dx = (camera[3, 0] + u * camera[1, 0] + v * camera[2, 0]) * cosine
                    dy = (camera[3, 1] + u * camera[1, 1] + v * camera[2, 1]) * cosine
                    dz = (camera[3, 2] + u * camera[1, 2] + v * camera[2, 2]) * cosine
                    t, i, nx, ny, nz, shade = _sample(code, solid, pose, eye, active, beam, light, dx, dy, dz)
                    if i < 0:
                        continue
                    for channel in range(5):
                        total[channel] += shade * paint[i, channel]
                    total[5] += 1.0
                    if refine == 0:
                        ids[row, column] = i
                        along[row, column] = t
                        if depth.shape[0] > 0:
                            depth[row, column] = t * cosine
                            normals[row, column, 0] = nx
                            normals[row, column, 1] = ny
                            normals[row, column, 2] = nz
                weight = 255.0 / samples
                main[row, column] = np.uint8(total[0] * weight + 0.5)
                second[row, column] = np.uint8(total[1] * weight + 0.5)
                fixed[row, column, 0] = np.uint8(total[2] * weight + 0.5)
                fixed[row, column, 1] = np.uint8(total[3] * weight + 0.5)
                fixed[row, column, 2] = np.uint8(total[4] * weight + 0.5)
                alpha[row, column] = np.uint8(total[5] * weight + 0.5)


@kernel
def render_batch(
    counts: NDArray[np.int64],
    toys: Tables,
    cameras: Floats,
    tan_half_fov: Floats,
    lights: Floats,
    out: Outputs,
) -> None:
    """Render n padded toys of ``counts`` (n,) primitives each; see ``render_image``."""
    for n in range(counts.shape[0]):
        p = counts[n]
        toy = Tables(
            toys.code[n, :p],
            toys.solid[n, :p],
            toys.pose[n, :p],
            toys.center[n, :p],
            toys.paint[n, :p],
        )
        image = Outputs(
            out.main[n],
            out.second[n],
            out.fixed[n],
            out.alpha[n],
            out.depth[n],
            out.normals[n],
        )
        render_image(toy, cameras[n], tan_half_fov[n], lights[n], image)
