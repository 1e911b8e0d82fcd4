"""Household toys: mug, teapot, chair, table, lamp, donut, ice cream, house."""

import math

from sds3d.toybox.shapes import MAIN, SECOND, Builder, fixed, rotation_x

GLASS = fixed(0.62, 0.85, 0.96)
WOOD = fixed(0.42, 0.25, 0.13)


def mug(b: Builder) -> None:
    """A hollow cylinder with a round handle at +x."""
    radius, height = b.vary(0.47), b.vary(0.52, 0.1)
    handle = b.vary(0.27, 0.1)
    b.torus((radius + 0.08, 0.0, 0.0), handle, 0.085, SECOND, rotation_x(90.0))
    b.frustum((0.0, 0.0, 0.0), height, radius * b.vary(0.93, 0.06), radius, MAIN, 0.04)
    b.frustum((0.0, 0.12, 0.0), height, radius - 0.1, radius - 0.09, MAIN.darker(0.78), cut=True)


def teapot(b: Builder) -> None:
    """A round pot with its spout at +x, its handle at -x and a lid with a knob."""
    radius, height = b.vary(0.58, 0.06), b.vary(0.48, 0.1)
    b.torus((-radius - 0.06, 0.03, 0.0), b.vary(0.24), 0.075, MAIN, rotation_x(90.0))
    b.ellipsoid((0.0, 0.0, 0.0), (radius, height, radius), MAIN)
    b.frustum((0.0, -height + 0.03, 0.0), 0.07, radius * 0.62, radius * 0.55, MAIN.darker(0.9))
    tip = radius + b.vary(0.36, 0.1)
    b.spike((radius * 0.6, -0.14, 0.0), (tip - 0.08, 0.16, 0.0), 0.17, 0.09, MAIN)
    b.spike((tip - 0.13, 0.1, 0.0), (tip, 0.36, 0.0), 0.1, 0.075, MAIN)
    b.ellipsoid((0.0, height * 0.78, 0.0), (radius * 0.62, 0.15, radius * 0.62), SECOND)
    b.ball((0.0, height * 0.78 + 0.2, 0.0), 0.1, SECOND)


def chair(b: Builder) -> None:
    """A seat on four legs with a slotted backrest on the far (-z) side."""
    width, depth = b.vary(0.48), b.vary(0.45, 0.08)
    back = b.vary(0.48, 0.12)
    b.box((0.0, back, -depth + 0.08), (width, back, 0.08), MAIN, 0.06)
    b.box((0.0, back * 1.28, -depth), (width * 0.55, back * 0.22, 0.3), MAIN.darker(0.8), 0.05, cut=True)
    b.box((0.0, -0.01, 0.0), (width, 0.11, depth), MAIN, 0.05)
    length = b.vary(0.27, 0.12)
    for x in (-1, 1):
        for z in (-1, 1):
            foot = (x * (width - 0.08), -0.05 - 2.0 * length, z * (depth - 0.08))
            b.spike(foot, (foot[0], -0.02, foot[2]), 0.08, 0.1, SECOND)


def table(b: Builder) -> None:
    """A thick rectangular top with an apron on four legs."""
    width, depth = b.vary(0.78, 0.1), b.vary(0.52, 0.1)
    b.box((0.0, 0.0, 0.0), (width, 0.085, depth), MAIN, 0.04)
    b.box((0.0, -0.17, 0.0), (width - 0.06, 0.15, depth - 0.06), MAIN.darker(0.86), 0.02)
    length = b.vary(0.28, 0.12)
    for x in (-1, 1):
        for z in (-1, 1):
            foot = (x * (width - 0.14), -0.2 - 2.0 * length, z * (depth - 0.14))
            b.spike(foot, (foot[0], -0.1, foot[2]), 0.07, 0.095, SECOND)


def lamp(b: Builder) -> None:
    """A table lamp: round foot, pole, and an open shade around a glowing bulb."""
    low, high = b.vary(0.56, 0.1), b.vary(0.32, 0.1)
    half = b.vary(0.34, 0.1)
    b.frustum((0.0, 0.35, 0.0), half, low, high, MAIN, 0.02)
    b.frustum((0.0, 0.35, 0.0), half + 0.02, low - 0.07, high - 0.07, MAIN.darker(0.85), 0.0, cut=True)
    b.ball((0.0, 0.38, 0.0), 0.17, fixed(1.0, 0.94, 0.62))
    b.frustum((0.0, -0.25, 0.0), 0.52, 0.075, 0.065, SECOND)
    foot = b.vary(0.34, 0.1)
    b.frustum((0.0, -0.78, 0.0), 0.08, foot, foot * 0.8, SECOND, 0.04)
    b.ball((0.0, -0.45, 0.0), b.vary(0.13), SECOND)


