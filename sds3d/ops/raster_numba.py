"""Triangle z-buffers compiled with numba: `z_buffer` for camera views, `uv_buffer` for texture atlases.

Both release the GIL and write only to the rows they are given, so views may run on ordinary threads.
Coordinates are float64: two triangles that share an edge then leave no gap and no pixel to chance.
"""

from typing import Literal

import numpy as np
from numba import njit
from numpy.typing import NDArray

Cull = Literal["none", "back", "front"]
CULL_SIGN: dict[str, float] = {"none": 0.0, "back": 1.0, "front": -1.0}


@njit(cache=True, nogil=True)
def z_buffer(
    screen: NDArray[np.float64],
    inverse_z: NDArray[np.float64],
    faces: NDArray[np.int64],
    keep_sign: float,
    face_id: NDArray[np.int64],
    nearest: NDArray[np.float32],
) -> None:
    """Draw one view: `face_id` (H, W) becomes the nearest face per pixel centre, `nearest` (H, W) its 1 / depth.

    `screen` (v, 2) holds pixel coordinates and `inverse_z` (v,) 1 / depth, 0 for a vertex behind the camera:
    its faces are skipped. Equal depths keep the lower face id. `keep_sign` 0 draws both sides, 1 only faces that
    run counter-clockwise as seen (front), -1 only the others. Both outputs must come filled with -1 and 0.
    """
    height, width = face_id.shape
    for f in range(faces.shape[0]):
        i, j, k = faces[f, 0], faces[f, 1], faces[f, 2]
        wi, wj, wk = inverse_z[i], inverse_z[j], inverse_z[k]
        if wi <= 0.0 or wj <= 0.0 or wk <= 0.0:
            continue
        xi, yi = screen[i, 0], screen[i, 1]
        xj, yj = screen[j, 0], screen[j, 1]
        xk, yk = screen[k, 0], screen[k, 1]
        # Image y points down: counter-clockwise as seen means a negative area here.
        area = (xj - xi) * (yk - yi) - (xk - xi) * (yj - yi)
        if area == 0.0 or area * keep_sign > 0.0:
            continue
        first_row = max(int(np.ceil(min(yi, yj, yk) - 0.5)), 0)
        last_row = min(int(np.floor(max(yi, yj, yk) - 0.5)), height - 1)
        first_column = max(int(np.ceil(min(xi, xj, xk) - 0.5)), 0)
        last_column = min(int(np.floor(max(xi, xj, xk) - 0.5)), width - 1)
        for row in range(first_row, last_row + 1):
            y = row + 0.5
            for column in range(first_column, last_column + 1):
                x = column + 0.5
                bi = ((xj - x) * (yk - y) - (xk - x) * (yj - y)) / area
                bj = ((xk - x) * (yi - y) - (xi - x) * (yk - y)) / area
                bk = ((xi - x) * (yj - y) - (xj - x) * (yi - y)) / area
                if bi < 0.0 or bj < 0.0 or bk < 0.0:
                    continue
                # Compared in float32, as the torch twin packs it: rounding cannot part the two.
                inverse = np.float32(bi * wi + bj * wj + bk * wk)
                if inverse > nearest[row, column]:
                    nearest[row, column] = inverse
                    face_id[row, column] = f


@njit(cache=True, nogil=True)
def uv_buffer(
    corners: NDArray[np.float64], face_id: NDArray[np.int64], barycentrics: NDArray[np.float32]
) -> None:
    """Draw triangles with texel coordinates `corners` (f, 3, 2) into `face_id` (H, W) and `barycentrics` (H, W, 3).

    A texel belongs to the first triangle that contains its centre. `face_id` must come filled with -1.
    """
    height, width = face_id.shape
    for f in range(corners.shape[0]):
        xi, yi = corners[f, 0, 0], corners[f, 0, 1]
        xj, yj = corners[f, 1, 0], corners[f, 1, 1]
        xk, yk = corners[f, 2, 0], corners[f, 2, 1]
        area = (xj - xi) * (yk - yi) - (xk - xi) * (yj - yi)
        if area == 0.0:
            continue
        first_row = max(int(np.ceil(min(yi, yj, yk) - 0.5)), 0)
        last_row = min(int(np.floor(max(yi, yj, yk) - 0.5)), height - 1)
        first_column = max(int(np.ceil(min(xi, xj, xk) - 0.5)), 0)
        last_column = min(int(np.floor(max(xi, xj, xk) - 0.5)), width - 1)
        for row in range(first_row, last_row + 1):
            y = row + 0.5
            for column in range(first_column, last_column + 1):
                if face_id[row, column] >= 0:
                    continue
                x = column + 0.5
                bi = ((xj - x) * (yk - y) - (xk - x) * (yj - y)) / area
                bj = ((xk - x) * (yi - y) - (xi - x) * (yk - y)) / area
                bk = ((xi - x) * (yj - y) - (xj - x) * (yi - y)) / area
                if bi >= 0.0 and bj >= 0.0 and bk >= 0.0:
                    face_id[row, column] = f
                    barycentrics[row, column, 0] = bi
                    barycentrics[row, column, 1] = bj
                    barycentrics[row, column, 2] = bk
