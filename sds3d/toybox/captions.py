"""The caption grammar of the toybox and the closed vocabulary that it uses."""

import re

import numpy as np

from sds3d.toybox.colors import COLOR_NAMES, COLOR_SYNONYMS
from sds3d.toybox.kinds import KINDS, Kind
from sds3d.toybox.views import VIEW_WORDS

CANONICAL_FRACTION = 0.6
SYNONYM_FRACTION = 0.25  # of the non-canonical captions, for colour and kind each

_TEMPLATES = (
    "{color} {kind}{part}",
    "a photo of {a} {color} {kind}{part}",
    "a picture of {a} {color} {kind}{part}",
    "a 3d render of {a} {color} {kind}{part}",
    "a 3d model of {a} {color} {kind}{part}",
    "a {color} toy {kind}{part}",
    "a toy {kind} that is {color}{part}",
    "the {color} {kind}{part}",
    "{a} {color} {kind}{and_part}",
    "{a} {color} {kind} on a plain background",
)
_NO_PART = "{a} {color} {kind} on a plain background"
_EXTRA_WORDS = ("an", "and", "with", "of", "the", "toy", "small", "big", "cute", "in", "object")

_WORD = re.compile(r"[a-z0-9]+")


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _pick(rng: np.random.Generator, words: list[str]) -> str:
    return words[int(rng.integers(len(words)))]


def _swap(rng: np.random.Generator, word: str, synonyms: list[str]) -> str:
    """``word`` or, SYNONYM_FRACTION of the time, one of its synonyms if it has any."""
    if synonyms and rng.random() < SYNONYM_FRACTION:
        return _pick(rng, synonyms)
    return word


def _part_phrase(kind: Kind, second: str | None, joiner: str) -> str:
    """Such as " with a blue handle" or " with yellow legs"; empty without a second colour."""
    if second is None:
        return ""
    article = "" if kind.plural_part else _article(second) + " "
    return f" {joiner} {article}{second} {kind.part}"


def short_caption(kind: str, main: str, second: str | None = None) -> str:
    """The canonical caption: "a red mug" or "a red mug with a blue handle"."""
    return f"{_article(main)} {main} {kind}" + _part_phrase(KINDS[kind], second, "with")


def caption(rng: np.random.Generator, kind: str, main: str, second: str | None, view: str | None) -> str:
    """A random caption, in canonical form CANONICAL_FRACTION of the time.

    ``kind``, ``main`` and ``second`` are canonical names; ``view`` is one of ``VIEW_WORDS`` and
    becomes a suffix such as ", front view". A named second colour is always mentioned.
    """
    if rng.random() < CANONICAL_FRACTION:
        text = short_caption(kind, main, second)
    else:
        entry = KINDS[kind]
        color = _swap(rng, main, [w for w, name in COLOR_SYNONYMS.items() if name == main])
        noun = _swap(rng, kind, list(entry.synonyms))
        templates = [t for t in _TEMPLATES if second is None or t != _NO_PART]
        text = _pick(rng, templates).format(
            a=_article(color),
            color=color,
            kind=noun,
            part=_part_phrase(entry, second, "with"),
            and_part=_part_phrase(entry, second, "and"),
        )
        text = re.sub(r"\ba (?=[aeiou])", "an ", text)
    return text if view is None else f"{text}, {view}"


def _build_vocabulary() -> tuple[str, ...]:
    words: set[str] = {"a", *COLOR_NAMES, *COLOR_SYNONYMS, *_EXTRA_WORDS}
    for template in _TEMPLATES:
        words.update(_WORD.findall(re.sub(r"\{.*?\}", " ", template)))
    for phrase in VIEW_WORDS:
        words.update(phrase.split())
    for kind in KINDS.values():
        words.update(kind.name.split(), kind.part.split(), *(s.split() for s in kind.synonyms))
    return tuple(sorted(words))


VOCABULARY: tuple[str, ...] = _build_vocabulary()


def split_words(text: str) -> list[str]:
    """Lower-case words of a text, punctuation dropped."""
    return _WORD.findall(text.lower())
