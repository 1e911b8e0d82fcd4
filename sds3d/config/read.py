"""Layers of nodes to typed values: one short method for each type a Config field may have.

Types: bool, int, float, str, Literal, tuple, X | None, Mapping[str, X], Ramp, dataclasses, `Chosen`.
"""

import math
import types
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Mapping as AbstractMapping
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sds3d.config.option import Chosen, config_class, default_of
from sds3d.config.ramp import Ramp, RampShape
from sds3d.config.tree import Items, Leaf, Node, Origin, Table, fail, suggest
from sds3d.errors import ConfigError

_RAMP_HINTS: dict[str, Any] = {
    "from": float,
    "to": float,
    "over_frac": tuple[float, float],
    "over_steps": tuple[int, int],
    "shape": RampShape,
}
_RAMP_EXPECTED = "a number or {from, to, over_frac or over_steps, shape}"
Limits = Mapping[str, Any]
_NO_LIMITS: Limits = types.MappingProxyType({})


class Reader:
    """Reads one config and records the origin of every stated value."""

    def __init__(self) -> None:
        self.origins: dict[str, Origin] = {}

    def read(
        self,
        hint: Any,
        layers: list[Any],
        path: str,
        base: Any = MISSING,
        limits: Limits = _NO_LIMITS,
    ) -> Any:
        """The value of type `hint` that the layers (base first) describe on top of the default `base`."""
        if get_origin(hint) in (Union, types.UnionType):
            return self._optional(hint, layers, path, base, limits)
        if hint is Chosen:
            return self._chosen(layers, path, base, limits["kinds"]())
        if hint is Ramp:
            return self._ramp(layers, path, base, limits)
        if is_dataclass(hint):
            return self._dataclass(hint, layers, path, base)
        if get_origin(hint) in (dict, Mapping, AbstractMapping):
            return self._mapping(get_args(hint)[1], layers, path, base, limits)
        last: Node = layers[-1]
        self.origins[path] = last.origin
        if get_origin(hint) is Literal:
            return _literal(get_args(hint), last, path)
        if get_origin(hint) is tuple:
            return self._tuple(get_args(hint), last, path, limits)
        return _in_range(_scalar(hint, last, path), last.origin, path, limits)

    def _optional(self, hint: Any, layers: list[Any], path: str, base: Any, limits: Limits) -> Any:
        members = [member for member in get_args(hint) if member is not type(None)]
        if len(members) != 1:
            raise TypeError(f"{path}: config fields may be X or X | None, not {hint}")
        nulls = [index for index, node in enumerate(layers) if isinstance(node, Leaf) and node.value is None]
        rest = layers[nulls[-1] + 1 :] if nulls else layers
        if not rest:
            self.origins[path] = layers[-1].origin
            return None
        return self.read(members[0], rest, path, MISSING if nulls or base is None else base, limits)

    def _dataclass(
        self, hint: Any, layers: list[Any], path: str, base: Any, label: str = "", where: Origin | None = None
    ) -> Any:
        where = layers[-1].origin if layers else where or Origin("defaults")
        for layer in layers:
            if not isinstance(layer, Table):
                fail(layer.origin, path, f"got {show(layer)}, expected `key: value` settings.")
        specs = {spec.name: spec for spec in fields(hint) if spec.init}
        _refuse_unknown(layers, list(specs), path, label)
        hints = get_type_hints(hint)
        given: dict[str, Any] = {}
        for name, spec in specs.items():
            stated = [layer.entries[name] for layer in layers if name in layer.entries]
            key = f"{path}.{name}" if path else name
            fallback = getattr(base, name) if isinstance(base, hint) else default_of(spec)
            if stated:
                given[name] = self.read(hints[name], stated, key, fallback, spec.metadata)
            elif fallback is MISSING:
                fail(where, key, "required, but not given.")
        return _construct(hint, given, base, where, path)

    def _chosen(self, layers: list[Any], path: str, base: Any, table: Mapping[str, type]) -> Chosen:
        kind = base.kind if isinstance(base, Chosen) else None
        kept: list[Table] = []
        where = layers[-1].origin
        for layer in layers:
            named = layer if isinstance(layer, Leaf) else getattr(layer, "entries", {}).get("kind")
            if named is not None:  # `scene: voxel` is short for `scene: {kind: voxel}`
                found = _literal(tuple(table), named, f"{path}.kind")
                where = self.origins[f"{path}.kind"] = named.origin
                kept, kind = (kept, kind) if found == kind else ([], found)
            if isinstance(layer, Items):
                fail(layer.origin, path, f"got {show(layer)}, expected a kind or `kind:` with settings.")
            if isinstance(layer, Table):
                kept.append(_without(layer, "kind"))
        if kind is None:
            fail(where, f"{path}.kind", f"required, but not given. Known: {', '.join(table)}.")
        start = base.config if isinstance(base, Chosen) and base.kind == kind else MISSING
        return Chosen(kind, self._dataclass(config_class(table[kind]), kept, path, start, kind, where))

    def _mapping(self, hint: Any, layers: list[Any], path: str, base: Any, limits: Limits) -> dict[str, Any]:
        result = dict(base) if isinstance(base, Mapping) else {}
        for layer in layers:
            if not isinstance(layer, Table):
                fail(layer.origin, path, f"got {show(layer)}, expected `name: value` lines.")
        for name in dict.fromkeys(name for layer in layers for name in layer.entries):
            stated = [layer.entries[name] for layer in layers if name in layer.entries]
            result[name] = self.read(hint, stated, f"{path}.{name}", result.get(name, MISSING), limits)
        return result

    def _tuple(self, members: tuple[Any, ...], node: Node, path: str, limits: Limits) -> tuple[Any, ...]:
        open_ended = len(members) == 2 and members[1] is Ellipsis
        if not isinstance(node, Items) or not (open_ended or len(node.nodes) == len(members)):
            names = f"a list of {members[0].__name__}" if open_ended else f"a list of {len(members)} values"
            fail(node.origin, path, f"got {show(node)}, expected {names}.")
        hints = [members[0]] * len(node.nodes) if open_ended else members
        pairs = enumerate(zip(hints, node.nodes, strict=True))
        values = [self.read(h, [n], f"{path}[{i}]", MISSING, limits) for i, (h, n) in pairs]
        self.origins = {key: origin for key, origin in self.origins.items() if not key.startswith(f"{path}[")}
        return tuple(values)

    def _ramp(self, layers: list[Any], path: str, base: Any, limits: Limits) -> Ramp:
        parts: dict[str, Any] = _ramp_parts(base) if isinstance(base, Ramp) else {}
        for layer in layers:
            self.origins[path] = layer.origin
            if isinstance(layer, Leaf):
                value = _in_range(_scalar(float, layer, path, _RAMP_EXPECTED), layer.origin, path, limits)
                parts = {"from": value, "to": value}
            elif isinstance(layer, Table):
                _refuse_unknown([layer], list(_RAMP_HINTS), path, "ramp")
                if "over_steps" in layer.entries and "over_frac" in layer.entries:
                    fail(layer.origin, path, "give over_frac or over_steps, not both.")
                for given, other in (("over_steps", "over_frac"), ("over_frac", "over_steps")):
                    if given in layer.entries:
                        parts.pop(other, None)
                for name, node in layer.entries.items():
                    ends = limits if name in ("from", "to") else _NO_LIMITS
                    parts[name] = self.read(_RAMP_HINTS[name], [node], f"{path}.{name}", MISSING, ends)
            else:
                fail(layer.origin, path, f"got {show(layer)}, expected {_RAMP_EXPECTED}.")
        return _build_ramp(parts, layers[-1].origin, path)


