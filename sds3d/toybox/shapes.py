"""Building toys out of primitives: paints, the builder, and the packed ``Toy`` it produces.

Frame: right-handed, metres, +y up, the toy's front faces +z. A toy is an ordered list of
primitives; each one is added to (union) or cut out of (subtraction) everything before it.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sds3d.toybox import sdf

SLOT_MAIN, SLOT_SECOND, SLOT_FIXED = 0, 1, 2
MAX_PRIMITIVES = 28
TARGET_RADIUS = (0.88, 1.0)

Vec3 = tuple[float, float, float]
Matrix = NDArray[np.float64]

IDENTITY: Matrix = np.eye(3)


@dataclass(frozen=True)
class Paint:
    """Colour of a primitive: a colour slot with a tint.

    For the main and second slots the tint is a grey factor in [0, 1] (1 = the plain colour); for
    the fixed slot it is an sRGB colour with components in [0, 1].
    """

    slot: int
    tint: Vec3

    def darker(self, factor: float) -> "Paint":
        """The same paint with its brightness multiplied by ``factor`` in [0, 1]."""
        red, green, blue = self.tint
        return Paint(self.slot, (red * factor, green * factor, blue * factor))


MAIN = Paint(SLOT_MAIN, (1.0, 1.0, 1.0))
SECOND = Paint(SLOT_SECOND, (1.0, 1.0, 1.0))


def fixed(red: float, green: float, blue: float) -> Paint:
    """A paint that keeps its own sRGB colour whatever the toy's two colours are."""
    return Paint(SLOT_FIXED, (red, green, blue))


@dataclass(frozen=True, eq=False)
class Toy:
    """One toy as packed primitive arrays (p primitives, p <= MAX_PRIMITIVES).

    The bounding box is centred at the origin; the surface reaches ``radius`` metres from it.
    """

    kind: str
    kind_index: int
    shape: NDArray[np.int32]  # (p,) primitive codes of ``sdf``
    cut: NDArray[np.bool_]  # (p,) True where the primitive is subtracted
    center: NDArray[np.float32]  # (p, 3) metres
    rotation: NDArray[np.float32]  # (p, 3, 3) world to local
    params: NDArray[np.float32]  # (p, 5) metres
    extent: NDArray[np.float32]  # (p, 3) half sizes of the local bounding box, metres
    slot: NDArray[np.int32]  # (p,) SLOT_MAIN, SLOT_SECOND or SLOT_FIXED
    tint: NDArray[np.float32]  # (p, 3) see Paint
    radius: float  # metres


def rotation_x(degrees: float) -> Matrix:
    """Rotation about +x (turns +y towards +z)."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])


def rotation_y(degrees: float) -> Matrix:
    """Rotation about +y (turns +z towards +x)."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]])


def rotation_z(degrees: float) -> Matrix:
    """Rotation about +z (turns +x towards +y)."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def _align_y(direction: NDArray[np.float64]) -> Matrix:
    """A rotation that turns +y onto the unit vector ``direction`` (3,)."""
    helper = np.array([0.0, 0.0, 1.0]) if abs(direction[2]) < 0.9 else np.array([1.0, 0.0, 0.0])
    side = np.cross(direction, helper)
    side /= np.linalg.norm(side)
    return np.stack([side, direction, np.cross(side, direction)], axis=1)


def _sphere_directions(count: int) -> NDArray[np.float64]:
    """Fibonacci unit vectors (count, 3)."""
    index = np.arange(count) + 0.5
    height = 1.0 - 2.0 * index / count
    ring = np.sqrt(1.0 - height * height)
    angle = index * math.pi * (3.0 - math.sqrt(5.0))
    return np.stack([ring * np.cos(angle), height, ring * np.sin(angle)], axis=1)


# The six axes make the bounding box exact; the rest serve the bounding sphere.
_DIRECTIONS = np.concatenate([np.eye(3), -np.eye(3), _sphere_directions(122)])


@dataclass(frozen=True, eq=False)
class _Primitive:
    shape: int
    center: NDArray[np.float64]
    rotation: Matrix  # local to world
    params: NDArray[np.float64]
    paint: Paint
    cut: bool

    def surface_points(self) -> NDArray[np.float64]:
        """World points (n, 3) on the surface, farthest along each of the probe directions."""
        local = sdf.support_points(self.shape, self.params, _DIRECTIONS @ self.rotation)
        return local @ self.rotation.T + self.center

    def contains(self, points: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Whether world ``points`` (n, 3) lie strictly inside."""
        local = (points - self.center) @ self.rotation
        return sdf.distances(self.shape, self.params, np.ascontiguousarray(local)) < -1e-6


