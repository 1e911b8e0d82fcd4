"""Where a ray into Gaussians becomes half opaque: their median depth.

The mean depth of a shell that lets some light through lies between its front and its back, where nothing is. The
rasteriser composites one colour per Gaussian; colours that say "nearer than z_k" give W(z_k), the opacity up to z_k,
for a ladder of depths, and the median is where W crosses one half.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.interfaces import Cameras
from sds3d.ops.splat import rasterize_gaussians
from sds3d.ops.splat_reference import view_matrices
from sds3d.slices import Slice

_RUNGS = 45  # of the ladder of depths, three per pass


@torch.no_grad()
def median_depth(
    means: Float[Tensor, "g 3"],
    quats_wxyz: Float[Tensor, "g 4"],
    scales: Float[Tensor, "g 3"],
    opacity: Float[Tensor, " g"],
    cameras: Cameras,
) -> tuple[Float[Tensor, "b 1 H W"], Float[Tensor, "b 1 H W"]]:
    """(metres along each camera's z axis where opacity reaches one half, alpha); depth is 0 where it never does.

    Resolution: 1/45 of the depth range of the Gaussians, interpolated in between.
    """
    views = [
        _view(means, quats_wxyz, scales, opacity, Slice(i, i + 1, len(cameras)).of(cameras))
        for i in range(len(cameras))
    ]
    depth, alpha = zip(*views, strict=True)
    return torch.cat(depth), torch.cat(alpha)


def _view(
    means: Tensor, quats: Tensor, scales: Tensor, opacity: Tensor, camera: Cameras
) -> tuple[Float[Tensor, "1 1 H W"], Float[Tensor, "1 1 H W"]]:
    w2c = view_matrices(camera, means)[0]
    z = means @ w2c[2, :3] + w2c[2, 3]
    near, far = float(z.min()), float(z.max())
    step = max((far - near) / (_RUNGS - 2), 1e-6)
    rungs = near + step * (torch.arange(_RUNGS, device=z.device, dtype=z.dtype) - 0.5)
    below = []
    for three in rungs.split(3):
        # Each Gaussian is spread over one step, so that W has no jumps to interpolate.
        nearer = ((three - z[:, None]) / step + 0.5).clamp(0, 1)
        black = means.new_zeros(1, 3)
        image = rasterize_gaussians(means, quats, scales, opacity, nearer, camera, black)
        below.append(image.rgb[0])
    total = torch.cat(below)  # rungs H W, rising
    first = (total < 0.5).sum(0).clamp(1, _RUNGS - 1)[None]
    before, after = total.gather(0, first - 1), total.gather(0, first)
    share = ((0.5 - before) / (after - before).clamp_min(1e-6)).clamp(0, 1)
    depth = rungs[0] + step * (first - 1 + share)
    reached = total[-1:] >= 0.5
    return torch.where(reached, depth, 0.0)[None], image.alpha
