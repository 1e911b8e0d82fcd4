"""What a worker is asked to do and what came of it, as plain JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from sds3d.config.load import is_override, override_layers, setting
from sds3d.config.tree import Table
from sds3d.errors import ConfigError, InputError
from sds3d.events.bus import Event

Kind = Literal["generate", "resume", "export"]
Status = Literal["done", "interrupted", "failed", "died"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing to do with one run folder."""

    kind: Kind
    folder: str
    config: str = "default"  # generate: a name, or a YAML file
    config_name: str = ""  # generate: what the manifest calls it; empty = as above
    settings: Mapping[str, Any] = field(
        default_factory=dict
    )  # generate: dotted keys on top of the config; export: keys that begin with "export."
    formats: tuple[str, ...] = ()  # export: other formats than the run's own

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> "Task":
        """The task of a line; raises InputError where it is none."""
        try:
            raw = json.loads(text)
            known = {spec.name for spec in fields(cls)}
            if not isinstance(raw, dict) or not {"kind", "folder"} <= set(raw) <= known:
                raise ValueError(f"expected a mapping with {', '.join(sorted(known))}")
            if raw["kind"] not in get_args(Kind):
                raise ValueError(f"kind: got {raw['kind']!r}, expected one of {', '.join(get_args(Kind))}")
            return cls(**{**raw, "formats": tuple(raw.get("formats", ()))})
        except (ValueError, TypeError) as error:
            raise InputError(f"task: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a task ended: "died" means that the process went away in the middle of it."""

    status: Status
    folder: str
    files: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None
    exit_code: int = 0
    seconds: float = 0.0
    steps_done: int = 0
    warnings: tuple[str, ...] = ()


def layers_of(settings: Mapping[str, Any], source: str = "settings") -> list[Table]:
    """Config layers for dotted keys; texts stay texts, lists and mappings are taken as data.

    Raises:
        ConfigError: a key that is no dotted name, or a value that is no plain data.
    """
    layers = []
    for key, value in settings.items():
        if "=" in key or not is_override(f"{key}="):
            raise ConfigError(
                f"{source}: got the key {key!r}, expected a dotted name, e.g. guidance.cfg_scale"
            )
        if isinstance(value, str):
            layers.append(setting(key, value, source))
            continue
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{source}: {key}: {error}; expected a number, text, list or mapping"
            ) from error
        layers += override_layers([f"{key}={text}"], source)
    return layers


def event_as_dict(event: Event) -> dict[str, Any]:
    """An event as plain JSON values, named by its class; pictures are left to their files."""
    return {"event": type(event).__name__} | {
        name: _plain(value) for name, value in vars(event).items() if name != "image"
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None  # NaN is not JSON
    return value
