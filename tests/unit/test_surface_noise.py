"""Surface noise is white in every view and agrees between views; with it SDS becomes consistent flow distillation."""

import math
from itertools import pairwise

import pytest
import torch

from sds3d.cameras.light import ShadingConfig, ShadingLaw
from sds3d.cameras.orbit import orbit_cameras
from sds3d.cameras.sample import CameraConfig, CameraLaw
from sds3d.config.ramp import Ramp
from sds3d.guidance import SDS
from sds3d.guidance.noise import NOISES
from sds3d.guidance.surface_noise import SurfaceNoise, unshuffle_factor
from sds3d.guidance.terms import Term
from sds3d.guidance.time import AnnealedTime
from sds3d.guide import Guide
from sds3d.interfaces import Cameras, NoiseSource, Render, attach_gradient
from sds3d.mathx.ode import ddim_step
from sds3d.mathx.schedule import TableSchedule
from sds3d.moment import Moment
from sds3d.ops.backend import use
from sds3d.ops.surface_noise import surface_noise
from sds3d.optim import Optimizer, OptimizerConfig
from sds3d.optimize import Loop, Parts, PenaltyConfig
from sds3d.priors.analytic import AnalyticPrior, Mixture
from sds3d.priors.text import PromptingConfig, TextBank
from sds3d.rng import Stream, Streams
from tests.toys import CanvasScene, draw_at, told

PX = 64
STREAM = Stream(0, "diffusion/noise")
AROUND = [(0.0, 0.0), (40.0, 20.0), (130.0, 65.0), (250.0, -10.0)]  # azimuth, elevation
SD_TABLE = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


def cameras_at(angles: list[tuple[float, float]], size_px: int = PX, radius: float = 3.3) -> Cameras:
    azimuth, elevation = torch.tensor(angles, dtype=torch.float64).T
    same = torch.ones_like(azimuth)
    return orbit_cameras(azimuth, elevation, radius * same, 40.0 * same, size_px)


def rays(cameras: Cameras) -> tuple[torch.Tensor, torch.Tensor]:
    """Camera centres and directions (b, h, w, 3) with z = 1 along the camera axis."""
    k = cameras.intrinsics[0]
    at = torch.arange(cameras.width_px, dtype=torch.float64) + 0.5
    x, y = torch.meshgrid((at - k[0, 2]) / k[0, 0], (at - k[1, 2]) / k[1, 1], indexing="xy")
    local = torch.stack([x, y, torch.ones_like(x)], dim=-1)
    return cameras.c2w[:, None, None, :3, 3], torch.einsum("bij,hwj->bhwi", cameras.c2w[:, :3, :3], local)


def sphere_depth(cameras: Cameras, radius: float = 0.9) -> torch.Tensor:
    origin, ray = rays(cameras)
    a, b, c = (ray * ray).sum(-1), (ray * origin).sum(-1), (origin * origin).sum(-1) - radius**2
    inside = b * b - a * c
    return torch.where(inside > 0, (-b - inside.clamp(min=0.0).sqrt()) / a, 0.0)


def box_depth(cameras: Cameras) -> torch.Tensor:
    origin, ray = rays(cameras)
    half = torch.tensor([0.6, 0.7, 0.5], dtype=torch.float64)
    first, second = (-half - origin) / ray, (half - origin) / ray
    near, far = torch.minimum(first, second).amax(-1), torch.maximum(first, second).amin(-1)
    return torch.where(near < far, near, 0.0)


SHAPES = {"sphere": sphere_depth, "box": box_depth}


def draw(
    depth: torch.Tensor, cameras: Cameras, channels: int = 4, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    noise, covered = surface_noise(
        depth.float(), cameras, (channels, PX, PX), **{"cell_m": 0.0225, "seed": 1, **options}
    )
    return noise.double(), covered


def view_of(depth: torch.Tensor, alpha: float = 1.0) -> Render:
    """A render with an expected depth: alpha times the surface's."""
    seen = (depth > 0).float()[:, None] * alpha
    return Render(rgb=seen.expand(-1, 3, -1, -1), alpha=seen, depth=depth.float()[:, None] * alpha)


def source(gamma: float = 0.0, **options) -> SurfaceNoise:
    return SurfaceNoise(SurfaceNoise.Config(gamma=Ramp.constant(gamma), **options))


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())


