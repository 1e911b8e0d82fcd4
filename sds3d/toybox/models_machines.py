"""Vehicles and the robot: car, rocket, boat, airplane, robot."""

import math

from sds3d.toybox.shapes import MAIN, SECOND, Builder, fixed, rotation_x, rotation_y, rotation_z

GLASS = fixed(0.6, 0.84, 0.96)
STEEL = fixed(0.62, 0.64, 0.67)
DARK = fixed(0.16, 0.16, 0.18)
WOOD = fixed(0.55, 0.36, 0.2)


def car(b: Builder) -> None:
    """A rounded saloon facing +z with glazed cabin, four wheels and lights."""
    length, width = b.vary(0.82, 0.06), b.vary(0.42, 0.06)
    b.box((0.0, 0.0, 0.0), (width, 0.19, length), MAIN, 0.1)
    cabin, half = b.vary(0.5, 0.08), b.vary(0.18, 0.08)
    y, z = 0.17 + half, -0.1
    across = rotation_y(90.0)
    b.wedge((0.0, y, z), cabin, cabin * 0.62, half, width * 0.86, MAIN, 0.05, across)
    b.wedge(
        (0.0, y - 0.01, z), cabin * 0.8, cabin * 0.55, half * 0.62, width * 0.86 + 0.02, GLASS, 0.02, across
    )
    b.wedge((0.0, y - 0.01, z), cabin * 0.97, cabin * 0.76, half * 0.62, width * 0.68, GLASS, 0.02, across)
    b.box((0.0, y, z), (width * 0.86 + 0.03, half * 0.8, 0.05), MAIN, 0.02)
    wheel = b.vary(0.215, 0.06)
    for x in (-1, 1):
        for end in (-1, 1):
            hub = (x * (width - 0.03), -0.17, end * length * 0.58)
            b.frustum(hub, 0.1, wheel, wheel, SECOND, 0.04, rotation_z(90.0))
            b.frustum((x * (width + 0.04), -0.17, hub[2]), 0.05, 0.09, 0.09, STEEL, 0.02, rotation_z(90.0))
        b.ellipsoid((x * width * 0.62, 0.03, length - 0.03), (0.1, 0.09, 0.08), fixed(0.99, 0.95, 0.6))
        b.box((x * width * 0.66, 0.03, -length), (0.1, 0.06, 0.04), fixed(0.82, 0.06, 0.08), 0.02)
    b.box((0.0, -0.11, length - 0.02), (width * 0.7, 0.05, 0.05), STEEL, 0.02)


def rocket(b: Builder) -> None:
    """A tapered hull standing on four fins, with a nose cone and a porthole at the front."""
    radius, height = b.vary(0.39, 0.08), b.vary(0.98, 0.06)
    collar = height * 0.68
    b.ellipsoid((0.0, 0.0, 0.0), (radius, height, radius), MAIN)
    b.box((0.0, collar + 0.5, 0.0), (0.6, 0.5, 0.6), MAIN, 0.0, cut=True)
    b.box((0.0, -0.62 - 0.5, 0.0), (0.6, 0.5, 0.6), MAIN.darker(0.7), 0.0, cut=True)
    b.spike((0.0, collar - 0.03, 0.0), (0.0, height * 1.06, 0.0), radius * 0.78, 0.03, SECOND, 0.04)
    b.frustum((0.0, -0.68, 0.0), 0.1, radius * 0.75, radius * 0.55, DARK)
    reach = b.vary(0.18, 0.12)
    for k in range(4):
        turn = rotation_y(45.0 + 90.0 * k)
        lean = turn @ rotation_z(18.0)
        out = turn @ (radius * 0.72 + reach * 0.6, -0.56, 0.0)
        place = (float(out[0]), float(out[1]), float(out[2]))
        b.wedge(place, reach, reach * 0.45, 0.25, 0.055, SECOND, 0.03, lean)
    b.ellipsoid((0.0, 0.2, radius * 0.93), (0.17, 0.17, 0.07), STEEL)
    b.ellipsoid((0.0, 0.2, radius * 0.97), (0.12, 0.12, 0.08), GLASS)


def boat(b: Builder) -> None:
    """A sailing boat: pointed bow at +z, flat stern, open deck, mast and two sails."""
    width, depth, length = b.vary(0.42, 0.08), b.vary(0.5, 0.08), b.vary(0.92, 0.06)
    stern = -length * 0.66
    b.ellipsoid((0.0, 0.0, 0.0), (width, depth, length), MAIN)
    b.box((0.0, 1.0, 0.0), (1.0, 1.0, 2.0), MAIN, 0.0, cut=True)
    b.box((0.0, 0.0, stern - 1.0), (1.0, 1.0, 1.0), MAIN, 0.0, cut=True)
    b.ellipsoid((0.0, 0.02, 0.02), (width - 0.09, 0.17, length - 0.16), WOOD, cut=True)
    b.box((0.0, -0.04, stern + 0.06), (width * 0.7, 0.06, 0.07), MAIN, 0.02)
    b.box((0.0, -0.06, -0.12), (width * 0.85, 0.05, 0.1), WOOD.darker(0.8), 0.02)
    tall = b.vary(0.98, 0.08)
    mast = length * 0.18
    b.capsule((0.0, -0.2, mast), (0.0, tall, mast), 0.05, WOOD)
    swing = b.vary(24.0, 0.4) * float(b.rng.choice((-1.0, 1.0)))
    _sail(b, mast - 0.05, tall - 0.06, -length * 0.74, swing)
    _sail(b, mast + 0.05, tall * 0.8, length * 0.5, swing * -0.6)


