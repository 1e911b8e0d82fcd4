"""The checker behind the shape annotations: beartype, with `int` accepted where `float` is asked for (PEP 484).

A Protocol that is not @runtime_checkable cannot be tested with isinstance; mypy checks those, so here they are
passed over, and only they: every other parameter of the same function stays checked.
"""

from collections.abc import Callable
from typing import Any, TypeVar, get_args

from beartype import BeartypeConf, beartype

F = TypeVar("F", bound=Callable[..., Any])
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def _uncheckable(hint: Any) -> bool:
    if getattr(hint, "_is_protocol", False) and not getattr(hint, "_is_runtime_protocol", False):
        return True
    return any(_uncheckable(part) for part in get_args(hint))


def check(function: F) -> F:
    """`function`, checking its annotations at every call."""
    hints = getattr(function, "__annotations__", {})
    for name in [name for name, hint in hints.items() if _uncheckable(hint)]:
        hints[name] = object
    checked: F = _beartype(function)
    return checked
