"""Plants and creatures: apple, mushroom, snowman, tree, cactus, duck, dog."""

import math

from sds3d.toybox.shapes import MAIN, SECOND, Builder, fixed, rotation_x, rotation_y, rotation_z

BLACK = fixed(0.05, 0.05, 0.06)
BARK = fixed(0.36, 0.22, 0.11)
CREAM = fixed(0.97, 0.96, 0.9)
CARROT = fixed(0.96, 0.45, 0.05)


def apple(b: Builder) -> None:
    """A dimpled fruit, narrower below, with a stalk and a leaf."""
    ring, tube = b.vary(0.27, 0.08), b.vary(0.35, 0.05)
    body = b.vary(0.5, 0.08)
    # A rounded cone; its rounded upper rim coincides with the torus that forms the dimple.
    b.frustum((0.0, 0.06 + tube - body, 0.0), body, b.vary(0.51, 0.05), ring + tube, MAIN, tube)
    b.frustum((0.0, 1.06, 0.0), 1.0, ring, ring, MAIN, 0.0, cut=True)
    b.torus((0.0, 0.06, 0.0), ring, tube, MAIN)
    top = 0.06 + tube
    lean = float(b.rng.uniform(-0.06, 0.06))
    b.capsule((0.0, top - 0.3, 0.0), (lean, top + 0.2, 0.0), 0.05, BARK)
    turn = float(b.rng.uniform(-30.0, 30.0))
    tilt = rotation_y(turn) @ rotation_z(28.0)
    offset = tilt @ (0.21, 0.0, 0.0)
    leaf = (float(offset[0]), top + 0.06 + float(offset[1]), float(offset[2]))
    b.ellipsoid(leaf, (b.vary(0.23), 0.06, 0.12), SECOND, tilt)


def mushroom(b: Builder) -> None:
    """A domed cap with pale spots on a stout stem."""
    radius, height = b.vary(0.72, 0.08), b.vary(0.6, 0.1)
    b.ellipsoid((0.0, 0.0, 0.0), (radius, height, radius), MAIN)
    b.box((0.0, -1.12, 0.0), (1.5, 1.0, 1.5), MAIN.darker(0.72), 0.0, cut=True)
    foot = b.vary(0.3, 0.1)
    b.frustum((0.0, -0.36, 0.0), 0.3, foot, foot * 0.78, SECOND, 0.06)
    start = float(b.rng.uniform(0.0, 60.0))
    b.ellipsoid((0.0, height * 0.93, 0.0), (0.17, 0.08, 0.17), CREAM)
    for k in range(9):
        polar = math.radians(52.0 if k % 3 else 38.0 + b.rng.uniform(0.0, 8.0))
        angle = math.radians(start + k * 40.0)
        reach, y = radius * math.sin(polar), height * math.cos(polar)
        spot = b.vary(0.1, 0.2)
        b.ball((reach * math.cos(angle) * 0.97, y * 0.97, reach * math.sin(angle) * 0.97), spot, CREAM)


def snowman(b: Builder) -> None:
    """Three balls with a hat, a carrot nose, coal eyes and buttons, and stick arms."""
    low, mid, head = b.vary(0.46, 0.06), b.vary(0.35, 0.06), b.vary(0.27, 0.05)
    y_mid = low * 0.75 + mid * 0.6
    y_head = y_mid + mid * 0.65 + head * 0.65
    b.ball((0.0, 0.0, 0.0), low, MAIN)
    b.ball((0.0, y_mid, 0.0), mid, MAIN)
    b.ball((0.0, y_head, 0.0), head, MAIN)
    brim = y_head + head * 0.72
    b.frustum((0.0, brim, 0.0), 0.05, head * 1.15, head * 1.15, SECOND, 0.03)
    b.frustum((0.0, brim + 0.17, 0.0), b.vary(0.16, 0.1), head * 0.72, head * 0.74, SECOND, 0.03)
    tip = (0.0, y_head - 0.03, head + 0.32)
    b.spike((0.0, y_head - 0.02, head * 0.85), tip, 0.085, 0.02, CARROT)
    for x in (-1, 1):
        b.ball((x * 0.105, y_head + 0.085, head * 0.86), 0.052, BLACK)
        hand = (x * (mid + 0.36), y_mid + b.vary(0.25, 0.2), 0.04)
        b.capsule((x * mid * 0.85, y_mid + 0.03, 0.0), hand, 0.045, BARK)
    for y in (-0.12, 0.1):
        b.ball((0.0, y_mid + y, math.sqrt(mid * mid - y * y) - 0.01), 0.055, BLACK)


