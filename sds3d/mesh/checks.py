"""Is this a mesh at all: the question that every reader and every stage of an export asks first."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sds3d.errors import ExportError, NoSurfaceError, Sds3dError

MAX_COORDINATE = 1e18  # metres; squares of larger ones leave float32


def fault_of(vertices: Float[Tensor, "v 3"], faces: Int[Tensor, "f 3"]) -> str | None:
    """What is wrong with a mesh, in words; None if it has faces, finite vertices and no vertex that is not there."""
    if len(faces) == 0:
        return "has no faces" if len(vertices) else "has no faces: it is empty"
    wrong = (~torch.isfinite(vertices)).any(dim=1)
    if bool(wrong.any()):
        return f"has {int(wrong.sum())} of {len(vertices)} vertices that are not finite"
    outside = ((faces < 0) | (faces >= len(vertices))).any(dim=1)
    if bool(outside.any()):
        return f"has {int(outside.sum())} of {len(faces)} faces that name vertices outside 0..{len(vertices) - 1}"
    reach = float(vertices.abs().max())
    if reach > MAX_COORDINATE:
        return f"reaches {reach:.3g} from its origin; expected at most {MAX_COORDINATE:g}"
    return None


def check_mesh(
    vertices: Float[Tensor, "v 3"],
    faces: Int[Tensor, "f 3"],
    where: str,
    error: type[Sds3dError] = ExportError,
) -> None:
    """Raise `error` for a mesh with a fault; NoSurfaceError where that is ExportError and there are no faces."""
    fault = fault_of(vertices, faces)
    if fault is not None:
        empty = error is ExportError and len(faces) == 0
        raise (NoSurfaceError if empty else error)(f"{where} {fault}")