class Builder:
    """Collects primitives of one toy, then centres, scales and packs them."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self._primitives: list[_Primitive] = []

    def vary(self, value: float, fraction: float = 0.12) -> float:
        """``value`` times a random factor in [1 - fraction, 1 + fraction]."""
        return value * float(self.rng.uniform(1.0 - fraction, 1.0 + fraction))

    def _add(
        self,
        shape: int,
        center: Vec3,
        params: tuple[float, ...],
        paint: Paint,
        rotation: Matrix,
        cut: bool,
    ) -> None:
        padded = np.zeros(sdf.PARAM_COUNT)
        padded[: len(params)] = params
        place = np.array(center, dtype=np.float64)
        self._primitives.append(_Primitive(shape, place, rotation, padded, paint, cut))

    def ellipsoid(
        self,
        center: Vec3,
        radii: Vec3,
        paint: Paint,
        rotation: Matrix = IDENTITY,
        cut: bool = False,
    ) -> None:
        """Ellipsoid with semi-axes ``radii``."""
        self._add(sdf.ELLIPSOID, center, radii, paint, rotation, cut)

    def ball(self, center: Vec3, radius: float, paint: Paint) -> None:
        """Sphere."""
        self.ellipsoid(center, (radius, radius, radius), paint)

    def box(
        self,
        center: Vec3,
        half: Vec3,
        paint: Paint,
        rounding: float = 0.03,
        rotation: Matrix = IDENTITY,
        cut: bool = False,
    ) -> None:
        """Box of half sizes ``half`` (rounding included) with rounded edges."""
        self._add(sdf.BOX, center, (*half, min(rounding, *half)), paint, rotation, cut)

    def frustum(
        self,
        center: Vec3,
        half_height: float,
        bottom: float,
        top: float,
        paint: Paint,
        rounding: float = 0.02,
        rotation: Matrix = IDENTITY,
        cut: bool = False,
    ) -> None:
        """Cone frustum (or cylinder) along local y."""
        params = (half_height, bottom, top, min(rounding, half_height, max(bottom, top)))
        self._add(sdf.FRUSTUM, center, params, paint, rotation, cut)

    def torus(
        self, center: Vec3, ring: float, tube: float, paint: Paint, rotation: Matrix = IDENTITY
    ) -> None:
        """Torus around local y."""
        self._add(sdf.TORUS, center, (ring, tube), paint, rotation, False)

    def capsule(self, start: Vec3, end: Vec3, radius: float, paint: Paint) -> None:
        """Capsule whose core runs from ``start`` to ``end``."""
        middle, half, rotation = _segment(start, end)
        self._add(sdf.CAPSULE, middle, (half, radius), paint, rotation, False)

    def spike(
        self,
        start: Vec3,
        end: Vec3,
        start_radius: float,
        end_radius: float,
        paint: Paint,
        rounding: float = 0.02,
    ) -> None:
        """Frustum whose axis runs from ``start`` to ``end``."""
        middle, half, rotation = _segment(start, end)
        self.frustum(middle, half, start_radius, end_radius, paint, rounding, rotation)

    def wedge(
        self,
        center: Vec3,
        bottom: float,
        top: float,
        half_height: float,
        half_depth: float,
        paint: Paint,
        rounding: float = 0.02,
        rotation: Matrix = IDENTITY,
    ) -> None:
        """Trapezoid in local x-y (half widths ``bottom`` and ``top``) extruded along local z."""
        limit = min(half_height, half_depth, max(bottom, top))
        params = (bottom, top, half_height, half_depth, min(rounding, limit))
        self._add(sdf.WEDGE, center, params, paint, rotation, False)

    def _visible_points(self) -> NDArray[np.float64]:
        """Surface points (n, 3) of the added primitives that no later cut removes."""
        kept = []
        for index, primitive in enumerate(self._primitives):
            if primitive.cut:
                continue
            points = primitive.surface_points()
            for later in self._primitives[index + 1 :]:
                if later.cut:
                    points = points[~later.contains(points)]
            kept.append(points)
        return np.concatenate(kept)

    def finish(self, kind: str, kind_index: int) -> Toy:
        """Centre the bounding box at the origin, scale to a random radius and pack."""
        items = self._primitives
        if not 0 < len(items) <= MAX_PRIMITIVES:
            raise ValueError(f"{kind}: {len(items)} primitives, at most {MAX_PRIMITIVES} allowed")
        points = self._visible_points()
        middle = 0.5 * (points.min(axis=0) + points.max(axis=0))
        reach = float(np.linalg.norm(points - middle, axis=1).max())
        radius = float(self.rng.uniform(*TARGET_RADIUS))
        scale = radius / reach
        params = np.stack([item.params for item in items]) * scale
        extent = [sdf.half_extents(item.shape, row) for item, row in zip(items, params, strict=True)]
        center = (np.stack([item.center for item in items]) - middle) * scale
        return Toy(
            kind=kind,
            kind_index=kind_index,
            shape=np.array([item.shape for item in items], np.int32),
            cut=np.array([item.cut for item in items], np.bool_),
            center=center.astype(np.float32),
            rotation=np.stack([item.rotation.T for item in items]).astype(np.float32),
            params=params.astype(np.float32),
            extent=np.array(extent, np.float32),
            slot=np.array([item.paint.slot for item in items], np.int32),
            tint=np.array([item.paint.tint for item in items], np.float32),
            radius=radius,
        )


def _segment(start: Vec3, end: Vec3) -> tuple[Vec3, float, Matrix]:
    """Midpoint, half length and y-aligning rotation of a segment."""
    first, last = np.array(start), np.array(end)
    length = float(np.linalg.norm(last - first))
    middle = 0.5 * (first + last)
    place = (float(middle[0]), float(middle[1]), float(middle[2]))
    return place, 0.5 * length, _align_y((last - first) / length)
