"""`rasterize_gaussians`: b views of g 3D Gaussians in one differentiable call; mathematics in `splat_reference`."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.errors import NonFiniteError, ShapeError
from sds3d.interfaces import Cameras
from sds3d.ops.backend import backend_for


@dataclass(frozen=True, kw_only=True)
class SplatImage:
    """What b cameras see; every field is differentiable."""

    rgb: Float[Tensor, "b 3 H W"]  # composited over the background
    alpha: Float[Tensor, "b 1 H W"]  # 1 - transmittance
    depth: Float[Tensor, "b 1 H W"]  # alpha-weighted metres along the camera z axis


def rasterize_gaussians(
    means: Float[Tensor, "g 3"],
    quats_wxyz: Float[Tensor, "g 4"],
    scales: Float[Tensor, "g 3"],
    opacity: Float[Tensor, " g"],
    color: Float[Tensor, "g 3"],
    cameras: Cameras,
    background: Float[Tensor, "b 3"],
) -> SplatImage:
    """Alpha-composite Gaussians front to back: rgb = sum_i a_i T_i c_i + T_end background.

    `means` and `scales` (linear, positive) in metres, `opacity` in [0, 1], quaternions of any length. Gradients
    reach the five Gaussian tensors and the background, from all three images; cameras get none.

    Raises:
        ShapeError: where a tensor's shape does not fit the others.
        NonFiniteError: where a Gaussian holds a non-finite number (checked on the CPU only).
        BackendError: where the CUDA backend is asked for but gsplat cannot run.
    """
    gaussians = {
        "means": means,
        "quats_wxyz": quats_wxyz,
        "scales": scales,
        "opacity": opacity,
        "color": color,
    }
    _check(gaussians, cameras, background)
    backend = backend_for(means)
    # Imported on use: neither numba's nor gsplat's start-up is paid by a run on the other device.
    if backend == "numba":
        from sds3d.ops.splat_numba import rasterize
    elif backend == "cuda":
        from sds3d.ops.splat_cuda import rasterize
    else:
        from sds3d.ops.splat_reference import rasterize
    rgb, alpha, depth = rasterize(means, quats_wxyz, scales, opacity, color, cameras, background)
    return SplatImage(rgb=rgb, alpha=alpha, depth=depth)


def _check(gaussians: dict[str, Tensor], cameras: Cameras, background: Tensor) -> None:
    means = gaussians["means"]
    count = len(means)
    wanted = {
        "means": (count, 3),
        "quats_wxyz": (count, 4),
        "scales": (count, 3),
        "opacity": (count,),
        "color": (count, 3),
    }
    for name, tensor in (*gaussians.items(), ("background", background)):
        found, expected = (
            (tuple(tensor.shape), tensor.dtype),
            (wanted.get(name, (len(cameras), 3)), means.dtype),
        )
        if found != expected:
            raise ShapeError(f"rasterize_gaussians: {name} is {found}, expected {expected}")
        # Asking a GPU would make every step wait for it; the optimiser counts non-finite gradients anyway.
        if not tensor.is_cuda and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteError(
                f"rasterize_gaussians: {name} holds {bad} non-finite numbers of {tensor.numel()}"
            )
