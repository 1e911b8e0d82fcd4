"""The advanced drawer as data: sections of fields, made from the typed config with its help texts."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sds3d.config.docs import field_help
from sds3d.config.dump import to_plain
from sds3d.config.option import Chosen
from sds3d.config.ramp import Ramp
from sds3d.config.tree import parse, plain
from sds3d.errors import ConfigError
from sds3d.job import JobConfig

Kind = Literal["switch", "choice", "integer", "number", "text", "yaml"]
# Shown elsewhere on the page, or no business of it.
LEFT_OUT = ("prompt", "negative_prompt", "seed", "steps", "edit", "start", "prior.name", "guidance.kind")
TOP = "general"


@dataclass(frozen=True, kw_only=True)
class Field:
    """One setting as a form shows it; `value` is plain data, for kind "yaml" as text."""

    key: str
    kind: Kind
    value: Any
    help: str = ""
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None

    @property
    def label(self) -> str:
        """Its name below its section."""
        return self.key.partition(".")[2] or self.key


def sections(job: JobConfig) -> dict[str, list[Field]]:
    """All settings of a job by section (the first part of their key), in the order of the config."""
    found: dict[str, list[Field]] = {}
    for entry in _fields(job, ""):
        section = entry.key.split(".")[0] if "." in entry.key else TOP
        found.setdefault(section, []).append(entry)
    return found


def _fields(config: Any, path: str) -> Iterator[Field]:
    hints, helps = get_type_hints(type(config)), field_help(type(config))
    for spec in fields(config):
        key = f"{path}.{spec.name}" if path else spec.name
        if not spec.init or key in LEFT_OUT:
            continue
        value, hint = getattr(config, spec.name), hints[spec.name]
        if isinstance(value, Chosen):
            if f"{key}.kind" not in LEFT_OUT:
                table = spec.metadata["kinds"]()
                yield Field(
                    key=f"{key}.kind",
                    kind="choice",
                    value=value.kind,
                    help=helps[spec.name],
                    choices=tuple(table),
                )
            yield from _fields(value.config, key)
        elif is_dataclass(value) and not isinstance(value, Ramp):
            yield from _fields(value, key)
        else:
            yield _field(key, value, hint, helps[spec.name], spec.metadata)


def _field(key: str, value: Any, hint: Any, help_text: str, limits: Any) -> Field:
    low, high = limits.get("min"), limits.get("max")
    if hint is bool:
        return Field(key=key, kind="switch", value=value, help=help_text)
    if get_origin(hint) is Literal:
        return Field(key=key, kind="choice", value=value, help=help_text, choices=get_args(hint))
    if hint in (int, float):
        kind: Kind = "integer" if hint is int else "number"
        return Field(key=key, kind=kind, value=value, help=help_text, low=low, high=high)
    if hint is str:
        return Field(key=key, kind="text", value=value, help=help_text)
    return Field(key=key, kind="yaml", value=as_text(value), help=help_text, low=low, high=high)


def as_text(value: Any) -> str:
    """A setting as one line of YAML."""
    return json.dumps(to_plain(value), ensure_ascii=False)


def entered(entry: Field, value: Any) -> Any:
    """What a user put into a field, as plain data; raises ConfigError for text that is no YAML."""
    if entry.kind == "yaml":
        text = str(value).strip()
        if len(text) > 5000:
            raise ConfigError(f"{entry.key}: too long")
        return plain(parse(text, entry.key, lines=False))
    if entry.kind == "integer" and isinstance(value, float) and value.is_integer():
        return int(value)
    return value
