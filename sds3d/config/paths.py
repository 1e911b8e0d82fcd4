"""Which settings of a config name files or folders."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from sds3d.config.option import Chosen

Key = tuple[str | int, ...]


def paths_in(config: Any, key: Key = ()) -> Iterator[tuple[Key, str]]:
    """(key, text) of every setting that may name a file; keys index into what `to_plain` makes of the config."""
    if isinstance(config, Chosen):
        yield from paths_in(config.config, key)
    elif isinstance(config, Mapping):
        for name, value in config.items():
            yield from paths_in(value, (*key, str(name)))
    elif isinstance(config, tuple):
        for index, value in enumerate(config):
            yield from paths_in(value, (*key, index))
    elif is_dataclass(config):
        for spec in fields(config):
            value, here = getattr(config, spec.name), (*key, spec.name)
            if spec.metadata.get("path"):
                yield from _texts(value, here)
            elif not isinstance(value, (str, int, float)):
                yield from paths_in(value, here)


def _texts(value: Any, key: Key) -> Iterator[tuple[Key, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, tuple):
        yield from (((*key, index), text) for index, text in enumerate(value))


def dotted(key: Key) -> str:
    """A key as messages name it, e.g. prior.loras[0].path."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key)
    return text.removeprefix(".")