def tree(b: Builder) -> None:
    """A fir: three stacked cones on a trunk."""
    wide = b.vary(0.58, 0.08)
    trunk = b.vary(0.15, 0.1)
    b.frustum((0.0, -0.72, 0.0), 0.24, trunk * 1.15, trunk, SECOND)
    b.frustum((0.0, -0.27, 0.0), 0.28, wide, wide * 0.35, MAIN.darker(0.84), 0.04)
    b.frustum((0.0, 0.13, 0.0), 0.28, wide * 0.82, wide * 0.25, MAIN.darker(0.92), 0.04)
    b.frustum((0.0, 0.55, 0.0), b.vary(0.32, 0.08), wide * 0.62, 0.01, MAIN, 0.03)


def cactus(b: Builder) -> None:
    """A column with two raised arms and a flower, in a pot."""
    stem = b.vary(0.19, 0.08)
    top = b.vary(0.55, 0.1)
    b.frustum((0.0, -0.72, 0.0), 0.19, 0.24, 0.33, SECOND)
    b.frustum((0.0, -0.54, 0.0), 0.065, 0.38, 0.38, SECOND, 0.03)
    b.frustum((0.0, -0.47, 0.0), 0.03, 0.31, 0.31, BARK.darker(0.8))
    b.capsule((0.0, -0.5, 0.0), (0.0, top, 0.0), stem, MAIN)
    for side, base in ((1, b.vary(0.08, 0.5)), (-1, b.vary(-0.12, 0.4))):
        elbow = (side * (stem + 0.26), base, 0.0)
        b.capsule((side * stem * 0.6, base - 0.03, 0.0), elbow, 0.105, MAIN)
        b.capsule(elbow, (elbow[0], base + b.vary(0.3, 0.15), 0.0), 0.105, MAIN)
    # Darker ribs keep the column from reading as a plain cylinder.
    for k in range(8):
        angle = math.radians(22.5 + 45.0 * k)
        x, z = stem * math.cos(angle), stem * math.sin(angle)
        b.capsule((x, -0.45, z), (x, top - 0.02, z), 0.035, MAIN.darker(0.72))
    b.ellipsoid((0.0, top + stem + 0.02, 0.0), (0.13, 0.09, 0.13), fixed(0.96, 0.35, 0.6))
    b.ball((0.0, top + stem + 0.09, 0.0), 0.06, fixed(0.98, 0.86, 0.25))


def duck(b: Builder) -> None:
    """A rubber duck: plump body, raised tail, wings, round head and flat beak."""
    length, height, width = b.vary(0.58, 0.06), b.vary(0.36, 0.08), b.vary(0.42, 0.06)
    head = b.vary(0.31, 0.06)
    b.ellipsoid((0.0, 0.0, 0.0), (width, height, length), MAIN)
    b.ellipsoid((0.0, 0.2, -length * 0.86), (0.2, 0.11, 0.34), MAIN, rotation_x(38.0))
    y, z = height * 0.75 + head * 0.75, length * 0.5
    b.ball((0.0, y, z), head, MAIN)
    b.ellipsoid((0.0, y - 0.05, z + head + 0.05), (0.19, 0.075, 0.2), SECOND)
    b.ellipsoid((0.0, y - 0.11, z + head), (0.15, 0.06, 0.15), SECOND.darker(0.8))
    for x in (-1, 1):
        b.ball((x * head * 0.52, y + 0.1, z + head * 0.76), 0.066, BLACK)
        b.ellipsoid((x * width * 0.93, 0.04, -0.08), (0.1, 0.2, 0.36), MAIN.darker(0.86), rotation_x(14.0))


def dog(b: Builder) -> None:
    """A standing puppy with floppy ears, a snout and a wagging tail."""
    body, length = b.vary(0.29, 0.06), b.vary(0.3, 0.1)
    head = b.vary(0.34, 0.06)
    b.capsule((0.0, 0.0, -length), (0.0, 0.02, length * 0.75), body, MAIN)
    y, z = body + head * 0.75, length + 0.14
    b.capsule((0.0, 0.05, length * 0.6), (0.0, y - 0.05, z - 0.02), 0.19, MAIN)
    b.ball((0.0, y, z), head, MAIN)
    b.ellipsoid((0.0, y - 0.09, z + head), (0.16, 0.13, b.vary(0.22, 0.1)), MAIN)
    b.ball((0.0, y - 0.02, z + head + 0.19), 0.075, BLACK)
    b.ellipsoid((0.0, y - 0.2, z + head + 0.1), (0.07, 0.05, 0.09), fixed(0.93, 0.42, 0.48))
    leg = b.vary(0.46, 0.1)
    for x in (-1, 1):
        b.ball((x * 0.12, y + 0.1, z + head * 0.86), 0.058, BLACK)
        ear = (x * (head + 0.02), y - 0.04, z - 0.06)
        b.ellipsoid(ear, (0.085, 0.27, 0.15), SECOND, rotation_z(x * 14.0))
        for where in (-length - 0.02, length * 0.72):
            b.capsule((x * 0.15, -0.1, where), (x * 0.17, -leg, where), 0.125, MAIN)
    b.capsule((0.0, 0.1, -length - 0.16), (0.0, 0.46, -length - 0.38), 0.075, MAIN)
