"""YAML text as a small tree of nodes that remember where they stand.

Only data is read: no tags, no objects. Plain scalars follow YAML 1.2, with `1e-3` a float: `yes`, `on` and
`12:30:00` are text, `010` is ten.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from sds3d.errors import ConfigError

MAX_FILE_BYTES = 1_000_000
_MAX_NODES = 5_000  # aliases can multiply a small file into a huge tree
_INT = re.compile(r"[-+]?[0-9]{1,18}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_PLAIN_TAGS = {
    f"tag:yaml.org,2002:{name}"
    for name in ("null", "bool", "int", "float", "str", "timestamp", "value", "merge", "map", "seq")
}
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(["", "~", "null", "Null", "NULL"]),
    **dict.fromkeys(["true", "True", "TRUE"], True),
    **dict.fromkeys(["false", "False", "FALSE"], False),
}


@dataclass(frozen=True)
class Origin:
    """Where a value was written: a file and line, or a source such as "command line"."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Leaf:
    """A scalar; `quoted` text is never read as a number, a boolean or null."""

    text: str
    quoted: bool
    origin: Origin

    @property
    def value(self) -> bool | int | float | str | None:
        """The scalar as YAML 1.2 data."""
        if self.quoted:
            return self.text
        if self.text in _WORDS:
            return _WORDS[self.text]
        if _INT.fullmatch(self.text):
            return int(self.text)
        return float(self.text) if _FLOAT.fullmatch(self.text) else self.text


@dataclass(frozen=True)
class Items:
    """A sequence."""

    nodes: tuple["Node", ...]
    origin: Origin


@dataclass(frozen=True)
class Table:
    """A mapping with text keys; `key_origins` says where each key stands."""

    entries: dict[str, "Node"]
    origin: Origin
    key_origins: dict[str, Origin]


Node = Leaf | Items | Table


def plain(node: Node) -> Any:
    """The data of a tree: mappings, lists and scalars."""
    if isinstance(node, Table):
        return {key: plain(entry) for key, entry in node.entries.items()}
    return [plain(entry) for entry in node.nodes] if isinstance(node, Items) else node.value


def fail(origin: Origin, path: str, message: str) -> NoReturn:
    """Raise ConfigError as `file:line: key: message`."""
    raise ConfigError(": ".join(part for part in (str(origin), path, message) if part))


def suggest(word: str, known: Iterable[str]) -> str:
    """A sentence that starts with a space and names the closest known word, or nothing when none is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def parse(text: str, source: str, *, lines: bool = True, max_nodes: int = _MAX_NODES) -> Node:
    """Parse one YAML document; raises ConfigError with the line of the fault."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        origin = Origin(source, mark.line + 1 if lines and mark else None)
        fail(origin, "", f"not valid YAML: {error.problem or error.context}.")
    except (yaml.YAMLError, RecursionError) as error:
        fail(Origin(source), "", f"not valid YAML: {error}.")
    if root is None:
        return Leaf("", False, Origin(source, 1 if lines else None))
    return _Builder(source, lines, max_nodes).build(root, ())


class _Builder:
    """Turns PyYAML's node graph into our tree, refusing what a config must not contain."""

    def __init__(self, source: str, lines: bool, max_nodes: int) -> None:
        self.source, self.lines, self.max_nodes, self.count = source, lines, max_nodes, 0

    def origin(self, node: yaml.Node) -> Origin:
        return Origin(self.source, node.start_mark.line + 1 if self.lines else None)

    def build(self, node: yaml.Node, parents: tuple[int, ...]) -> Node:
        origin = self.origin(node)
        self.count += 1
        if id(node) in parents:
            fail(origin, "", "an alias may not contain itself.")
        if self.count > self.max_nodes or len(parents) > 64:
            fail(
                origin, "", f"too large or too deep for a config (limit {self.max_nodes} values, 64 levels)."
            )
        within = (*parents, id(node))
        if node.tag not in _PLAIN_TAGS:
            fail(origin, "", f"the tag {node.tag!r} is not allowed; configs hold plain data.")
        if isinstance(node, yaml.MappingNode):
            return self.table(node, origin, within)
        if isinstance(node, yaml.SequenceNode):
            return Items(tuple(self.build(child, within) for child in node.value), origin)
        return Leaf(node.value, node.style is not None, origin)

    def table(self, node: yaml.MappingNode, origin: Origin, within: tuple[int, ...]) -> Table:
        entries: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        origins: dict[str, Origin] = {}
        for key_node, value_node in node.value:
            where = self.origin(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                fail(where, "", "a key must be a plain word.")
            key = key_node.value
            if key in entries:
                fail(where, key, f"written twice (first at {origins[key]}); keep one.")
            value = self.build(value_node, within)
            if key == "<<" and key_node.style is None:
                for base in value.nodes if isinstance(value, Items) else (value,):
                    if not isinstance(base, Table):
                        fail(where, "<<", "expected a mapping to merge.")
                    merged = {**base.entries, **merged}
                    origins = {**base.key_origins, **origins}
                continue
            entries[key] = value
            origins[key] = where
        return Table({**merged, **entries}, origin, origins)


def read_text(path: Path, what: str = "config", max_bytes: int = MAX_FILE_BYTES) -> str:
    """The text of a file that people write; raises ConfigError where it is none, or too large to be one."""
    try:
        if path.stat().st_size > max_bytes:
            raise ConfigError(f"{path}: larger than {max_bytes} bytes, so not a {what}.")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this {what}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    except ValueError as error:  # a zero byte in the name
        raise ConfigError(f"{str(path)!r}: not the name of a {what}: {error}.") from error


def read_table(path: Path) -> Table:
    """The top-level mapping of a YAML file; raises ConfigError for anything that is not one."""
    source = str(path)
    root = parse(read_text(path), source)
    if isinstance(root, Leaf) and root.value is None:
        return Table({}, root.origin, {})
    if not isinstance(root, Table):
        fail(root.origin, "", "expected `key: value` lines at the top level.")
    return root
