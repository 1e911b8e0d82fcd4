"""Volume rendering along rays: reference (torch) | nerfacc.

Notation, for sample i of a ray: density sigma_i (1/m), length delta_i (m), optical depth sigma_i delta_i,
    T_i = exp(-sum_{j<i} sigma_j delta_j)            transmittance up to the sample
    w_i = T_i (1 - exp(-sigma_i delta_i))            its weight in the pixel
so that sum_i w_i + T_end = 1. Axes: r rays, s slots per ray, n live samples of all rays, packed in ray order.
Source: Max 1995, Optical Models for Direct Volume Rendering; Mildenhall et al. 2020, arXiv:2003.08934, eq. 3.
"""

import subprocess
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sds3d.ops.backend import backend_for


@dataclass(frozen=True, kw_only=True)
class RaySamples:
    """The n live samples of r rays: sample i covers [start, end] metres of ray `ray[i]`, in slot `slot[i]`.

    Within a ray, slots rise with the distance. Slots without a sample are empty space.
    """

    ray: Int[Tensor, " n"]
    slot: Int[Tensor, " n"]
    start: Float[Tensor, " n"]
    end: Float[Tensor, " n"]
    at: Float[Tensor, " n"]  # where in [start, end] the field is evaluated, metres
    rays: int
    slots: int

    def dense(self, values: Float[Tensor, " n"]) -> Float[Tensor, "r s"]:
        """Values in (ray, slot) layout, zero where there is no sample; differentiable."""
        flat = values.new_zeros(self.rays * self.slots)
        return flat.index_put((self.ray * self.slots + self.slot,), values).view(self.rays, self.slots)

    def packed(self, values: Float[Tensor, "r s"]) -> Float[Tensor, " n"]:
        """The inverse of `dense` on live samples."""
        return values[self.ray, self.slot]


def camera_rays(
    c2w: Float[Tensor, "b 4 4"], intrinsics: Float[Tensor, "b 3 3"], width_px: int, height_px: int
) -> tuple[Float[Tensor, "b h w 3"], Float[Tensor, "b h w 3"], Float[Tensor, "b h w"]]:
    """Origins, unit directions (world frame) and camera-z per metre of the rays through all pixel centres."""
    u = torch.arange(width_px, device=c2w.device, dtype=c2w.dtype) + 0.5
    v = torch.arange(height_px, device=c2w.device, dtype=c2w.dtype) + 0.5
    x = (u - intrinsics[:, 0, 2, None]) / intrinsics[:, 0, 0, None]  # b w
    y = (v - intrinsics[:, 1, 2, None]) / intrinsics[:, 1, 1, None]  # b h
    x, y = x[:, None, :].expand(-1, height_px, -1), y[:, :, None].expand(-1, -1, width_px)
    local = torch.stack([x, y, torch.ones_like(x)], -1)
    cosine = 1.0 / local.norm(dim=-1)
    directions = torch.einsum("bij,bhwj->bhwi", c2w[:, :3, :3], local) * cosine[..., None]
    return c2w[:, None, None, :3, 3].expand_as(directions), directions, cosine


def sphere_interval(
    origins: Float[Tensor, "r 3"], directions: Float[Tensor, "r 3"], radius: float
) -> tuple[Float[Tensor, " r"], Float[Tensor, " r"], Bool[Tensor, " r"]]:
    """Where unit-direction rays enter and leave the sphere at the origin, and whether they meet it at all."""
    along = (origins * directions).sum(-1)
    square = along.square() - origins.square().sum(-1) + radius**2
    half = square.clamp_min(0).sqrt()
    near, far = (-along - half).clamp_min(0), (-along + half).clamp_min(0)
    return near, far, (square > 0) & (far > near)


def composite(
    density: Float[Tensor, "r s"], delta: Float[Tensor, "r s"]
) -> tuple[Float[Tensor, "r s"], Float[Tensor, "r s"]]:
    """Weights w_i = T_i (1 - exp(-sigma_i delta_i)) and T_i = exp(-sum_{j<i} sigma_j delta_j).

    Works on any device; differentiable in both arguments. nerfacc's batched functions are plain torch: they
    never reach its CUDA code.
    """
    if backend_for(density) == "reference":
        return composite_reference(density, delta)
    from nerfacc import render_weight_from_density

    weights, transmittance, _ = render_weight_from_density(torch.zeros_like(delta), delta, density)
    return weights, transmittance


def composite_reference(
    density: Float[Tensor, "r s"], delta: Float[Tensor, "r s"]
) -> tuple[Float[Tensor, "r s"], Float[Tensor, "r s"]]:
    """`composite` in plain torch."""
    depth = density * delta
    before = torch.cumsum(depth, -1) - depth
    transmittance = torch.exp(-before)
    return -transmittance * torch.expm1(-depth), transmittance


def composite_samples(density: Float[Tensor, " n"], samples: RaySamples) -> Float[Tensor, " n"]:
    """Weights of packed samples; on CUDA with nerfacc's packed scan where it builds, else in dense layout."""
    if backend_for(density) == "cuda" and density.is_cuda and nerfacc_cuda():
        from nerfacc import render_weight_from_density

        weights, _, _ = render_weight_from_density(
            samples.start, samples.end, density, ray_indices=samples.ray, n_rays=samples.rays
        )
        return weights
    weights, _ = composite(samples.dense(density), samples.dense(samples.end - samples.start))
    return samples.packed(weights)


def accumulate(
    weights: Float[Tensor, " n"], values: Float[Tensor, "n c"], ray: Int[Tensor, " n"], rays: int
) -> Float[Tensor, "r c"]:
    """sum_i w_i v_i of every ray; zero for rays without samples."""
    return values.new_zeros(rays, values.shape[1]).index_add(0, ray, weights[:, None] * values)


@lru_cache(maxsize=1)
def nerfacc_cuda() -> bool:
    """Whether nerfacc's CUDA kernels can be used; builds them at the first call (only for CUDA tensors).

    nerfacc's own build takes the compiler's default C++20, under which its `lerp` clashes with `std::lerp`;
    here the same sources are built as C++17 and installed as `nerfacc.csrc`, where its lazy loader looks
    first. After a failure the dense torch path serves, with one warning that names the cause.
    """
    import nerfacc
    from torch.utils import cpp_extension

    folder = Path(nerfacc.__file__).parent / "cuda" / "csrc"
    try:
        nerfacc.csrc = cpp_extension.load(
            name="sds3d_nerfacc",
            sources=[str(path) for path in sorted([*folder.glob("*.cu"), *folder.glob("*.cpp")])],
            extra_cflags=["-O3"],
            extra_cuda_cflags=["-O3", "-std=c++17"],
        )
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        cause = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(
            f"nerfacc's CUDA kernels do not build here ({cause[0]}); "
            "rendering uses the slower dense torch path. A CUDA toolkit that matches torch mends this.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
