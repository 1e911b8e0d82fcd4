import math

import pytest
import torch

from sds3d import ops
from sds3d.interfaces import Cameras
from sds3d.ops import voxel
from sds3d.ops.voxel import EMPTY_LOGIT, OPAQUE, VoxelImage, march_voxels
from sds3d.ops.voxel_grid import assemble_levels, grid_variation
from sds3d.rng import Stream

STREAM = Stream(3, "voxel")
HALF = 1.05


def cameras(azimuth: list[float], elevation: list[float], px: int = 20, dtype=torch.float32) -> Cameras:
    a, e = torch.tensor(azimuth).deg2rad(), torch.tensor(elevation).deg2rad()
    outward = torch.stack([a.sin() * e.cos(), e.sin(), a.cos() * e.cos()], -1)
    right = torch.stack([a.cos(), torch.zeros_like(a), -a.sin()], -1)
    c2w = torch.eye(4).repeat(len(a), 1, 1)
    c2w[:, :3, :3] = torch.stack([right, -torch.linalg.cross(outward, right), -outward], -1)
    c2w[:, :3, 3] = outward * 3.3
    focal = px / 2 / math.tan(math.radians(20))
    intrinsics = torch.tensor([[focal, 0, px / 2], [0, focal, px / 2], [0, 0, 1]]).repeat(len(a), 1, 1)
    return Cameras(
        c2w=c2w.to(dtype),
        intrinsics=intrinsics.to(dtype),
        width_px=px,
        height_px=px,
        azimuth_deg=a.rad2deg(),
        elevation_deg=e.rad2deg(),
        radius=torch.full_like(a, 3.3),
        fov_deg=torch.full_like(a, 40.0),
    )


def axes(size: tuple[int, int, int]) -> tuple[torch.Tensor, ...]:
    z, y, x = (torch.linspace(-HALF, HALF, n) for n in size)
    return torch.meshgrid(z, y, x, indexing="ij")


def object_grid(size: tuple[int, int, int] = (18, 22, 26)) -> torch.Tensor:
    """A rough ball with a floater and random colours; most of the box is empty."""
    z, y, x = axes(size)
    near = torch.minimum(
        (x.square() + y.square() + z.square()).sqrt() - 0.6,
        (x + 0.8).abs().maximum((y - 0.7).abs()).maximum(z.abs()) - 0.15,
    )
    logit = (-20 * near + STREAM.fork("rough").normal(*size)).clamp(-9, 5)
    return torch.cat([logit[..., None], STREAM.fork("color").uniform(*size, 3)], -1)


def hazy_grid(size: tuple[int, int, int] = (18, 18, 18)) -> torch.Tensor:
    """No empty space at all."""
    return torch.cat([STREAM.fork("haze").normal(*size, 1) - 2, STREAM.fork("color").uniform(*size, 3)], -1)


def march(
    grid: torch.Tensor, cams: Cameras, background: torch.Tensor, normals: bool = False, step: float = 0.05
) -> VoxelImage:
    jitter = STREAM.fork("jitter").uniform(len(cams), cams.height_px, cams.width_px).to(grid.dtype)
    return march_voxels(
        grid,
        cams,
        background,
        half_extent=HALF,
        step_m=step,
        density_scale=12.0,
        jitter=jitter,
        with_normals=normals,
    )


def close(value: torch.Tensor, reference: torch.Tensor, bound: float = 1e-4) -> None:
    """Relative in the L2 norm, and no single element off by more than 50 times that share of the largest."""
    error = value - reference
    assert error.norm() <= bound * reference.norm()
    assert error.abs().max() <= 50 * bound * reference.abs().max()


VIEWS = ([20.0, 200.0, 95.0], [10.0, -35.0, 80.0])


@pytest.mark.parametrize("make", [object_grid, hazy_grid])
@pytest.mark.parametrize("normals", [False, True])
def test_twins_agree_forward_and_backward(make, normals: bool) -> None:
    cams = cameras(*VIEWS)
    results = []
    for backend in ("reference", "numba"):
        grid, background = make().requires_grad_(), STREAM.fork("bg").uniform(3, 3).requires_grad_()
        with ops.use(backend):
            image = march(grid, cams, background, normals)
        parts = [image.rgb, image.alpha, image.depth] + ([image.normal] if normals else [])
        loss = sum((part * STREAM.fork(f"d{i}").normal(*part.shape)).sum() for i, part in enumerate(parts))
        results.append([*parts, *torch.autograd.grad(loss, (grid, background))])
    for reference, value in zip(*results, strict=True):
        close(value, reference)
    # logits and colours live on different scales: each must agree by itself
    for part in (slice(0, 1), slice(1, 4)):
        close(results[1][-2][..., part], results[0][-2][..., part])


@pytest.mark.parametrize("only", ["rgb", "alpha", "depth"])
def test_each_output_alone_has_the_right_gradient(only: str) -> None:
    gradients = []
    for backend in ("reference", "numba"):
        grid = object_grid().requires_grad_()
        with ops.use(backend):
            out = getattr(march(grid, cameras(*VIEWS), torch.ones(3, 3)), only)
        (out * STREAM.fork("one").normal(*out.shape)).sum().backward()
        gradients.append(grid.grad)
    close(gradients[1], gradients[0])


