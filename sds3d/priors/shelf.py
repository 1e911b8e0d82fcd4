"""Priors that stay loaded between the runs of one process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from sds3d.interfaces import Prior

_shelf: ContextVar[dict[str, Prior] | None] = ContextVar("shelf", default=None)


@contextmanager
def keeping_priors() -> Iterator[None]:
    """Within the block, in this thread, the prior that was asked for last is kept for the next run.

    One at a time: full-size models fill a device.
    """
    token = _shelf.set({})
    try:
        yield
    finally:
        _shelf.reset(token)


def kept(key: str, load: Callable[[], Prior]) -> Prior:
    """The prior of this key from the shelf, or from `load`."""
    shelf = _shelf.get()
    if shelf is None:
        return load()
    if key not in shelf:
        shelf.clear()  # before the next one needs the room
        shelf[key] = load()
    return shelf[key]
