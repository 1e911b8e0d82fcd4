"""Colour-kind pairs that training never shows, and colour sampling that respects them."""

import json
from functools import cache

import numpy as np

from sds3d.toybox.colors import COLOR_NAMES
from sds3d.toybox.kinds import KIND_NAMES
from sds3d.toybox.paths import asset_path

HELD_OUT_COUNT = 26
NAMED_SECOND_FRACTION = 0.4

_FORCED = (("purple", "mug"), ("blue", "mushroom"), ("pink", "car"), ("cyan", "duck"))
# Pairs that demos lean on, or so typical that the kind would be odd without them.
_KEPT = frozenset(
    {
        ("red", "mug"),
        ("red", "apple"),
        ("red", "mushroom"),
        ("white", "snowman"),
        ("green", "tree"),
        ("green", "cactus"),
        ("pink", "donut"),
        ("brown", "dog"),
        ("brown", "table"),
        ("brown", "chair"),
        ("yellow", "duck"),
        ("red", "car"),
        ("white", "airplane"),
        ("white", "house"),
        ("gray", "robot"),
        ("pink", "ice cream"),
        ("blue", "teapot"),
        ("blue", "chair"),
        ("red", "rocket"),
        ("blue", "mug"),
        ("red", "chair"),
        ("yellow", "chair"),
    }
)


def choose_held_out() -> list[tuple[str, str]]:
    """The held-out (colour, kind) pairs: 1 or 2 per kind, 2 or 3 per colour, no randomness.

    Kinds are visited in order and take the colour used least so far; ties go to the colour that
    comes first when counting from a kind-dependent offset, which spreads the pairs.
    """
    chosen = list(_FORCED)
    taken = {kind for _, kind in _FORCED}
    queue = [kind for kind in KIND_NAMES if kind not in taken] + list(KIND_NAMES)
    for kind in queue:
        if len(chosen) == HELD_OUT_COUNT:
            break
        offset = 5 * KIND_NAMES.index(kind)
        order = [COLOR_NAMES[(offset + k) % len(COLOR_NAMES)] for k in range(len(COLOR_NAMES))]
        free = [c for c in order if (c, kind) not in _KEPT and (c, kind) not in chosen]
        chosen.append((min(free, key=lambda c: sum(c == used for used, _ in chosen)), kind))
    return sorted(chosen)


@cache
def held_out_pairs() -> frozenset[tuple[str, str]]:
    """The held-out (colour, kind) pairs stored with the package."""
    pairs = json.loads(asset_path("held_out.json").read_text(encoding="utf-8"))
    return frozenset((color, kind) for color, kind in pairs)


def sample_colors(
    rng: np.random.Generator, kind: str, include_held_out: bool = False
) -> tuple[str, str | None]:
    """A (main, second) pair of colour names for a training toy.

    The main colour never forms a held-out pair with the kind unless ``include_held_out`` is set.
    ``second`` is a named colour other than the main one 40 % of the time, otherwise None: the
    kind's default second colour.
    """
    allowed = [c for c in COLOR_NAMES if include_held_out or (c, kind) not in held_out_pairs()]
    main = allowed[int(rng.integers(len(allowed)))]
    if rng.random() >= NAMED_SECOND_FRACTION:
        return main, None
    others = [color for color in COLOR_NAMES if color != main]
    return main, others[int(rng.integers(len(others)))]
