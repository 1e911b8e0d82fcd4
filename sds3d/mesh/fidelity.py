"""How well the exported file shows what the scene showed: PSNR and SSIM of the same views."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.interfaces import Cameras, Scene, Shading
from sds3d.mesh.textured import TexturedMesh, render_textured
from sds3d.rng import Stream

SSIM_WINDOW_PX = 11  # as in Wang et al. 2004


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Agreement of scene renders and renders of the exported file, over all pixels of all views."""

    psnr_db: float  # peak signal-to-noise ratio; 30 is a good copy
    ssim: float  # structural similarity, 1 is equal
    silhouette_iou: float  # overlap of the outlines (alpha > 0.5): shape alone
    worst_view_psnr_db: float


@torch.no_grad()
def compare(scene: Scene, mesh: TexturedMesh, cameras: Cameras, rng: Stream) -> Fidelity:
    """Render both from `cameras`, unlit, the scene in eval mode, and compare.

    Both stand before black in even views and before white in odd ones: no object can hide in front of both, as a
    grey one would before grey, with a high PSNR whatever its shape.
    """
    behind = (torch.arange(len(cameras)) % 2).float()[:, None].expand(-1, 3)
    was_training = scene.training
    scene.eval()
    try:
        shown = scene.render(cameras, Shading(mode="albedo", background=behind), rng)
    finally:
        scene.train(was_training)
    rgb, alpha, _ = render_textured(mesh, cameras, behind)
    return similarity(shown.rgb.cpu(), shown.alpha.cpu(), rgb, alpha)


def similarity(
    rgb: Float[Tensor, "b 3 H W"],
    alpha: Float[Tensor, "b 1 H W"],
    other_rgb: Float[Tensor, "b 3 H W"],
    other_alpha: Float[Tensor, "b 1 H W"],
) -> Fidelity:
    """Compare two stacks of pictures of the same views."""
    from kornia import metrics  # takes a second to import, and only exports need it

    views = [float(metrics.psnr(a, b, 1.0)) for a, b in zip(rgb, other_rgb, strict=True)]
    inside, other_inside = alpha > 0.5, other_alpha > 0.5
    union = int((inside | other_inside).sum())
    return Fidelity(
        psnr_db=float(metrics.psnr(rgb, other_rgb, 1.0)),
        ssim=float(metrics.ssim(rgb, other_rgb, SSIM_WINDOW_PX).mean()),
        silhouette_iou=int((inside & other_inside).sum()) / union if union else 1.0,
        worst_view_psnr_db=min(views),
    )
