"""The surface of a scene from what it shows: depth renders from all around, fused (TSDF) and closed."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.errors import NoSurfaceError
from sds3d.interfaces import Cameras, Scene, Shading, Surface
from sds3d.mesh.isosurface import marching_cubes
from sds3d.ops.tsdf import COVERED, fuse_depths
from sds3d.rng import Stream
from sds3d.slices import Slice

TRUNC_CELLS = 3.0
_VIEWS_AT_ONCE = 4
_MARGIN = 1.05  # of the box around what is seen


@runtime_checkable
class ShowsDepth(Protocol):
    """A scene that knows its depth better than the mean along a ray."""

    def surface_depth(self, cameras: Cameras) -> tuple[Float[Tensor, "b 1 H W"], Float[Tensor, "b 1 H W"]]:
        """(metres along each camera's z axis where alpha > 1/2, alpha)."""
        ...


@torch.no_grad()
def fused_surface(scene: Scene, cells_per_side: int, cameras: Cameras) -> Surface:
    """The closed zero level of the fused depths, counter-clockwise seen from outside.

    The lattice covers what the views see, with `cells_per_side` cells; pixels should be no larger than cells. Raises
    NoSurfaceError where no view shows a pixel that is more than half opaque, or no point is enclosed.
    """
    device = next(scene.parameters(), torch.zeros(())).device
    cameras = cameras.to(device)
    parts = [_depth(scene, piece.of(cameras)) for piece in Slice.whole(len(cameras)).pieces(_VIEWS_AT_ONCE)]
    depth, alpha = (torch.cat(images) for images in zip(*parts, strict=True))
    points = _seen_points(depth, alpha, cameras)
    if not len(points):
        raise NoSurfaceError(
            f"the scene is empty: no view shows a pixel that is more than {COVERED:.0%} opaque. Train longer, or "
            "lower the weight of the opacity penalty."
        )
    reach = points.abs().amax(1).sort().values
    half = _MARGIN * float(reach[int(0.999 * (len(reach) - 1))])  # a few stray ones do not set the resolution
    half *= 1 + 2 * TRUNC_CELLS / cells_per_side
    trunc = TRUNC_CELLS * 2 * half / cells_per_side
    fused = fuse_depths(
        depth,
        alpha,
        cameras,
        half_extent=half,
        cells=cells_per_side,
        trunc_m=trunc,
    )
    return marching_cubes((0.5 - 0.5 * fused).cpu(), 0.5, half)


def _depth(scene: Scene, cameras: Cameras) -> tuple[Float[Tensor, "b 1 H W"], Float[Tensor, "b 1 H W"]]:
    if isinstance(scene, ShowsDepth):
        return scene.surface_depth(cameras)
    view = scene.render(cameras, Shading(), Stream(0, "fuse"))
    return view.depth / view.alpha.clamp_min(1e-4), view.alpha


def _seen_points(
    depth: Float[Tensor, "b 1 H W"], alpha: Float[Tensor, "b 1 H W"], cameras: Cameras
) -> Float[Tensor, "n 3"]:
    """World points of all covered pixels."""
    view, row, column = (alpha[:, 0] > COVERED).nonzero().unbind(1)
    z = depth[view, 0, row, column]
    k = cameras.intrinsics[view]
    x = (column + 0.5 - k[:, 0, 2]) / k[:, 0, 0] * z
    y = (row + 0.5 - k[:, 1, 2]) / k[:, 1, 1] * z
    local = torch.stack([x, y, z], -1)
    c2w = cameras.c2w[view]
    return (c2w[:, :3, :3] @ local[..., None]).squeeze(-1) + c2w[:, :3, 3]