def _build_ramp(parts: dict[str, Any], origin: Origin, path: str) -> Ramp:
    if "from" not in parts or "to" not in parts:
        fail(origin, path, "a ramp needs both from and to.")
    first, last = parts.get("over_steps") or parts.get("over_frac") or (0.0, 1.0)
    if first > last or first < 0:
        fail(origin, path, f"got an interval from {first} to {last}, expected 0 <= first <= last.")
    if parts.get("shape") == "log" and min(parts["from"], parts["to"]) <= 0:
        fail(origin, path, "a log ramp needs from > 0 and to > 0.")
    names = {"from": "start", "to": "end"}
    return Ramp(**{names.get(name, name): value for name, value in parts.items()})


def _ramp_parts(ramp: Ramp) -> dict[str, Any]:
    interval = {"over_frac": ramp.over_frac} if ramp.over_steps is None else {"over_steps": ramp.over_steps}
    return {"from": ramp.start, "to": ramp.end, **interval, "shape": ramp.shape}


def _construct(hint: Any, given: dict[str, Any], base: Any, origin: Origin, path: str) -> Any:
    """The dataclass; checks in its own `__post_init__` are reported at the place that gave the values."""
    try:
        return replace(base, **given) if isinstance(base, hint) else hint(**given)
    except (ValueError, ConfigError) as error:
        fail(origin, path, str(error))


def _scalar(hint: Any, node: Node, path: str, expected: str = "") -> Any:
    if not isinstance(node, Leaf):
        fail(node.origin, path, f"got {show(node)}, expected {expected or _NAMES[hint]}.")
    value = node.value
    if hint is str and value is not None:
        return node.text
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint or (isinstance(value, float) and not math.isfinite(value)):
        fail(node.origin, path, f"got {show(node)}, expected {expected or _NAMES[hint]}.")
    return value


_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


def _literal(allowed: Sequence[Any], node: Node, path: str) -> Any:
    stated = (node.text, node.value) if isinstance(node, Leaf) else ()
    found = [choice for choice in allowed if choice in stated]
    if not found:
        names = [str(choice) for choice in allowed]
        close = suggest(node.text, names) if isinstance(node, Leaf) else ""
        fail(node.origin, path, f"got {show(node)}, expected one of {', '.join(names)}.{close}")
    return found[0]


def _in_range(value: Any, origin: Origin, path: str, limits: Limits) -> Any:
    low, high = limits.get("min"), limits.get("max")
    if isinstance(value, (int, float)) and (
        (low is not None and value < low) or (high is not None and value > high)
    ):
        span = f">= {low}" if high is None else f"<= {high}" if low is None else f"{low} to {high}"
        fail(origin, path, f"got {value}, expected {span}.")
    return value


def _refuse_unknown(layers: Iterable[Table], known: Sequence[str], path: str, label: str) -> None:
    for layer in layers:
        for key in layer.entries:
            if key not in known:
                owner = f" of {label!r}" if label else ""
                fields_text = f" Fields: {', '.join(known)}." if known else " It has no fields."
                dotted = f"{path}.{key}" if path else key
                fail(
                    layer.key_origins[key], dotted, f"unknown field{owner}.{suggest(key, known)}{fields_text}"
                )


def _without(table: Table, key: str) -> Table:
    return Table({k: node for k, node in table.entries.items() if k != key}, table.origin, table.key_origins)


def show(node: Node) -> str:
    """A node as an error message names it."""
    if isinstance(node, Items):
        return f"a list of {len(node.nodes)}"
    if isinstance(node, Table):
        return "a mapping"
    text = node.text if len(node.text) <= 60 else node.text[:57] + "..."
    return "nothing" if node.value is None else repr(text) if isinstance(node.value, str) else text
