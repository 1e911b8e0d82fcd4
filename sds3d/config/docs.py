"""A markdown reference of every setting, made from the dataclasses so that it cannot go stale.

Help text comes from `option(help=...)`, else from the comment on the field's own line.
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sds3d.config.dump import to_plain
from sds3d.config.option import Chosen, config_class, default_of
from sds3d.config.ramp import Ramp

_COMMENT = re.compile(r"^\s*(\w+)\s*:[^#]*#\s*(.+?)\s*$", re.MULTILINE)


def reference(schema: Any) -> str:
    """The markdown page for a config schema and every kind it can choose."""
    sections: list[str] = []
    _section(schema, "", "Top level", sections)
    return "\n".join(sections)


def field_help(cls: Any) -> dict[str, str]:
    """The help text of every field of a settings class; empty where it has none."""
    comments = dict(_COMMENT.findall(_source(cls)))
    return {spec.name: spec.metadata.get("help") or comments.get(spec.name, "") for spec in fields(cls)}


def _section(cls: Any, path: str, title: str, sections: list[str]) -> None:
    helps = field_help(cls)
    hints = get_type_hints(cls)
    rows: list[str] = []
    at = len(sections)
    for spec in (spec for spec in fields(cls) if spec.init):
        key = f"{path}.{spec.name}" if path else spec.name
        hint = next((m for m in get_args(hints[spec.name]) if is_dataclass(m)), hints[spec.name])
        if hint is Chosen:
            rows.append(_kinds_row(key, spec, sections))
        elif is_dataclass(hint) and hint is not Ramp:
            rows.append(f"| `{key}` | settings | see below | {spec.metadata.get('help', '')} |")
            _section(hint, key, f"`{key}`", sections)
        else:
            kind = _type_text(hints[spec.name], spec.metadata)
            rows.append(f"| `{key}` | {kind} | {_default_text(spec)} | {_cell(helps[spec.name])} |")
    summary = (inspect.getdoc(cls) or "").split("\n")[0]
    summary = "" if summary.startswith(f"{cls.__name__}(") else summary
    head = ["| key | type | default | meaning |", "|---|---|---|---|"]
    table = "\n".join([*head, *rows]) if rows else "No settings."
    sections.insert(at, f"## {title}\n\n{summary}\n\n{table}\n".replace("\n\n\n\n", "\n\n"))


def _kinds_row(key: str, spec: Any, sections: list[str]) -> str:
    table: Mapping[str, type] = spec.metadata["kinds"]()
    if key.count(".") < 2:  # a kind that holds a choice of the same table would never end
        for kind, entry in table.items():
            _section(config_class(entry), key, f"`{key}` with `kind: {kind}`", sections)
    names = ", ".join(f"`{kind}`" for kind in table)
    note = _cell(spec.metadata.get("help", ""))
    return f"| `{key}.kind` | one of {names} | `{default_of(spec).kind}` | {note} |"


def _type_text(hint: Any, limits: Mapping[str, Any]) -> str:
    low, high = limits.get("min"), limits.get("max")
    ends = ["" if end is None else str(end) for end in (low, high)]
    span = f", {ends[0]} .. {ends[1]}" if any(ends) else ""
    if get_origin(hint) is Literal:
        return " \\| ".join(f"`{choice}`" for choice in get_args(hint))
    if hint is Ramp:
        return f"ramp{span}"
    named = isinstance(hint, type) and not get_args(hint)
    return _cell(hint.__name__ if named else str(hint).replace("typing.", "")) + span


def _default_text(spec: Any) -> str:
    value = default_of(spec)
    return "required" if value is MISSING else f"`{to_plain(value)!r}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _source(cls: Any) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""
