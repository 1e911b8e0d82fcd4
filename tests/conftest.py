"""Every test runs with shapes checked: jaxtyping annotations of the whole package, enforced by beartype.

Modules with numba kernels are left out, because a compiled function cannot carry a Python wrapper.
"""

import re
from pathlib import Path

import torch
from jaxtyping import install_import_hook

PACKAGE = Path(__file__).resolve().parents[1] / "sds3d"
_COMPILED = re.compile(r"^(from|import) numba|^@(njit|kernel)\b", re.MULTILINE)


def checked_modules() -> list[str]:
    """Modules whose annotations are enforced: leaf modules without compiled kernels."""
    return [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name not in ("__init__.py", "__main__.py")
        and not _COMPILED.search(path.read_text(encoding="utf-8"))
    ]


install_import_hook(checked_modules(), "shape_checker.check")
torch.set_num_threads(min(2, torch.get_num_threads()))
