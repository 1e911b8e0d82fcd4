import pytest
import torch

from sds3d import ops
from sds3d.interfaces import Cameras, Shading
from sds3d.ops.hashgrid import HashGrid, HashGridConfig
from sds3d.ops.volume import nerfacc_cuda
from sds3d.rng import Stream
from sds3d.scenes.nerf import NerfScene

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STREAM = Stream(13, "cuda")


def camera(device: str, px: int = 32) -> Cameras:
    c2w = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))[None]
    c2w[0, 2, 3] = 3.3
    intrinsics = torch.tensor([[[px * 1.37, 0, px / 2], [0, px * 1.37, px / 2], [0, 0, 1]]])
    zero = torch.zeros(1, device=device)
    return Cameras(
        c2w=c2w.to(device),
        intrinsics=intrinsics.to(device),
        width_px=px,
        height_px=px,
        azimuth_deg=zero,
        elevation_deg=zero,
        radius=zero + 3.3,
        fov_deg=zero + 40,
    )


def test_encoding_on_cuda_equals_the_cpu() -> None:
    grid = HashGrid(HashGridConfig(), STREAM)
    points = STREAM.fork("points").uniform(500, 3)
    cotangent = STREAM.fork("cotangent").normal(500, grid.width)
    found = []
    for device in ("cpu", "cuda"):
        grid = grid.to(device)
        encoded = grid(points.to(device))
        (gradient,) = torch.autograd.grad((encoded * cotangent.to(device)).sum(), grid.table)
        found.append((encoded.cpu(), gradient.cpu()))
    for cpu, cuda in zip(*found, strict=True):
        torch.testing.assert_close(cuda, cpu, atol=1e-5, rtol=1e-5)


def test_nerfacc_builds() -> None:
    assert nerfacc_cuda()


@pytest.mark.parametrize("packed", [True, False])
def test_render_on_cuda_equals_the_cpu(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packed:
        monkeypatch.setattr("sds3d.ops.volume.nerfacc_cuda", lambda: False)
        monkeypatch.setattr("sds3d.ops.occupancy.nerfacc_cuda", lambda: False)
    scene = NerfScene(NerfScene.Config(samples_per_ray=256), STREAM).eval()
    cpu = scene.render(camera("cpu"), Shading(), STREAM)
    cuda = scene.to("cuda").render(camera("cuda"), Shading(), STREAM)
    # nerfacc's bins start at the edge of the ball and have one length; ours divide each chord.
    bound = 2e-2 if packed else 1e-4
    torch.testing.assert_close(cuda.rgb.cpu(), cpu.rgb, atol=bound, rtol=0)
    torch.testing.assert_close(cuda.alpha.cpu(), cpu.alpha, atol=bound, rtol=0)


def test_packed_weights_equal_dense_weights_forward_and_backward() -> None:
    from sds3d.ops.volume import composite_samples

    scene = NerfScene(NerfScene.Config(), STREAM).to("cuda").eval()
    view = scene.render(camera("cuda"), Shading(), STREAM)
    samples = view.private.samples
    density = STREAM.fork("density").uniform(samples.ray.shape[0], device="cuda").requires_grad_(True)
    cotangent = STREAM.fork("cotangent").normal(samples.ray.shape[0], device="cuda")
    found = []
    for backend in ("cuda", "reference"):
        with ops.use(backend):
            weights = composite_samples(density, samples)
        found.append((weights, *torch.autograd.grad((weights * cotangent).sum(), density)))
    for packed, dense in zip(*found, strict=True):
        torch.testing.assert_close(packed, dense, atol=1e-5, rtol=1e-4)


def test_a_step_trains_and_refreshes_occupancy() -> None:
    scene = NerfScene(NerfScene.Config(), STREAM).to("cuda")
    view = scene.render(camera("cuda"), Shading(), STREAM)
    (view.rgb.mean() + scene.penalties(view)["distortion"]).backward()
    assert torch.isfinite(scene.field.encoding.table.grad).all()
    scene.adapt(view, None, 0)
    assert 0 < scene.occupancy.occupied.float().mean() < 1
