"""A config back to plain data, YAML text, a hash, and the tree that `sds3d config show` prints."""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import yaml

from sds3d.config.load import SCHEMA, Resolved
from sds3d.config.option import Chosen
from sds3d.config.ramp import Ramp


def to_plain(value: Any) -> Any:
    """Mappings, lists and scalars that the loader reads back to an equal value."""
    if isinstance(value, Chosen):
        return {"kind": value.kind, **to_plain(value.config)}
    if isinstance(value, Ramp):
        return _plain_ramp(value)
    if is_dataclass(value):
        return {spec.name: to_plain(getattr(value, spec.name)) for spec in fields(value) if spec.init}
    if isinstance(value, Mapping):
        return {name: to_plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    return value


def _plain_ramp(ramp: Ramp) -> Any:
    if ramp == Ramp.constant(ramp.start):
        return ramp.start
    interval = {"over_frac": ramp.over_frac} if ramp.over_steps is None else {"over_steps": ramp.over_steps}
    name, ends = next(iter(interval.items()))
    return {"from": ramp.start, "to": ramp.end, name: list(ends), "shape": ramp.shape}


def dump(config: Any) -> str:
    """YAML with `schema: 1` that resolves to an equal config."""
    return dump_plain({"schema": SCHEMA, **to_plain(config)})


def dump_plain(plain: Mapping[str, Any]) -> str:
    """YAML of plain data; every text comes back as it was."""
    text: str = yaml.dump(
        dict(plain), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None
    )
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes text with Unicode line breaks, which YAML folds into spaces when it stands plain."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def config_hash(config: Any, ignore: Collection[str] = ()) -> str:
    """A short hash of all settings except the top-level keys in `ignore`.

    Settings at their default do not enter, so that runs made before a setting existed keep their hash.
    """
    plain = {key: value for key, value in _chosen_values(config).items() if key not in ignore}
    return hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=8).hexdigest()


def _chosen_values(value: Any) -> Any:
    """As `to_plain`, without the fields that have their default value."""
    if isinstance(value, Chosen):
        return {"kind": value.kind, **_chosen_values(value.config)}
    if isinstance(value, Ramp) or not is_dataclass(value):
        return to_plain(value)
    found = {}
    for spec in fields(value):
        own = getattr(value, spec.name)
        default = spec.default if spec.default_factory is MISSING else spec.default_factory()
        if spec.init and own != default:
            found[spec.name] = _chosen_values(own)
    return found


def leaves(plain: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) for every setting; a ramp or list counts as one."""
    if isinstance(plain, Mapping) and plain and not {"from", "to"} <= plain.keys():
        for name, item in plain.items():
            yield from leaves(item, f"{path}.{name}" if path else str(name))
    else:
        yield path, plain


def show(resolved: Resolved[Any]) -> str:
    """One line for each setting: `key: value  # origin`."""
    lines = []
    for key, value in leaves(to_plain(resolved.config)):
        text = json.dumps(value, ensure_ascii=False)
        lines.append(f"{key}: {text}  # {resolved.origin(key)}")
    return "\n".join(lines) + "\n"
