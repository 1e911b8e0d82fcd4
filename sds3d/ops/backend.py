"""Which twin of a kernel runs: by the device of its tensors, unless a test or a user says otherwise."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch

Backend = Literal["reference", "numba", "cuda"]

_forced: ContextVar[Backend | None] = ContextVar("sds3d_backend", default=None)


def backend_for(tensor: torch.Tensor) -> Backend:
    """The backend for kernels on this tensor: the forced one, else numba for float32 on the CPU, cuda for CUDA."""
    forced = _forced.get()
    if forced is not None:
        return forced
    return "cuda" if tensor.is_cuda else "numba"


@contextmanager
def use(backend: Backend) -> Iterator[None]:
    """Force one backend inside the block, e.g. `with ops.use("reference"):` (tests, debugging)."""
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)