# --- one view is white -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("age", [0.0, 0.7])
def test_every_view_is_standard_normal_and_white(shape: str, age: float) -> None:
    cameras = cameras_at(AROUND)
    depth = SHAPES[shape](cameras)
    noise, covered = draw(depth, cameras, channels=32, age=age)
    assert covered.double().sum() > 0.97 * (depth > 0).sum()
    for index in range(len(AROUND)):
        for part in (covered[index], ~covered[index]):
            values = noise[index][:, part]
            assert values.mean().abs() < 0.02
            assert values.var() == pytest.approx(1.0, abs=0.02)
            assert values.pow(4).mean() == pytest.approx(3.0, abs=0.15)
        for dim in (1, 2):
            before, after = (noise[index].narrow(dim, s, PX - 1) for s in (0, 1))
            assert abs(correlation(before, after)) < 0.02
            both = covered[index].narrow(dim - 1, 0, PX - 1) & covered[index].narrow(dim - 1, 1, PX - 1)
            assert abs(correlation(before[:, both], after[:, both])) < 0.02
        assert abs(correlation(noise[index, :-1], noise[index, 1:])) < 0.02


def test_variance_of_each_pixel_is_exactly_one_over_seeds() -> None:
    """Over 800 textures every pixel's variance is 1 within sampling error, silhouettes and grazing pixels included."""
    cameras = cameras_at(AROUND[1:2])
    depth = sphere_depth(cameras)
    square, cross, count = torch.zeros(PX, PX), torch.zeros(PX, PX - 1), 800
    for seed in range(count // 80):
        noise, _ = draw(depth, cameras, channels=80, seed=seed)
        square += noise[0].square().sum(0)
        cross += (noise[0, :, :, 1:] * noise[0, :, :, :-1]).sum(0)
    deviations = (square / count - 1.0) / math.sqrt(2.0 / count)
    assert deviations.abs().max() < 5.0
    assert deviations.std() == pytest.approx(1.0, abs=0.06)
    assert (cross / math.sqrt(count)).std() == pytest.approx(1.0, abs=0.06)


# --- two views agree ---------------------------------------------------------------------------------------------


def patches(shape: str, first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """Correlation of a pixel with the pixel of the other view that holds most of its patch, and the share held."""
    cameras, fine_px = cameras_at([first, second]), 8 * PX
    noise, covered = draw(SHAPES[shape](cameras), cameras, channels=16)
    fine = cameras_at([first], fine_px)
    origin, ray = rays(fine)
    depth = SHAPES[shape](fine)
    points = (origin + ray * depth[..., None])[0]
    local = (points - cameras.c2w[1, :3, 3]) @ cameras.c2w[1, :3, :3]
    k = cameras.intrinsics[1]
    x = (local[..., 0] / local[..., 2] * k[0, 0] + k[0, 2]).floor().long()
    y = (local[..., 1] / local[..., 2] * k[1, 1] + k[1, 2]).floor().long()
    held = SHAPES[shape](cameras)[1][y.clamp(0, PX - 1), x.clamp(0, PX - 1)]
    seen = (depth[0] > 0) & ((held - local[..., 2]).abs() < 0.05)
    where = (
        torch.where(seen, y * PX + x, -1)
        .unflatten(1, (PX, 8))
        .unflatten(0, (PX, 8))
        .transpose(1, 2)
        .flatten(2)
    )
    most = where.mode(-1).values
    share = (where == most[..., None]).double().mean(-1)
    good = (where >= 0).all(-1) & covered[0]
    return correlation(noise[0][:, good], noise[1].flatten(1)[:, most[good]]), float(share[good].mean())


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize(("turn_deg", "least"), [(1.0, 0.85), (5.0, 0.85), (12.0, 0.8), (30.0, 0.6)])
def test_a_patch_keeps_its_noise_in_nearby_views(shape: str, turn_deg: float, least: float) -> None:
    """The correlation comes near the overlap of the two pixels (0.5 to 0.7), the most that white views allow.

    Over large turns pixels of unlike area meet, which lowers the bound.
    """
    found, overlap = patches(shape, (25.0, 12.0), (25.0 + turn_deg, 12.0 + turn_deg / 4))
    assert overlap > 0.45
    assert found > least * overlap


def test_the_same_camera_sees_the_same_noise_and_others_see_the_background_alike() -> None:
    cameras = cameras_at([AROUND[1], AROUND[1], AROUND[2]])
    noise, covered = draw(sphere_depth(cameras), cameras)
    assert torch.equal(noise[0], noise[1])
    beside = ~covered[0] & ~covered[2]
    assert torch.equal(noise[0][:, beside], noise[2][:, beside])
    on_both = covered[0] & covered[2]
    assert abs(correlation(noise[0][:, on_both], noise[2][:, on_both])) < 0.03


def test_front_and_back_are_independent_also_when_mirrored() -> None:
    cameras = cameras_at([(0.0, 0.0), (180.0, 0.0)])
    noise, covered = draw(sphere_depth(cameras), cameras, channels=16)
    both = covered[0] & covered[1]
    for back in (noise[1], noise[1].flip(2), noise[1].flip(1), noise[1].flip(1, 2)):
        assert abs(correlation(noise[0][:, both], back[:, both])) < 0.02


def test_what_stands_before_and_behind_have_noise_of_their_own() -> None:
    """Two parallel walls seen along one ray: as a disc map without depth layers would confuse them."""
    cameras = cameras_at([(0.0, 0.0)])
    wall = torch.ones(1, PX, PX, dtype=torch.float64)
    near, _ = draw(3.0 * wall, cameras, channels=16)
    far, _ = draw(3.1 * wall, cameras, channels=16)
    again, _ = draw(3.0 * wall, cameras, channels=16)
    assert torch.equal(near, again)
    assert abs(correlation(near, far)) < 0.02


def test_a_tilted_plane_is_followed_between_the_pixels_of_a_coarse_depth_map() -> None:
    """Inverse depth of a plane is linear in the image: from 16 px the noise is that of 64 px."""
    noises = []
    for size in (16, 64):
        cameras = cameras_at([(0.0, 0.0)], size)
        _, ray = rays(cameras)
        depth = 3.3 / (1.0 + 0.5 * ray[..., 0] + 0.8 * ray[..., 1])
        noises.append(draw(depth, cameras)[0])
    assert correlation(*noises) > 0.995


def test_depth_maps_of_any_size_serve() -> None:
    found = []
    for size in (32, 64, 128):
        cameras = cameras_at([AROUND[1]], size)
        noise, covered = draw(sphere_depth(cameras), cameras)
        found.append((noise[0], covered[0]))
    (coarse, a), (exact, b), (fine, c) = found
    assert correlation(exact[:, b & c], fine[:, b & c]) > 0.9
    assert correlation(exact[:, a & b], coarse[:, a & b]) > 0.8


# --- twins -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("age", [0.0, 0.3, 20.0])
@pytest.mark.parametrize("samples", [1, 3])
def test_numba_equals_the_reference(age: float, samples: int) -> None:
    cameras = cameras_at(AROUND)
    depth = box_depth(cameras) * (
        1 + 0.02 * torch.rand(4, PX, PX, generator=torch.Generator().manual_seed(0))
    )
    options = {"channels": 3, "age": age, "samples": samples, "seed": 2**62 + 11}
    fast, fast_covered = draw(depth, cameras, **options)
    with use("reference"):
        slow, slow_covered = draw(depth, cameras, **options)
    assert torch.equal(fast_covered, slow_covered)
    torch.testing.assert_close(fast, slow, rtol=0, atol=2e-6)


def test_far_and_odd_depths_do_no_harm() -> None:
    cameras = cameras_at([(0.0, 0.0)])
    depth = torch.full((1, PX, PX), 1e-4, dtype=torch.float64)
    depth[:, :20], depth[:, 20:40] = 1e7, 0.0
    noise, covered = draw(depth, cameras)
    assert noise.isfinite().all()
    assert not covered[:, 20:40].any()
    assert noise.var() == pytest.approx(1.0, abs=0.05)


# --- the noise source --------------------------------------------------------------------------------------------


def sample(
    noise: NoiseSource, step: int, angles=AROUND, shape=(3, PX, PX), alpha: float = 1.0
) -> torch.Tensor:
    cameras = cameras_at(angles)
    view = view_of(sphere_depth(cameras), alpha)
    return noise.sample((len(angles), *shape), view, cameras, Moment(step, 1000), STREAM.at(step)).double()


def test_it_is_in_the_table() -> None:
    assert NOISES["surface"] is SurfaceNoise


def test_expected_depth_is_divided_by_alpha_and_thin_haze_is_background() -> None:
    solid, half, haze = (sample(source(), 0, alpha=alpha) for alpha in (1.0, 0.5, 0.05))
    torch.testing.assert_close(solid, half)
    assert torch.equal(haze[0], haze[1])
    assert abs(correlation(solid[:, :, 24:40, 24:40], haze[:, :, 24:40, 24:40])) < 0.05


def test_permuting_cameras_permutes_noise() -> None:
    order = [2, 0, 3, 1]
    whole = sample(source(), 0)
    shuffled = sample(source(), 0, [AROUND[i] for i in order])
    assert torch.equal(whole[order], shuffled)


def test_runs_are_repeatable_and_seeds_differ() -> None:
    cameras = cameras_at(AROUND)
    view = view_of(sphere_depth(cameras))
    a, b, c = (
        source().sample((4, 3, PX, PX), view, cameras, Moment(0, 9), Stream(seed, "n")) for seed in (0, 0, 1)
    )
    assert torch.equal(a, b)
    assert abs(correlation(a.double(), c.double())) < 0.02


def test_an_unshuffled_image_gets_noise_that_sticks_to_the_pixel() -> None:
    assert [unshuffle_factor(c) for c in (3, 4, 12, 16, 48)] == [1, 1, 2, 1, 4]
    flat, blocks = sample(source(), 0), sample(source(), 0, shape=(48, 16, 16))
    assert torch.equal(torch.nn.functional.pixel_unshuffle(flat, 4), blocks)
    latent = sample(source(pixel_unshuffle=1), 0, shape=(48, 16, 16))
    assert latent.var() == pytest.approx(1.0, abs=0.02)
    assert abs(correlation(latent, blocks)) < 0.02


def test_gamma_zero_keeps_the_noise_and_gamma_one_is_fresh() -> None:
    kept, fresh = source(0.0), source(1.0)
    first = sample(kept, 0)
    assert torch.equal(first, sample(kept, 1))
    steps = [sample(fresh, step) for step in range(4)]
    for i in range(4):
        assert steps[i].var() == pytest.approx(1.0, abs=0.05)
        for j in range(i):
            assert abs(correlation(steps[i], steps[j])) < 0.02


def test_rules_that_share_a_step_share_its_noise() -> None:
    noise = source(0.3)
    assert torch.equal(sample(noise, 0), sample(noise, 0))
    assert torch.equal(sample(noise, 1), sample(noise, 1))


@pytest.mark.parametrize("gamma", [1e-4, 0.01, 0.1, 0.5])
def test_gamma_renews_as_the_recursion_does(gamma: float) -> None:
    """eps <- sqrt(1 - gamma) eps + sqrt(gamma) n has correlation (1 - gamma)^(k/2) over k steps, and variance 1."""
    cameras = cameras_at(AROUND[:1])
    view = view_of(sphere_depth(cameras))
    noise = source(gamma)
    first, lags, found = None, (1, 5, 40), []
    for step in range(41):
        now, stream = Moment(step, 1000), STREAM.at(step)
        if step == 0 or step in lags:
            value = noise.sample((1, 32, PX, PX), view, cameras, now, stream).double()
            assert value.var() == pytest.approx(1.0, abs=0.02)
            first = value if first is None else first
            found.append(correlation(first, value))
        else:
            noise._renew(now)
    expected = [(1 - gamma) ** (lag / 2) for lag in (0, *lags)]
    assert found == pytest.approx(expected, abs=0.015)


def test_gamma_may_move_over_the_run() -> None:
    noise = SurfaceNoise(SurfaceNoise.Config(gamma=Ramp(start=0.2, end=0.0)))
    for step in range(1000):
        noise._renew(Moment(step, 1000))
    expected = -0.5 * sum(math.log1p(-0.2 * (1 - step / 1000)) for step in range(1, 1000))
    assert float(noise.age) == pytest.approx(expected)


def test_background_is_one_image_or_fresh() -> None:
    fixed, fresh = source(0.0), source(0.0, background="fresh")
    cameras = cameras_at(AROUND)
    beside = (sphere_depth(cameras) == 0)[:, None].expand(-1, 3, -1, -1)
    a, b = sample(fixed, 0), sample(fixed, 1)
    assert torch.equal(a, b)
    assert torch.equal(a[0, :, :4], a[3, :, :4])
    c, d = sample(fresh, 0), sample(fresh, 1)
    # All but a few pixels at the silhouette that own no cell.
    assert (c[~beside] == a[~beside]).double().mean() > 0.98
    assert (c[~beside] == d[~beside]).double().mean() > 0.98
    assert abs(correlation(c[beside], d[beside])) < 0.03
    assert abs(correlation(c[0, :, :4], c[3, :, :4])) < 0.1
    assert c[beside].var() == pytest.approx(1.0, abs=0.03)


def test_cells_keep_their_size_when_the_cameras_move_back() -> None:
    noise = source()
    sample(noise, 0)
    size = float(noise.cell_m)
    assert size == pytest.approx(0.6 * 2 * 3.3 * math.tan(math.radians(20)) / PX)
    cameras = cameras_at(AROUND, radius=5.0)
    noise.sample((4, 3, PX, PX), view_of(sphere_depth(cameras)), cameras, Moment(1, 1000), STREAM)
    assert float(noise.cell_m) == size


# --- consistent flow distillation --------------------------------------------------------------------------------


def canvas_loop(steps: int, gamma: float, seed: int = 0) -> Loop:
    prior = AnalyticPrior(
        {
            "y": Mixture.gaussian(torch.full((3, 8, 8), 0.7), 0.25),
            "": Mixture.gaussian(torch.full((3, 8, 8), 0.5), 0.25),
        }
    )
    scene = CanvasScene(8)
    guide = Guide(
        prior=prior,
        terms=(Term(rule=SDS(SDS.Config(cfg_scale=1.0), prior)),),
        bank=TextBank(prior, "y", "", PromptingConfig(view_dependent=False)),
        time=AnnealedTime(AnnealedTime.Config(t=Ramp(start=0.98, end=0.02))),
        noise=source(gamma),
        streams=Streams(seed),
    )
    parts = Parts(
        scene=scene,
        guide=guide,
        camera=CameraLaw(CameraConfig(batch=2, render_px=Ramp.constant(8.0))),
        shading=ShadingLaw(ShadingConfig()),
        optimizer=Optimizer(scene.groups(), OptimizerConfig()),
        penalties=PenaltyConfig(),
        streams=Streams(seed),
    )
    return Loop(parts, steps)


@pytest.mark.parametrize("gamma", [0.0, 0.2, 1.0])
def test_twenty_steps_equal_ten_save_load_ten(gamma: float) -> None:
    whole, first, second = (canvas_loop(20, gamma) for _ in range(3))
    whole.run(20, lambda event: None)
    first.run(10, lambda event: None)
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    second.run(20, lambda event: None)
    assert torch.equal(whole.parts.scene.image, second.parts.scene.image)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def mixture_prior(shape: tuple[int, int, int]) -> AnalyticPrior:
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    mixture = Mixture(
        means=means,
        variances=torch.tensor([0.1, 0.2, 0.05], dtype=torch.float64),
        weights=torch.ones(3, dtype=torch.float64),
    )
    null = Mixture.gaussian(torch.zeros(shape, dtype=torch.float64), 1.0)
    return AnalyticPrior({"y": mixture, "": null}, TableSchedule(SD_TABLE))


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_on_an_image_it_is_ddim_sampling(scale: float) -> None:
    """Gamma 0, uniform weight, SGD with rate lambda_i - lambda_(i+1): x_i + lambda_i eps is DDIM's x_t / alpha_t."""
    shape = (4, 8, 8)
    prior = mixture_prior(shape)
    text, null = prior.encode_text(["y", ""])
    cond = told(text, null, 2)
    rule = SDS(SDS.Config(cfg_scale=scale, weight="uniform"), prior)
    cameras, noise = cameras_at(AROUND[:2]), source(0.0)
    view = view_of(torch.zeros(2, PX, PX, dtype=torch.float64))

    times = torch.linspace(0.999, 0.02, 60, dtype=torch.float64)
    x = torch.zeros(2, *shape, dtype=torch.float64, requires_grad=True)
    sampled = None
    for i, (t, later) in enumerate(pairwise(times)):
        eps = noise.sample((2, *shape), view, cameras, Moment(i, 60), STREAM.at(i)).double()
        now, then = (torch.full((2,), float(value), dtype=torch.float64) for value in (t, later))
        a, s = prior.schedule.alpha(now), prior.schedule.sigma(now)
        if sampled is None:
            sampled = s * eps
        guided = prior.eps(sampled, now, cond.as_base(), cond.as_text())
        guided = guided[0] + scale * (guided[1] - guided[0])
        sampled = ddim_step(sampled, guided, prior.schedule, now, then)
        residual = rule.residual(x.detach(), draw_at([float(t)] * 2, eps, prior.schedule), cond)
        (grad,) = torch.autograd.grad(2 * attach_gradient(x, residual.grad), x)
        fall = s / a - prior.schedule.sigma(then) / prior.schedule.alpha(then)
        x = (x.detach() - fall * grad).requires_grad_()
        a, s = prior.schedule.alpha(then), prior.schedule.sigma(then)
        torch.testing.assert_close(a * x.detach() + s * eps, sampled, rtol=0, atol=1e-6)


SPREAD, MEAN = 0.5, 0.7


def euler(levels: int) -> torch.Tensor:
    """Levels lambda of the SD schedule from t = 999 to 0, and 0."""
    lam = ((1 - SD_TABLE) / SD_TABLE).sqrt().flip(0)
    picked = torch.linspace(0, 999, levels).round().long()
    return torch.cat([lam[picked], torch.zeros(1, dtype=torch.float64)])


def flow(lam: torch.Tensor, noise: torch.Tensor, mean: float) -> torch.Tensor:
    """End of dx = (eps_hat(x + lambda eps) - eps) dlambda from x = 0 on N(mean, SPREAD^2); `noise` (levels, n)."""
    x = torch.zeros_like(noise[0])
    for here, then, eps in zip(lam[:-1], lam[1:], noise, strict=True):
        x = x + (then - here) * (here * (x + here * eps - mean) / (SPREAD**2 + here**2) - eps)
    return x


def exact_std(levels: int, gamma: float) -> float:
    """The same for eps <- sqrt(1 - gamma) eps + sqrt(gamma) n: x is linear in eps, whose covariance is known."""
    effect = flow(euler(levels), torch.eye(levels, dtype=torch.float64), 0.0)
    steps = torch.arange(levels, dtype=torch.float64)
    covariance = (1.0 - gamma) ** ((steps[:, None] - steps).abs() / 2)
    return float((effect @ covariance @ effect).sqrt())


def renewed(levels: int, gamma: float) -> torch.Tensor:
    """Surface noise of `levels` steps, (levels, n)."""
    cameras, noise = cameras_at(AROUND[:1], 16), source(gamma)
    view = view_of(sphere_depth(cameras))
    shape = (1, 24, 16, 16)
    steps = (noise.sample(shape, view, cameras, Moment(i, levels), STREAM.at(i)) for i in range(levels))
    return torch.stack([step.double().flatten() for step in steps])


def test_the_end_on_a_gaussian_is_the_sample_that_the_noise_names() -> None:
    """mu + s (lambda_T eps - mu) / sqrt(s^2 + lambda_T^2), nearly mu + s eps."""
    lam, eps = euler(1000), renewed(1, 0.0)
    found = flow(lam, eps.expand(1000, -1), MEAN)
    top = float(lam[0])
    expected = MEAN + SPREAD * (top * eps[0] - MEAN) / math.sqrt(SPREAD**2 + top**2)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    torch.testing.assert_close(found, MEAN + SPREAD * eps[0], rtol=0, atol=0.05)


@pytest.mark.parametrize(("gamma", "std"), [(1e-3, 0.46), (1e-2, 0.38), (1e-1, 0.17), (1.0, 0.04)])
def test_renewal_turns_sampling_into_mode_seeking(gamma: float, std: float) -> None:
    """Published figures at 1000 levels follow from the covariance, and surface noise has that covariance."""
    assert exact_std(1000, gamma) == pytest.approx(std, rel=0.1)
    ends = flow(euler(150), renewed(150, gamma), MEAN)
    assert ends.std() == pytest.approx(exact_std(150, gamma), rel=0.03)
    assert ends.mean() == pytest.approx(MEAN, abs=0.06)
