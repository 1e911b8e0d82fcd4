"""3D Gaussian splatting on CUDA: an adapter to gsplat (Apache-2.0), whose "classic" mode is `splat_reference`."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.errors import BackendError
from sds3d.interfaces import Cameras
from sds3d.ops.splat_reference import BLUR_PX2, NEAR_M, view_matrices


def rasterize(
    means: Float[Tensor, "g 3"],
    quats_wxyz: Float[Tensor, "g 4"],
    scales: Float[Tensor, "g 3"],
    opacity: Float[Tensor, " g"],
    color: Float[Tensor, "g 3"],
    cameras: Cameras,
    background: Float[Tensor, "b 3"],
) -> tuple[Float[Tensor, "b 3 H W"], Float[Tensor, "b 1 H W"], Float[Tensor, "b 1 H W"]]:
    """Colour, alpha and alpha-weighted depth of all views, computed in float32."""
    loaded = _load(means.device.index or 0)
    if isinstance(loaded, str):
        raise BackendError(loaded)
    dtype = means.dtype
    layers, alpha = _call(
        loaded,
        means.float(),
        quats_wxyz.float(),
        scales.float(),
        opacity.float(),
        color.float(),
        view_matrices(cameras, means.float()),
        cameras.intrinsics.detach().to(means.device, torch.float32),
        (cameras.width_px, cameras.height_px),
    )
    layers, alpha = layers.permute(0, 3, 1, 2).to(dtype), alpha.permute(0, 3, 1, 2).to(dtype)
    # The background goes in here: how gsplat pads it for the depth channel differs between its versions.
    return layers[:, :3] + (1 - alpha) * background[:, :, None, None], alpha, layers[:, 3:]


def _call(
    rasterization: Callable[..., Any],
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacity: Tensor,
    color: Tensor,
    w2c: Tensor,
    intrinsics: Tensor,
    size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Images (b H W 4: colour and depth) and (b H W 1: alpha); keywords only, as those outlive versions."""
    layers, alpha, _ = rasterization(
        means=means,
        quats=quats,
        scales=scales,
        opacities=opacity,
        colors=color,
        viewmats=w2c,
        Ks=intrinsics,
        width=size[0],
        height=size[1],
        near_plane=NEAR_M,
        eps2d=BLUR_PX2,
        packed=False,
        render_mode="RGB+D",
        rasterize_mode="classic",
    )
    return layers, alpha


@lru_cache(maxsize=8)
def _load(device_index: int) -> Callable[..., Any] | str:
    """The function of gsplat, or why it cannot be used: it compiles on first use, so one splat is drawn."""
    device = torch.device("cuda", device_index)
    try:
        from gsplat import rasterization

        one = torch.ones(1, 3, device=device)
        camera = torch.eye(4, device=device)[None]
        quats = torch.nn.functional.pad(one, (1, 0))
        _call(rasterization, one, quats, one, one[:, 0], one, camera, camera[:, :3, :3], (16, 16))
    # Whatever a missing toolkit, a failed compilation or a missing GPU raises; later errors pass unchanged.
    except (ImportError, AttributeError, OSError, RuntimeError, AssertionError) as error:
        return (
            f"rasterize_gaussians on {device}: gsplat cannot be used here ({type(error).__name__}: {error}). "
            "It compiles its kernels on first use and needs nvcc of the CUDA version that torch was built with "
            '(`python -c "import torch; print(torch.version.cuda)"`), a C++ compiler and ninja. '
            "Install them, or set device: cpu."
        )
    result: Callable[..., Any] = rasterization
    return result