def _sail(b: Builder, mast: float, top: float, run: float, swing: float) -> None:
    """A triangle with an upright edge at z = ``mast``, up to y = ``top``.

    Its foot is ``run`` metres long towards +z (negative: -z), turned ``swing`` degrees about y.
    """
    foot = 0.14
    # An isosceles triangle, leaned until one flank is upright.
    side = top - foot
    apex = math.atan2(abs(run), side)
    half = side * math.sin(apex / 2.0)
    height = side * math.cos(apex / 2.0)
    lean = math.degrees(apex / 2.0) * (1.0 if run > 0.0 else -1.0)
    turn = rotation_y(swing) @ rotation_x(-lean) @ rotation_y(90.0)
    upright = rotation_y(swing)
    middle = upright @ (0.0, 0.0, math.copysign(height / 2.0 * math.sin(apex / 2.0), run))
    place = (float(middle[0]), top - height / 2.0 * math.cos(apex / 2.0), mast + float(middle[2]))
    b.wedge(place, half, 0.02, height / 2.0, 0.05, SECOND, 0.03, turn)


def airplane(b: Builder) -> None:
    """A plump propeller plane flying towards +z."""
    radius, length = b.vary(0.35, 0.06), b.vary(0.84, 0.06)
    b.ellipsoid((0.0, 0.0, 0.05), (radius, radius, length * 0.82), MAIN)
    b.spike((0.0, 0.02, 0.1), (0.0, 0.1, -length), radius * 0.97, 0.14, MAIN, 0.08)
    b.ellipsoid((0.0, radius * 0.72, 0.24), (radius * 0.6, 0.19, 0.27), GLASS)
    half = b.vary(0.25, 0.08)
    for x in (-1, 1):
        # A tapering wing: the wedge's height runs along the span.
        span = rotation_z(-x * 90.0 + x * 4.0)
        flat = span @ rotation_y(90.0)
        b.wedge((x * (radius * 0.7 + half), -0.06, 0.1), 0.23, 0.16, half + 0.05, 0.065, SECOND, 0.05, flat)
        b.wedge((x * 0.22, 0.14, -length + 0.08), 0.15, 0.1, 0.2, 0.055, MAIN, 0.04, flat)
    b.wedge((0.0, 0.32, -length + 0.06), 0.19, 0.1, 0.23, 0.06, MAIN, 0.04, rotation_y(90.0))
    nose = 0.05 + length * 0.82
    b.ball((0.0, 0.0, nose), 0.1, fixed(0.98, 0.8, 0.2))
    turn = float(b.rng.uniform(20.0, 70.0))
    b.box((0.0, 0.0, nose + 0.03), (0.42, 0.06, 0.045), DARK, 0.03, rotation_z(turn))


def robot(b: Builder) -> None:
    """A boxy robot with arms, feet, an antenna and a chest panel."""
    width, height, depth = b.vary(0.42, 0.08), b.vary(0.38, 0.08), b.vary(0.3, 0.06)
    b.box((0.0, 0.0, 0.0), (width, height, depth), MAIN, 0.05)
    head = b.vary(0.26, 0.06)
    y = height + 0.08 + head * 0.8
    b.frustum((0.0, height + 0.05, 0.0), 0.08, 0.11, 0.11, STEEL)
    b.box((0.0, y, 0.0), (head, head * 0.78, head * 0.8), SECOND, 0.05)
    b.capsule((0.0, y + head * 0.7, 0.0), (0.0, y + head * 0.78 + 0.17, 0.0), 0.045, STEEL)
    b.ball((0.0, y + head * 0.78 + 0.22, 0.0), 0.08, fixed(0.9, 0.12, 0.12))
    face = head * 0.8
    b.box((0.0, y - head * 0.38, face), (head * 0.5, 0.045, 0.03), DARK, 0.02)
    b.box((0.0, 0.02, depth), (width * 0.6, height * 0.5, 0.035), fixed(0.86, 0.9, 0.94), 0.02)
    lights = {-1: fixed(0.2, 0.75, 0.3), 1: fixed(0.9, 0.2, 0.2)}
    for x in (-1, 1):
        b.ball((x * head * 0.45, y + head * 0.16, face), 0.085, fixed(0.99, 0.93, 0.4))
        b.ball((x * head * 0.45, y + head * 0.16, face + 0.06), 0.045, DARK)
        b.ball((x * width * 0.28, height * 0.2, depth + 0.03), 0.065, lights[x])
        shoulder = (x * (width + 0.09), height * 0.6, 0.0)
        wrist = (x * (width + 0.13), -height * 0.6, 0.06)
        b.capsule(shoulder, wrist, 0.1, MAIN.darker(0.85))
        b.ball(wrist, 0.13, STEEL)
        b.box((x * width * 0.5, -height - 0.2, 0.0), (0.125, 0.24, 0.14), MAIN.darker(0.85), 0.04)
        b.box((x * width * 0.5, -height - 0.4, 0.06), (0.15, 0.08, 0.22), DARK, 0.04)
