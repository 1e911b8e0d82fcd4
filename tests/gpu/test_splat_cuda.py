"""Gaussian splatting on a GPU: gsplat and the torch reference against the reference on the CPU."""

import pytest
import torch

from sds3d import ops
from sds3d.cameras.orbit import orbit_cameras
from sds3d.ops.splat import rasterize_gaussians
from sds3d.rng import Stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STREAM = Stream(7, "splat-cuda")


def render(backend: ops.Backend, device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    count, views, px = 2000, 3, 96
    rng = STREAM.numpy_generator()
    values = [
        torch.from_numpy(rng.normal(0.0, 0.25, (count, 3))),
        torch.from_numpy(rng.normal(size=(count, 4))),
        torch.from_numpy(0.03 * rng.lognormal(0.0, 0.5, (count, 3))),
        torch.sigmoid(torch.from_numpy(rng.normal(size=count))),
        torch.from_numpy(rng.random((count, 3))),
        torch.from_numpy(rng.random((views, 3))),
    ]
    leaves = [value.float().to(device).requires_grad_(True) for value in values]
    full = torch.ones(views, device=device)
    azimuth = torch.arange(views, device=device) * 120.0
    cameras = orbit_cameras(azimuth, full * 20, full * 3.3, full * 40, px)
    with ops.use(backend):
        image = rasterize_gaussians(*leaves[:5], cameras, leaves[5])
    images = [image.rgb, image.alpha, image.depth]
    loss = sum(
        (x * STREAM.fork(f"cotangent{i}").normal(*x.shape, device=device)).sum() for i, x in enumerate(images)
    )
    gradients = torch.autograd.grad(loss, leaves)
    return [x.detach().cpu() for x in images], [x.cpu() for x in gradients]


@pytest.mark.parametrize("backend", ["cuda", "reference"])
def test_a_gpu_shows_what_the_cpu_shows(backend: ops.Backend) -> None:
    images, gradients = render("numba", "cpu")
    found_images, found_gradients = render(backend, "cuda")
    for found, wanted in zip(found_images, images, strict=True):
        assert (found - wanted).abs().max() < 0.02  # one splat more or less at the cut-off, 1/255, at a pixel
        assert (found - wanted).abs().mean() < 1e-4
    for found, wanted in zip(found_gradients, gradients, strict=True):
        assert (found - wanted).norm() / wanted.norm() < 5e-3
        assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.9999


def test_cuda_is_the_backend_of_cuda_tensors() -> None:
    assert ops.backend_for(torch.zeros(1, device="cuda")) == "cuda"
