"""Camera views around a toy.

Azimuth 0 deg puts the camera on +z (it sees the front), 90 deg on +x; elevation 90 deg is straight
above. The camera looks at the origin with +y up, image x to the right and image y down.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

OVERHEAD_ELEVATION_DEG = 50.0
DEFAULT_FOV_DEG = 40.0
RADIUS_RANGE = (3.1, 3.5)  # metres
SIDE_ELEVATION_RANGE = (-10.0, 45.0)
OVERHEAD_ELEVATION_RANGE = (50.0, 80.0)
OVERHEAD_FRACTION = 0.15

FRONT_VIEW, SIDE_VIEW, BACK_VIEW = "front view", "side view", "back view"
OVERHEAD_VIEW = "overhead view"
VIEW_WORDS = (FRONT_VIEW, SIDE_VIEW, BACK_VIEW, OVERHEAD_VIEW)


@dataclass(frozen=True, eq=False)
class Views:
    """n camera views; all arrays are float64 of shape (n,)."""

    azimuth_deg: NDArray[np.float64]
    elevation_deg: NDArray[np.float64]
    radius: NDArray[np.float64]  # metres from the origin
    fov_deg: NDArray[np.float64]  # full vertical field of view

    def __len__(self) -> int:
        return int(self.azimuth_deg.shape[0])

    def words(self) -> list[str]:
        """The view word of every view."""
        return [view_word(a, e) for a, e in zip(self.azimuth_deg, self.elevation_deg, strict=True)]


def make_views(
    azimuth_deg: object, elevation_deg: object, radius: float = 3.3, fov_deg: float = DEFAULT_FOV_DEG
) -> Views:
    """Views from scalars or arrays, broadcast against each other."""
    arrays = np.broadcast_arrays(
        *(np.atleast_1d(np.asarray(v, np.float64)) for v in (azimuth_deg, elevation_deg, radius, fov_deg))
    )
    return Views(*(np.array(array) for array in arrays))


def sample_views(rng: np.random.Generator, n: int) -> Views:
    """Draw n random training views: azimuth uniform, 15 % overhead, radius 3.1 to 3.5 m, fov 40 deg."""
    azimuth = rng.uniform(0.0, 360.0, n)
    overhead = rng.random(n) < OVERHEAD_FRACTION
    side = rng.uniform(*SIDE_ELEVATION_RANGE, n)
    elevation = np.where(overhead, rng.uniform(*OVERHEAD_ELEVATION_RANGE, n), side)
    radius = rng.uniform(*RADIUS_RANGE, n)
    return Views(azimuth, elevation, radius, np.full(n, DEFAULT_FOV_DEG))


def view_word(azimuth_deg: float, elevation_deg: float) -> str:
    """Return "front view", "side view", "back view" or (elevation above 50) "overhead view"."""
    if elevation_deg > OVERHEAD_ELEVATION_DEG:
        return OVERHEAD_VIEW
    off_front = abs((azimuth_deg + 180.0) % 360.0 - 180.0)
    if off_front < 45.0:
        return FRONT_VIEW
    return BACK_VIEW if off_front > 135.0 else SIDE_VIEW


def camera_frames(views: Views) -> NDArray[np.float32]:
    """Cameras (n, 4, 3): eye position, then unit right, up and forward vectors, world frame."""
    azimuth, elevation = np.radians(views.azimuth_deg), np.radians(views.elevation_deg)
    outward = np.stack(
        [np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)],
        axis=1,
    )
    right = np.stack([np.cos(azimuth), np.zeros_like(azimuth), -np.sin(azimuth)], axis=1)
    up = np.cross(outward, right)
    eye = outward * views.radius[:, None]
    return np.stack([eye, right, up, -outward], axis=1).astype(np.float32)
