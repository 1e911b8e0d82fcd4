"""Face ids from nvdiffrast, for users who installed it (its licence is non-commercial; nothing here needs it)."""

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sds3d.errors import BackendError

_ALIGN = 8  # its CUDA rasteriser works on tiles of this many pixels
_MAX_PX = 2048


@lru_cache(maxsize=4)
def _context(device: torch.device) -> tuple[Any, Any]:
    try:
        import nvdiffrast.torch as library
    except ImportError as error:
        raise BackendError(
            f"nvdiffrast is not usable here ({error}); leave use_nvdiffrast off, or install it with its CUDA toolkit"
        ) from error
    return library, library.RasterizeCudaContext(device=device)


def nvdiffrast_faces(
    clip: Tensor, faces: Tensor, size: tuple[int, int], *, cull: str, near: float
) -> Int[Tensor, "b H W"]:
    """The nearest face per pixel, -1 where none; arguments as in `mesh_raster.rasterize`.

    Raises BackendError where nvdiffrast is missing or cannot draw this size, device or culling.
    """
    if not clip.is_cuda:
        raise BackendError(f"nvdiffrast draws on CUDA tensors only, got {clip.device}")
    if cull != "none":
        raise BackendError(f"nvdiffrast draws both sides of faces, got cull={cull!r}")
    if size[0] % _ALIGN or size[1] % _ALIGN or max(size) > _MAX_PX:
        raise BackendError(
            f"nvdiffrast draws up to {_MAX_PX} px in multiples of {_ALIGN}, got {size[0]} x {size[1]}"
        )
    library, context = _context(clip.device)
    # It clips faces at the near plane; ours are left out whole there, so that twins agree.
    far_enough = (clip[..., 3] > near)[:, faces.long()].all(-1)
    drawn, _ = library.rasterize(
        context, clip.float().contiguous(), faces.int().contiguous(), resolution=list(size)
    )
    face_id = drawn[..., 3].long() - 1
    views = torch.arange(len(clip), device=clip.device)[:, None, None]
    return torch.where((face_id >= 0) & far_enough[views, face_id.clamp_min(0)], face_id, -1)