def test_reference_gradient_by_finite_differences() -> None:
    cams = cameras([30.0], [20.0], px=7, dtype=torch.float64)
    grid = object_grid((6, 6, 6)).double().requires_grad_()
    background = torch.tensor([[0.2, 0.5, 0.9]]).double().requires_grad_()

    def outputs(grid: torch.Tensor, background: torch.Tensor) -> tuple[torch.Tensor, ...]:
        image = march(grid, cams, background, True, 0.2)
        return image.rgb, image.alpha, image.depth, image.normal

    assert torch.autograd.gradcheck(outputs, (grid, background), atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("logit", [-3.0, -1.0, 1.0])
def test_a_uniform_box_absorbs_as_beer_lambert_says(backend: ops.Backend, logit: float) -> None:
    grid = torch.full((9, 9, 9, 4), 0.25)
    grid[..., 0] = logit
    cams, step = cameras([0.0], [0.0], px=9), 0.01
    with ops.use(backend):
        image = march_voxels(
            grid,
            cams,
            torch.zeros(1, 3),
            half_extent=HALF,
            step_m=step,
            density_scale=2.0,
            jitter=torch.full((1, 9, 9), 0.5),
        )
    sigma = 2.0 * (math.log1p(math.exp(logit)) - math.log1p(math.exp(EMPTY_LOGIT)))
    count = round(2 * HALF / step)
    transmittance = math.exp(-sigma * count * step)
    expected = 1 - max(0.0, transmittance - OPAQUE) / (1 - OPAQUE)
    assert image.alpha[0, 0, 4, 4].item() == pytest.approx(expected, rel=2e-4)
    assert abs(expected - (1 - math.exp(-sigma * 2 * HALF))) < 1.01 * OPAQUE
    assert image.rgb[0, 1, 4, 4].item() == pytest.approx(0.25 * expected, rel=2e-4)
    if logit < 0:
        # mean depth of an exponential law cut off at the far face
        length, near = 2 * HALF, 3.3 - HALF
        mass = near * (1 - transmittance) + (1 - transmittance) / sigma - length * transmittance
        assert image.depth[0, 0, 4, 4].item() == pytest.approx(mass, rel=0.02)


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_empty_space_shows_the_background_and_gets_no_gradient(backend: ops.Backend) -> None:
    grid = torch.full((8, 8, 8, 4), EMPTY_LOGIT - 1e-3).requires_grad_()
    background = torch.tensor([[0.1, 0.6, 0.3]])
    with ops.use(backend):
        image = march(grid, cameras([40.0], [20.0]), background)
    torch.testing.assert_close(image.rgb, background[:, :, None, None].expand_as(image.rgb))
    assert image.alpha.abs().max() == 0
    assert image.depth.abs().max() == 0
    image.rgb.sum().backward()
    assert grid.grad.abs().max() == 0


def test_empty_space_skipping_changes_nothing() -> None:
    """The marked bricks hold every voxel that could be seen: marching all bricks gives the same bits."""
    grid, cams = object_grid(), cameras(*VIEWS)
    skipped = march(grid, cams, torch.ones(3, 3))
    flat = grid.reshape(-1).numpy()
    leap, _ = voxel._leaps(flat, tuple(grid.shape[:3]))
    assert 0.2 < (leap == 0).mean() < 0.8
    full_box = torch.tensor([0, 0, 0, *(n - 1 for n in grid.shape[2::-1])]).float().numpy()
    original = voxel._leaps
    voxel._leaps = lambda flat, shape: (leap * 0, full_box)
    try:
        dense = march(grid, cams, torch.ones(3, 3))
    finally:
        voxel._leaps = original
    # samples next to the boundary of a brick may fall to either side of it by rounding
    close(skipped.rgb, dense.rgb, 1e-6)
    close(skipped.depth, dense.depth, 1e-6)


def test_leaps_are_chessboard_distances() -> None:
    grid = torch.full((41, 41, 41, 4), -10.0)
    grid[9, 21, 30, 0] = 0.0
    leap, box = voxel._leaps(grid.reshape(-1).numpy(), (41, 41, 41))
    k, j, i = torch.meshgrid(*[torch.arange(10)] * 3, indexing="ij")
    expected = (k - 2).abs().maximum((j - 5).abs()).maximum((i - 7).abs())
    assert torch.equal(torch.from_numpy(leap).long(), expected)
    assert box.tolist() == [28, 20, 8, 32, 24, 12]


@pytest.mark.parametrize("channel", range(4))
def test_a_nan_in_the_grid_reaches_the_image(channel: int) -> None:
    grid = object_grid()
    grid[9, 11, 13, channel] = math.nan
    grid[..., 0] = torch.where(grid[..., 0] > 0, -1.0, grid[..., 0])  # so that rays reach the middle
    if channel == 0:
        grid[9, 11, 13, 0] = math.nan
    assert march(grid, cameras([0.0], [0.0]), torch.ones(1, 3)).rgb.isnan().any()


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("SDS3D_THREADS", threads)
        grid = object_grid().requires_grad_()
        image = march(grid, cameras(*VIEWS, px=40), torch.ones(3, 3), True)
        (image.rgb.square().sum() + image.depth.sum() + image.normal[:, 0].sum()).backward()
        results.append((image.rgb.detach(), grid.grad))
    for image, gradient in results[1:]:
        assert torch.equal(image, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_normals_of_a_ball_point_outwards() -> None:
    z, y, x = axes((40, 40, 40))
    grid = torch.zeros(40, 40, 40, 4)
    grid[..., 0] = 40 * (0.7 - (x.square() + y.square() + z.square()).sqrt())
    cams = cameras([30.0, 160.0], [20.0, -40.0], px=33)
    image = march(grid, cams, torch.zeros(2, 3), True)
    origins, directions, cosine = voxel.camera_rays(cams.c2w, cams.intrinsics, 33, 33)
    points = origins + directions * (image.depth[:, 0] / cosine)[..., None]
    solid = (image.alpha[:, 0] > 0.99) & (points.norm(dim=-1) < 0.72)
    normal = torch.nn.functional.normalize(image.normal, dim=1).permute(0, 2, 3, 1)
    agreement = (normal * torch.nn.functional.normalize(points, dim=-1)).sum(-1)[solid]
    assert solid.sum() > 200
    assert agreement.min() > 0.98
    torch.testing.assert_close(
        points[solid].norm(dim=-1), torch.full((int(solid.sum()),), 0.7), atol=0.05, rtol=0
    )


def levels() -> list[torch.Tensor]:
    return [STREAM.fork(f"level{n}").normal(1, 4, n, n, n).requires_grad_() for n in (4, 7, 13)]


def test_assembly_twins_agree_forward_and_backward() -> None:
    base, cotangent = STREAM.fork("base").normal(13, 13, 13), STREAM.fork("c").normal(13, 13, 13, 4)
    results = []
    for backend in ("reference", "numba"):
        made = levels()
        with ops.use(backend):
            grid = assemble_levels(made, base, density_gain=3.0, color_gain=2.0)
        results.append([grid, *torch.autograd.grad((grid * cotangent).sum(), made)])
    for reference, value in zip(*results, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_coarse_levels_reproduce_linear_functions(backend: ops.Backend) -> None:
    ramp = torch.linspace(-1, 1, 5)
    coarse = (ramp[:, None, None] + 2 * ramp[:, None] - 3 * ramp).expand(1, 4, 5, 5, 5)
    with ops.use(backend):
        grid = assemble_levels(
            [coarse, torch.zeros(1, 4, 12, 12, 12)], torch.zeros(12, 12, 12), density_gain=1.0, color_gain=0.5
        )
    fine = torch.linspace(-1, 1, 12)
    expected = fine[:, None, None] + 2 * fine[:, None] - 3 * fine
    torch.testing.assert_close(grid[..., 0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grid[..., 2], torch.sigmoid(0.5 * expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("at", [0, 17, 39])
def test_extreme_and_missing_numbers_pass_the_activation(backend: ops.Backend, at: int) -> None:
    """Wide enough for vector loops, whose body and remainder are different code."""
    fine = torch.zeros(1, 4, 40, 40, 40)
    for row, value in enumerate((-300.0, 300.0, math.nan)):
        fine[0, 1, 0, row, at] = value
    with ops.use(backend):
        grid = assemble_levels([fine], torch.zeros(40, 40, 40), density_gain=1.0, color_gain=2.0)
    assert grid[0, 0, at, 1] < 1e-30
    assert grid[0, 1, at, 1] == 1
    assert grid[0, 2, at, 1].isnan()
    assert grid.isnan().sum() == 1


def test_variation_twins_agree_forward_and_backward() -> None:
    results = []
    for backend in ("reference", "numba"):
        grid = (4 * STREAM.fork("tv").normal(9, 7, 8, 4)).requires_grad_()
        with ops.use(backend):
            logit, color = grid_variation(grid, 6.0)
        results.append([logit, color, *torch.autograd.grad(0.7 * logit + 1.3 * color, grid)])
    for reference, value in zip(*results, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_variation_of_a_ramp(backend: ops.Backend) -> None:
    grid = torch.zeros(6, 6, 6, 4)
    grid[..., 0] = 0.5 * torch.arange(6)
    grid[..., 1] = 0.3 * torch.arange(6)[:, None]
    with ops.use(backend):
        logit, color = grid_variation(grid, 6.0)
        clamped, _ = grid_variation(grid, 0.5)
    assert logit.item() == pytest.approx(0.25 * 5 / 6)
    assert color.item() == pytest.approx(0.09 * 5 / 6 / 3)
    assert clamped.item() == pytest.approx(0.25 / 6)
