"""Kernels, each as a pure-torch reference and an accelerated twin with the same signature."""

from sds3d.ops.backend import Backend, backend_for, use

__all__ = ["Backend", "backend_for", "use"]
