"""The twenty kinds of toys and what the rest of the program needs to know about them."""

from collections.abc import Callable
from dataclasses import dataclass

from sds3d.toybox import models_machines as machines
from sds3d.toybox import models_nature as nature
from sds3d.toybox import models_objects as objects
from sds3d.toybox.shapes import Builder


@dataclass(frozen=True)
class Kind:
    """One kind of toy.

    ``default_second`` is the colour name of the second part when a caption does not name one
    (None: the main colour). ``has_front`` tells whether the azimuth can be read off an image.
    """

    name: str
    build: Callable[[Builder], None]
    part: str
    default_second: str | None
    has_front: bool
    synonyms: tuple[str, ...] = ()
    plural_part: bool = False


_ALL = (
    Kind("mug", objects.mug, "handle", None, True, ("cup",)),
    Kind("teapot", objects.teapot, "lid", None, True, ("kettle",)),
    Kind("chair", objects.chair, "legs", None, True, plural_part=True),
    Kind("table", objects.table, "legs", None, False, ("desk",), plural_part=True),
    Kind("lamp", objects.lamp, "base", "gray", False),
    Kind("apple", nature.apple, "leaf", "green", False),
    Kind("mushroom", nature.mushroom, "stem", "white", False, ("toadstool",)),
    Kind("snowman", nature.snowman, "hat", "black", True),
    Kind("house", objects.house, "roof", "brown", True, ("cottage",)),
    Kind("tree", nature.tree, "trunk", "brown", False),
    Kind("cactus", nature.cactus, "pot", "brown", False),
    Kind("car", machines.car, "wheels", "black", True, ("automobile",), plural_part=True),
    Kind("rocket", machines.rocket, "fins", "red", True, ("spaceship",), plural_part=True),
    Kind("boat", machines.boat, "sail", "white", True, ("ship", "sailboat")),
    Kind("airplane", machines.airplane, "wings", None, True, ("plane",), plural_part=True),
    Kind("donut", objects.donut, "base", "brown", False, ("doughnut",)),
    Kind("ice cream", objects.ice_cream, "cone", "brown", False),
    Kind("duck", nature.duck, "beak", "orange", True, ("duckling",)),
    Kind("dog", nature.dog, "ears", "brown", True, ("puppy",), plural_part=True),
    Kind("robot", machines.robot, "head", "gray", True, ("android",)),
)

KINDS: dict[str, Kind] = {kind.name: kind for kind in _ALL}
KIND_NAMES: tuple[str, ...] = tuple(KINDS)
KIND_INDEX: dict[str, int] = {name: index for index, name in enumerate(KIND_NAMES)}
KIND_SYNONYMS: dict[str, str] = {word: kind.name for kind in _ALL for word in kind.synonyms}


def canonical_kind(word: str) -> str:
    """The kind name that ``word`` (a name or a synonym) stands for; KeyError if none."""
    return word if word in KINDS else KIND_SYNONYMS[word]
