"""From YAML files and `key=value` overrides to one frozen dataclass, strictly.

A config is a stack of layers, the base first. Later layers win key by key; where a layer changes the `kind`
of a part, the earlier settings of that part are dropped, because they belong to another class. Every error
reads `file:line: key: got ..., expected ...`.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from sds3d.config.read import Reader
from sds3d.config.tree import Leaf, Node, Origin, Table, fail, parse, read_table, suggest
from sds3d.errors import ConfigError
from sds3d.paths import data_dir

SCHEMA = 1
T = TypeVar("T")
_KEY = r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*"
_OVERRIDE = re.compile(rf"({_KEY})=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Resolved(Generic[T]):
    """A finished config and, by dotted key, where each stated value came from (the rest are defaults)."""

    config: T
    origins: dict[str, Origin]

    def origin(self, key: str) -> str:
        """`file:line`, "command line", or "default"."""
        return str(self.origins.get(key, "default"))


def resolve(schema: type[T], layers: Sequence[Table]) -> Resolved[T]:
    """Build `schema` from layers, the base first. Raises ConfigError at the first fault."""
    reader = Reader()
    config = reader.read(schema, list(layers), "")
    return Resolved(config, reader.origins)


def config_names() -> list[str]:
    """Names of the shipped configs, usable as `--config NAME` and `extends: NAME`, e.g. "default", "toybox/ism"."""
    folder = data_dir("configs")
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]
    return sorted(names, key=lambda name: ("/" in name, name))


def find_config(name: str, beside: Path | None = None) -> Path:
    """The file behind a name ("default", "toybox/ism") or path ("my/ship.yaml", relative to `beside`)."""
    if name.endswith((".yaml", ".yml")):
        return (beside or Path()) / name
    path = data_dir("configs") / f"{name}.yaml"
    if name not in config_names():
        known = config_names()
        raise ConfigError(
            f"unknown config {name!r}.{suggest(name, known)} Known: {', '.join(known) or 'none'}."
        )
    return path


def file_layers(path: Path, check: Callable[[Path], object] | None = None) -> list[Table]:
    """A config file and the bases it extends, the deepest base first; `check` may refuse a file before it is read."""
    layers: list[Table] = []
    seen: list[Path] = []
    following: Path | None = path
    while following is not None:
        current = following
        if check is not None:
            check(current)
        table = read_table(current)
        seen.append(current.resolve())
        entries = dict(table.entries)
        _check_schema(entries.pop("schema", None))
        base = entries.pop("extends", None)
        layers.insert(0, Table(entries, table.origin, table.key_origins))
        following = _base_path(base, current) if base is not None else None
        if following is not None and base is not None and following.resolve() in seen:
            fail(base.origin, "extends", f"{following} extends itself, directly or through its bases.")
    return layers


def _check_schema(node: Node | None) -> None:
    if node is not None and not (isinstance(node, Leaf) and node.value == SCHEMA):
        got = node.text if isinstance(node, Leaf) else "a list or mapping"
        fail(node.origin, "schema", f"got {got}, this version of sds3d reads schema {SCHEMA}.")


def _base_path(node: Node, current: Path) -> Path:
    name = node.value if isinstance(node, Leaf) else None
    if not isinstance(name, str):
        fail(node.origin, "extends", "expected exactly one config name or file.")
    try:
        path = find_config(name, beside=current.parent)
    except ConfigError as error:
        fail(node.origin, "extends", str(error))
    if not path.is_file():
        fail(node.origin, "extends", f"no such file: {path}.")
    return path


def is_override(text: str) -> bool:
    """Whether a command-line word has the form `key.sub=value`."""
    return _OVERRIDE.fullmatch(text) is not None


def override_layers(words: Iterable[str], source: str = "command line") -> list[Table]:
    """One layer for each `key.sub=value`; the value is read as YAML."""
    layers = []
    for word in words:
        match = _OVERRIDE.fullmatch(word)
        if match is None:
            raise ConfigError(f"{source}: got {word!r}, expected key=value, e.g. guidance.cfg_scale=7.5")
        key, text = match.groups()
        try:
            node = parse(text, source, lines=False)
        except ConfigError as error:
            raise ConfigError(f"{error} In {word!r}; quote the value.") from error
        layers.append(nested(key, node))
    return layers


def setting(key: str, value: str | int | float, source: str) -> Table:
    """A layer that sets one dotted key to a Python value, e.g. from `--seed 3`."""
    return nested(key, Leaf(str(value), isinstance(value, str), Origin(source)))


def nested(key: str, node: Node) -> Table:
    """The layer in which the dotted `key` holds `node`."""
    for part in reversed(key.split(".")):
        node = Table({part: node}, node.origin, {part: node.origin})
    assert isinstance(node, Table)
    return node
