"""How well the exported file shows what the scene showed: PSNR and SSIM of the same views."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.interfaces import Cameras, Scene, Shading
from sds3d.mesh.file_facts import face_areas
from sds3d.mesh.textured import Pixels, TexturedMesh, base_color, render_textured
from sds3d.rng import Stream
from sds3d.slices import Slice

SSIM_WINDOW_PX = 11  # as in Wang et al. 2004
SAMPLES = 20_000  # surface points at which base colours are compared
VIEWS_AT_ONCE = 4  # what bounds the memory of a volume scene's render


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """Agreement of two stacks of pictures, over all pixels of all views."""

    psnr_db: float  # peak signal-to-noise ratio; 30 is a good copy
    ssim: float  # structural similarity, 1 is equal
    silhouette_iou: float  # overlap of the outlines (alpha > 0.5): shape alone
    worst_view_psnr_db: float


@dataclass(frozen=True, kw_only=True)
class Fidelity(Likeness):
    """Agreement of scene and exported file."""

    albedo_difference: (
        float  # mean absolute difference of base colour over the file's surface, sRGB in [0, 1]
    )
    views: int
    size_px: int


@torch.no_grad()
def compare(scene: Scene, mesh: TexturedMesh, cameras: Cameras, rng: Stream) -> Fidelity:
    """Render both from `cameras`, unlit, the scene in eval mode and a few views at a time, and compare.

    Both stand before black in even views and before white in odd ones: no object can hide in front of both, as a
    grey one would before grey, with a high PSNR whatever its shape.
    """
    behind = (torch.arange(len(cameras)) % 2).float()[:, None].expand(-1, 3)
    device = next(scene.parameters(), behind).device
    was_training = scene.training
    scene.eval()
    shown = []
    try:
        for part in Slice.whole(len(cameras)).pieces(VIEWS_AT_ONCE):
            shading = Shading(mode="albedo", background=behind)
            view = scene.render(part.of(cameras).to(device), part.of(shading).to(device), rng)
            shown.append((view.rgb.cpu(), view.alpha.cpu()))
    finally:
        scene.train(was_training)
    rgb, alpha = (torch.cat(parts) for parts in zip(*shown, strict=True))
    pictured = similarity(rgb, alpha, *render_textured(mesh, cameras, behind)[:2])
    return Fidelity(
        **vars(pictured),
        albedo_difference=albedo_difference(scene, mesh, rng.fork("albedo")),
        views=len(cameras),
        size_px=cameras.width_px,
    )


def similarity(
    rgb: Float[Tensor, "b 3 H W"],
    alpha: Float[Tensor, "b 1 H W"],
    other_rgb: Float[Tensor, "b 3 H W"],
    other_alpha: Float[Tensor, "b 1 H W"],
) -> Likeness:
    """Compare two stacks of pictures of the same views."""
    from kornia import metrics  # takes a second to import, and only exports need it

    views = [float(metrics.psnr(a, b, 1.0)) for a, b in zip(rgb, other_rgb, strict=True)]
    inside, other_inside = alpha > 0.5, other_alpha > 0.5
    union = int((inside | other_inside).sum())
    return Likeness(
        psnr_db=float(metrics.psnr(rgb, other_rgb, 1.0)),
        ssim=float(metrics.ssim(rgb, other_rgb, SSIM_WINDOW_PX).mean()),
        silhouette_iou=int((inside & other_inside).sum()) / union if union else 1.0,
        worst_view_psnr_db=min(views),
    )


@torch.no_grad()
def albedo_difference(scene: Scene, mesh: TexturedMesh, rng: Stream, samples: int = SAMPLES) -> float:
    """Mean absolute difference of base colour (sRGB in [0, 1]) between file and scene, evenly over the file's surface.

    `mesh` lies in the scene's metres. The scene is asked at the very point of the surface, at depth 0.
    """
    areas = face_areas(mesh.vertices, mesh.faces)
    drawn = rng.uniform(samples, 3)
    face = torch.searchsorted(areas.cumsum(0) / areas.sum(), drawn[:, 0].double()).clamp(max=len(areas) - 1)
    # Evenly over a triangle: the square root undoes the crowding at one corner.
    root = drawn[:, 1].sqrt()
    weights = torch.stack([1.0 - root, root * (1.0 - drawn[:, 2]), root * drawn[:, 2]], dim=1)[..., None]
    at = Pixels(corners=mesh.faces[face], weights=weights, eye=torch.zeros(samples, 3))
    device = next(scene.parameters(), weights).device
    wanted = scene.material(at.mean(mesh.vertices).to(device)).base_color.cpu()
    return float((base_color(mesh, at) - wanted).abs().mean())