def donut(b: Builder) -> None:
    """A ring of dough with icing on top and sprinkles on the icing."""
    ring, tube = b.vary(0.56, 0.06), b.vary(0.27, 0.08)
    b.torus((0.0, -0.07, 0.0), ring, tube * 0.92, SECOND)
    b.torus((0.0, 0.02, 0.0), ring, tube, MAIN)
    sprinkles = ((0.98, 0.85, 0.2), (0.3, 0.8, 0.95), (0.95, 0.3, 0.4), (0.97, 0.97, 0.97))
    start = float(b.rng.uniform(0.0, 2.0 * math.pi))
    for k in range(11):
        angle = start + k * 2.0 * math.pi / 11.0
        outward = (0.0, 0.55, -0.5)[k % 3] + float(b.rng.uniform(-0.1, 0.1))
        reach = ring + tube * math.sin(outward)
        x, z = reach * math.cos(angle), reach * math.sin(angle)
        y = 0.02 + tube * math.cos(outward)
        turn = float(b.rng.uniform(0.0, math.pi))
        step = (0.05 * math.cos(turn), 0.0, 0.05 * math.sin(turn))
        low, high = (x - step[0], y, z - step[2]), (x + step[0], y, z + step[2])
        b.capsule(low, high, 0.035, fixed(*sprinkles[k % 4]))


def ice_cream(b: Builder) -> None:
    """Two scoops with a cherry in a waffle cone."""
    scoop = b.vary(0.43, 0.06)
    small = scoop * b.vary(0.76, 0.06)
    tip = -b.vary(0.86, 0.08)
    rim = scoop * 0.86
    b.spike((0.0, tip, 0.0), (0.0, -0.02, 0.0), 0.07, rim, SECOND, 0.03)
    for share in (0.42, 0.72):
        b.torus(
            (0.0, tip * (1.0 - share), 0.0), 0.07 + (rim - 0.07) * share - 0.02, 0.045, SECOND.darker(0.8)
        )
    b.torus((0.0, 0.0, 0.0), scoop * 0.8, 0.115, MAIN)
    b.ball((0.0, scoop * 0.42, 0.0), scoop, MAIN)
    top = scoop * 0.42 + scoop * 0.72 + small * 0.4
    b.torus((0.0, top - small * 0.48, 0.0), small * 0.78, 0.085, MAIN)
    b.ball((0.0, top, 0.0), small, MAIN)
    b.ball((0.0, top + small + 0.06, 0.0), 0.12, fixed(0.86, 0.06, 0.12))


def house(b: Builder) -> None:
    """Walls under a gabled roof, with a front door, windows and a chimney."""
    width, depth, wall = b.vary(0.56, 0.1), b.vary(0.48, 0.1), b.vary(0.46, 0.08)
    rise = b.vary(0.19, 0.12)
    b.box((0.0, 0.0, 0.0), (width, wall, depth), MAIN, 0.01)
    eave = width + 0.1
    b.wedge((0.0, wall + rise, 0.0), eave, 0.03, rise, depth + 0.04, SECOND, 0.02)
    # The gable pokes out of the roof prism, so the triangle above the door keeps the wall colour.
    gable = rise * 0.8
    b.wedge((0.0, wall + gable - 0.02, 0.0), eave * 0.8, 0.01, gable, depth + 0.055, MAIN, 0.0)
    b.box((width * 0.5, wall + rise * 1.4, -depth * 0.35), (0.1, rise * 0.9, 0.1), MAIN.darker(0.8), 0.01)
    b.box((0.0, -wall + 0.25, depth), (0.15, 0.25, 0.05), WOOD, 0.02)
    b.ball((0.085, -wall + 0.25, depth + 0.05), 0.035, fixed(0.95, 0.8, 0.25))
    level = wall * 0.15
    for x in (-1, 1):
        b.box((x * width * 0.62, level, depth), (0.125, 0.135, 0.03), fixed(0.95, 0.95, 0.95), 0.01)
        b.box((x * width * 0.62, level, depth), (0.085, 0.095, 0.045), GLASS, 0.01)
        b.box((x * width, level, 0.0), (0.03, 0.135, 0.135), fixed(0.95, 0.95, 0.95), 0.01)
        b.box((x * width, level, 0.0), (0.045, 0.095, 0.095), GLASS, 0.01)
    b.box((0.0, level, -depth), (0.17, 0.135, 0.03), fixed(0.95, 0.95, 0.95), 0.01)
    b.box((0.0, level, -depth), (0.13, 0.095, 0.045), GLASS, 0.01)
