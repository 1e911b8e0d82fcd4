import math
import sys
import types

import pytest
import torch

from sds3d import ops
from sds3d.ops import volume
from sds3d.ops.occupancy import OccupancyGrid
from sds3d.ops.volume import (
    RaySamples,
    accumulate,
    camera_rays,
    composite,
    composite_samples,
    sphere_interval,
)
from sds3d.rng import Stream

STREAM = Stream(5, "volume")


def rays(r: int = 40, s: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    density = STREAM.fork("density").normal(r, s).exp().double()
    return density, STREAM.fork("delta").uniform(r, s).double() * 0.2 + 0.01


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_weights_and_the_final_transmittance_sum_to_one(backend: ops.Backend) -> None:
    density, delta = rays()
    with ops.use(backend):
        weights, transmittance = composite(density, delta)
    final = transmittance[:, -1] * torch.exp(-density[:, -1] * delta[:, -1])
    torch.testing.assert_close(weights.sum(-1) + final, torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(final, torch.exp(-(density * delta).sum(-1)))


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_a_homogeneous_slab_absorbs_as_beer_lambert_says(backend: ops.Backend) -> None:
    sigma, length, count = 1.7, 0.9, 12
    density = torch.full((1, count), sigma, dtype=torch.float64)
    with ops.use(backend):
        weights, transmittance = composite(density, torch.full_like(density, length / count))
    assert math.isclose(weights.sum().item(), 1 - math.exp(-sigma * length), rel_tol=1e-12)
    expected = torch.exp(-sigma * length / count * torch.arange(count, dtype=torch.float64))
    torch.testing.assert_close(transmittance[0], expected)


def test_twins_agree_forward_and_backward() -> None:
    results = []
    for backend in ("reference", "numba"):
        density, delta = (value.requires_grad_(True) for value in rays())
        with ops.use(backend):
            weights, transmittance = composite(density, delta)
        cotangent = STREAM.fork("cotangent").normal(2, *weights.shape).double()
        loss = (weights * cotangent[0] + transmittance * cotangent[1]).sum()
        results.append((weights, transmittance, *torch.autograd.grad(loss, (density, delta))))
    for reference, other in zip(*results, strict=True):
        torch.testing.assert_close(other, reference, rtol=1e-10, atol=1e-12)


def test_reference_gradient_by_finite_differences() -> None:
    density, delta = (value[:3, :5].clone().requires_grad_(True) for value in rays())
    assert torch.autograd.gradcheck(volume.composite_reference, (density, delta))


def ragged() -> tuple[RaySamples, torch.Tensor]:
    live = STREAM.fork("live").uniform(9, 6) < 0.5
    live[4] = False
    ray, slot = live.nonzero().unbind(-1)
    start = slot.double() * 0.1
    samples = RaySamples(ray=ray, slot=slot, start=start, end=start + 0.1, at=start + 0.05, rays=9, slots=6)
    return samples, STREAM.fork("values").normal(ray.shape[0]).exp().double()


def test_packed_samples_composite_as_if_the_gaps_were_empty() -> None:
    samples, density = ragged()
    weights = composite_samples(density, samples)
    for ray in range(samples.rays):
        left = 1.0
        for i in (samples.ray == ray).nonzero()[:, 0]:
            alpha = 1 - math.exp(-density[i].item() * 0.1)
            assert math.isclose(weights[i].item(), left * alpha, rel_tol=1e-10)
            left *= 1 - alpha


def test_accumulation_sums_per_ray_and_leaves_empty_rays_zero() -> None:
    samples, values = ragged()
    total = accumulate(
        values, torch.ones(values.shape[0], 1, dtype=torch.float64), samples.ray, samples.rays
    )[:, 0]
    torch.testing.assert_close(total, samples.dense(values).sum(-1))
    assert total[4] == 0
    torch.testing.assert_close(samples.packed(samples.dense(values)), values)


def test_a_world_point_lies_on_the_ray_of_its_pixel() -> None:
    c2w = torch.eye(4).double()[None]
    c2w[0, :3, :3] = torch.linalg.qr(STREAM.fork("pose").normal(3, 3).double())[0]
    c2w[0, :3, 3] = torch.tensor([0.3, -1.0, 2.0])
    intrinsics = torch.tensor([[[50.0, 0, 16.5], [0, 60.0, 11.0], [0, 0, 1]]]).double()
    origins, directions, cosine = camera_rays(c2w, intrinsics, 32, 24)
    world = origins[0, 7, 20] + 2.5 * directions[0, 7, 20]
    local = c2w[0, :3, :3].T @ (world - c2w[0, :3, 3])
    pixel = intrinsics[0] @ local / local[2]
    torch.testing.assert_close(pixel[:2], torch.tensor([20.5, 7.5]).double())
    torch.testing.assert_close(local[2], 2.5 * cosine[0, 7, 20])
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(1, 24, 32).double())


def test_sphere_interval_ends_lie_on_the_sphere() -> None:
    origins = torch.tensor([[0.0, 0, 3], [0, 0, 3], [0, 0, 0.5], [0, 0, 3]]).double()
    aim = torch.tensor([[0.1, 0.2, -1], [1.0, 0, 0], [0.3, 1, 0], [0, 0, 1]]).double()
    directions = torch.nn.functional.normalize(aim, dim=-1)
    near, far, hit = sphere_interval(origins, directions, 1.2)
    assert hit.tolist() == [True, False, True, False]
    assert near[2] == 0
    for i, t in ((0, near[0]), (0, far[0]), (2, far[2])):
        assert math.isclose((origins[i] + t * directions[i]).norm().item(), 1.2, rel_tol=1e-12)


def half_space(points: torch.Tensor) -> torch.Tensor:
    return (points[:, 0] > 0).float()


def marched(grid: OccupancyGrid) -> RaySamples:
    towards = torch.nn.functional.normalize(-STREAM.fork("eye").normal(50, 3), dim=-1)
    origins = -3 * towards + STREAM.fork("aside").normal(50, 3) * 0.3
    near, far, hit = sphere_interval(origins, towards, 1.0)
    offset = STREAM.fork("offset").uniform(50)
    samples = grid.march(origins, towards, near, far, hit, offset, slots=20, step_m=0.1)
    points = origins[samples.ray] + samples.at[:, None] * towards[samples.ray]
    assert bool(grid.at(points).all())
    assert bool(((samples.start <= samples.at) & (samples.at < samples.end)).all())
    return samples


def test_marching_keeps_exactly_the_samples_in_occupied_cells() -> None:
    grid = OccupancyGrid(1.0, 8)
    every = marched(grid)
    assert every.ray.unique().numel() * 20 == every.ray.numel()  # a fresh grid culls nothing
    grid.update(0, half_space, STREAM)
    assert torch.equal(grid.occupied, (torch.arange(8) >= 4)[:, None, None].expand(8, 8, 8))
    half = marched(grid)
    assert 0 < half.ray.numel() < every.ray.numel()


def test_occupancy_repeats_resumes_and_leaves_the_global_generator_alone() -> None:
    def noisy(points: torch.Tensor) -> torch.Tensor:
        return (points.norm(dim=-1) < 0.6).float() * points[:, 1].abs()

    straight, stopped = OccupancyGrid(1.0, 8), OccupancyGrid(1.0, 8)
    before = torch.random.get_rng_state()
    for step in range(6):
        straight.update(step, noisy, STREAM.at(step), every=1, warmup_steps=2)
    for step in range(3):
        stopped.update(step, noisy, STREAM.at(step), every=1, warmup_steps=2)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(3)  # another process would find another global state
    resumed = OccupancyGrid(1.0, 8)
    resumed.load_state_dict(stopped.state_dict())
    for step in range(3, 6):
        resumed.update(step, noisy, STREAM.at(step), every=1, warmup_steps=2)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.fixture
def fresh_build():
    volume.nerfacc_cuda.cache_clear()
    yield
    volume.nerfacc_cuda.cache_clear()


@pytest.mark.usefixtures("fresh_build")
def test_a_failed_cuda_build_warns_once_and_names_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import cpp_extension

    def fail(**_: object) -> None:
        raise OSError("CUDA_HOME is not set")

    monkeypatch.setattr(cpp_extension, "load", fail)
    with pytest.warns(RuntimeWarning, match="CUDA_HOME is not set"):
        assert not volume.nerfacc_cuda()
    assert not volume.nerfacc_cuda()  # a second warning would be an error here


@pytest.mark.usefixtures("fresh_build")
def test_the_cuda_build_is_cpp17_and_lands_where_nerfacc_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    import nerfacc
    from torch.utils import cpp_extension

    asked: dict[str, object] = {}
    built = types.ModuleType("built")
    monkeypatch.setattr(cpp_extension, "load", lambda **options: asked.update(options) or built)
    monkeypatch.setattr(nerfacc, "csrc", None, raising=False)
    assert volume.nerfacc_cuda()
    assert nerfacc.csrc is built
    assert "-std=c++17" in asked["extra_cuda_cflags"]
    assert sum(path.endswith(".cu") for path in asked["sources"]) == 4


def test_cpu_work_never_imports_nerfaccs_cuda_code() -> None:
    grid = OccupancyGrid(1.0, 8)
    grid.update(0, half_space, STREAM)
    samples = marched(grid)
    composite_samples(torch.ones(samples.ray.shape[0]), samples)
    assert "nerfacc.cuda._backend" not in sys.modules
