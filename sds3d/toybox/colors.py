"""The twelve named colours of the toybox."""

import numpy as np
from numpy.typing import NDArray

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.09, 0.10),
    "orange": (0.97, 0.50, 0.06),
    "yellow": (0.96, 0.86, 0.12),
    "green": (0.12, 0.62, 0.18),
    "blue": (0.10, 0.24, 0.86),
    "purple": (0.49, 0.14, 0.70),
    "pink": (0.97, 0.52, 0.74),
    "brown": (0.44, 0.25, 0.11),
    "white": (0.93, 0.93, 0.93),
    "black": (0.08, 0.08, 0.08),
    "gray": (0.50, 0.50, 0.50),
    "cyan": (0.14, 0.80, 0.86),
}
COLOR_NAMES: tuple[str, ...] = tuple(COLORS)

COLOR_SYNONYMS: dict[str, str] = {
    "crimson": "red",
    "scarlet": "red",
    "golden": "yellow",
    "navy": "blue",
    "violet": "purple",
    "grey": "gray",
    "turquoise": "cyan",
    "rosy": "pink",
}

JITTER = 0.04
_NEUTRAL = frozenset({"white", "black", "gray"})


def sample_rgb(rng: np.random.Generator, name: str) -> NDArray[np.float32]:
    """One sRGB instance (3,) of a named colour, components in [0, 1].

    Neutral colours are jittered in brightness only, so that a gray never looks tinted.
    """
    count = 1 if name in _NEUTRAL else 3
    rgb = np.array(COLORS[name]) + rng.uniform(-JITTER, JITTER, count)
    return np.clip(rgb, 0.0, 1.0).astype(np.float32)


def canonical_color(word: str) -> str:
    """The colour name that ``word`` (a name or a synonym) stands for; KeyError if none."""
    if word in COLORS:
        return word
    return COLOR_SYNONYMS[word]
