"""Which iso value shows what the renders show: the surface that looks most like its own scene."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.interfaces import Cameras, Scene, Shading, Surface
from sds3d.mesh.checks import check_mesh
from sds3d.ops.raster import rasterize_mesh
from sds3d.rng import Stream

FACTORS = (1.0, 0.7, 0.5, 0.35, 0.25)


@torch.no_grad()
def see(scene: Scene, cameras: Cameras) -> Float[Tensor, "b 3 H W"]:
    """The scene on white, on the CPU."""
    device = next(scene.parameters(), torch.zeros(())).device
    background = torch.ones(len(cameras), 3, device=device)
    view = scene.render(cameras.to(device), Shading(background=background), Stream(0, "iso"))
    return view.rgb.cpu()


@torch.no_grad()
def see_surface(scene: Scene, surface: Surface, cameras: Cameras) -> Float[Tensor, "b 3 H W"]:
    """The surface on white, in the scene's own colours, looked up at every visible point."""
    fragments = rasterize_mesh(surface.vertices, surface.faces, cameras)
    covered = fragments.covered
    corners = surface.vertices[surface.faces[fragments.face_id[covered]]]  # n 3 corners 3
    points = (fragments.barycentrics[covered][..., None] * corners).sum(1)
    image = torch.ones(*covered.shape, 3)
    device = next(scene.parameters(), points).device
    image[covered] = scene.material(points.to(device)).base_color.cpu().float()
    return image.permute(0, 3, 1, 2)


def fitted_surface(
    scene: Scene, cells_per_side: int, cameras: Sequence[Cameras], factors: Sequence[float] = FACTORS
) -> Surface:
    """The scene's surface at the iso factor whose picture differs least (mean square) from the scene's renders.

    The automatic iso value parts dense from thin matter; a wall that rays see as opaque because they cross all of it
    can be thinner than that and would come out with holes.

    Raises:
        ExportError: there is no surface even at the automatic iso value, or it is not finite.
    """
    seen = [(see(scene, views), views) for views in cameras]

    def candidates() -> Iterator[tuple[float, Surface]]:
        for factor in factors:
            surface = scene.surface(cells_per_side, iso_factor=factor)
            check_mesh(surface.vertices, surface.faces, "the scene's surface")
            error = sum(
                float((see_surface(scene, surface, views) - image).square().mean()) for image, views in seen
            )
            yield error, surface

    return min(candidates(), key=lambda pair: pair[0])[1]
