"""How a Config class describes a field beyond its type: help text, range, and choice among kinds."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any

KindTable = Mapping[str, type]


@dataclass(frozen=True)
class Chosen:
    """One kind picked from a table, with its settings: `table[chosen.kind](chosen.config, ...)` builds it."""

    kind: str
    config: Any


def option(
    default: Any = MISSING,
    *,
    help: str = "",
    ge: float | None = None,
    le: float | None = None,
    path: bool = False,
) -> Any:
    """A dataclass field with help text and an inclusive range (in tuples and ramps: of every number).

    `path`: the text may name a file or folder that is read, so who may name which can be checked.
    """
    return field(default=default, metadata={"help": help, "min": ge, "max": le, "path": path})


def kinds(
    table: KindTable | Callable[[], KindTable], default: str, *, help: str = "", **settings: Any
) -> Any:
    """A field of type `Chosen`: YAML picks a key of `table` by `kind:`; `settings` go to the default.

    `table` may be a function, so that a class in the table can itself hold a choice from the same table.
    """
    resolve = table if callable(table) else lambda: table
    return field(
        default_factory=lambda: Chosen(default, config_class(resolve()[default])(**settings)),
        metadata={"help": help, "kinds": resolve},
    )


def config_class(entry: type) -> type:
    """The dataclass of settings behind a table entry: its nested `Config`, or the entry itself."""
    return getattr(entry, "Config", entry)


def default_of(spec: Any) -> Any:
    """The default of a dataclass field, or MISSING."""
    if spec.default is not MISSING:
        return spec.default
    return spec.default_factory() if spec.default_factory is not MISSING else MISSING
