"""Gaussian splatting: a dense autograd oracle, the torch reference, and the numba twin must tell the same story."""

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sds3d import ops
from sds3d.cameras.orbit import orbit_cameras
from sds3d.errors import BackendError, NonFiniteError, ShapeError
from sds3d.interfaces import Cameras
from sds3d.ops import splat_cuda, splat_numba
from sds3d.ops import splat_reference as reference
from sds3d.ops.splat import SplatImage, rasterize_gaussians
from sds3d.rng import Stream

STREAM = Stream(7, "splat")
NAMES = ("means", "quats_wxyz", "scales", "opacity", "color", "background")


def cameras(
    views: int = 2, width: int = 45, height: int = 38, radius: float = 1.6, fov: float = 49.0
) -> Cameras:
    """Views whose principal point is off centre and whose pixels are not square."""
    azimuth = torch.arange(views, dtype=torch.float64) * 140.0 + 34.0
    full = torch.ones_like(azimuth)
    made = orbit_cameras(azimuth, full * 17.0, full * radius, full * fov, height)
    intrinsics = made.intrinsics.clone()
    intrinsics[:, 0, 0] *= 1.1
    intrinsics[:, 0, 2] = width / 2 + 2.3
    return replace(made, intrinsics=intrinsics, width_px=width)


def gaussians(count: int = 300, spread: float = 0.5, views: int = 2, opacity: float = 0.0) -> list[Tensor]:
    """Random Gaussians in a ball, thin and thick, faint and opaque, and a background per view (float64 leaves)."""
    rng = STREAM.fork("gaussians").numpy_generator()
    direction = torch.from_numpy(rng.normal(size=(count, 3)))
    means = torch.nn.functional.normalize(direction, dim=-1) * torch.from_numpy(rng.random((count, 1))) ** (
        1 / 3
    )
    values = [
        means * spread,
        torch.from_numpy(rng.normal(size=(count, 4))),
        torch.from_numpy(0.05 * rng.lognormal(0.0, 0.7, (count, 3))),
        torch.sigmoid(torch.from_numpy(rng.normal(opacity, 2.0, count))),
        torch.from_numpy(rng.random((count, 3))),
        torch.from_numpy(rng.random((views, 3))),
    ]
    return [value.requires_grad_(True) for value in values]


def dense(*inputs: Any) -> SplatImage:
    """The definition, with every Gaussian at every pixel and nothing clever; arguments of `rasterize_gaussians`."""
    return dense_and_calm(*inputs)[0]


def dense_and_calm(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacity: Tensor,
    color: Tensor,
    at: Cameras,
    background: Tensor,
) -> tuple[SplatImage, Tensor]:
    """`dense`, and the pixels (b 1 H W) where no alpha or transmittance is within rounding of its threshold.

    Elsewhere float32 may drop a splat that float64 keeps: a jump by 1/255, whatever the kernel.
    """
    rotation = reference.rotation_matrices(quats)
    covariance = rotation @ torch.diag_embed(scales**2) @ rotation.transpose(1, 2)
    images, calm = [], []
    for view in range(len(at)):
        w2c, intrinsics = torch.linalg.inv(at.c2w[view]), at.intrinsics[view]
        fx, fy, cx, cy = intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2]
        p = means @ w2c[:3, :3].T + w2c[:3, 3]
        p, o, c, sigma = (value[p[:, 2] > 0.01] for value in (p, opacity, color, covariance))
        order = torch.argsort(p[:, 2].detach(), stable=True)
        p, o, c, sigma = p[order], o[order], c[order], sigma[order]
        x, y, z = p.unbind(-1)
        margin_x, margin_y = 0.3 * 0.5 * at.width_px / fx, 0.3 * 0.5 * at.height_px / fy
        sx = (x / z).clamp((-cx / fx - margin_x).item(), ((at.width_px - cx) / fx + margin_x).item())
        sy = (y / z).clamp((-cy / fy - margin_y).item(), ((at.height_px - cy) / fy + margin_y).item())
        zero = torch.zeros_like(z)
        jacobian = torch.stack([fx / z, zero, -fx * sx / z, zero, fy / z, -fy * sy / z], -1).view(-1, 2, 3)
        jw = jacobian @ w2c[:3, :3]
        conic = torch.linalg.inv(jw @ sigma @ jw.transpose(1, 2) + 0.3 * torch.eye(2, dtype=z.dtype))
        center = torch.stack([fx * x / z + cx, fy * y / z + cy], -1)
        rows, columns = torch.arange(at.height_px) + 0.5, torch.arange(at.width_px) + 0.5
        pixel = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flip(-1).to(z.dtype)
        d = pixel[..., None, :] - center
        s = 0.5 * (d[..., None, :] @ conic @ d[..., None])[..., 0, 0]
        a = (o * torch.exp(-s)).clamp_max(0.999)
        steady = ((a * 255 - 1).abs() > 1e-5).all(-1)
        a = a * (a >= 1 / 255)
        through = torch.cumprod(1 - a, -1)
        calm.append(steady & ((through / 1e-4 - 1).abs() > 1e-4).all(-1))
        a = a * (through > 1e-4)
        after = torch.cumprod(1 - a, -1)
        before = torch.cat([torch.ones_like(after[..., :1]), after[..., :-1]], -1)
        layers = torch.cat([c, z[:, None]], -1)
        image = (a * before) @ layers
        end = after[..., -1:] if len(z) else torch.ones_like(image[..., :1])
        rgb = image[..., :3] + end * background[view]
        images.append(torch.cat([rgb, image[..., 3:], 1 - end], -1).permute(2, 0, 1))
    stacked = torch.stack(images)
    image = SplatImage(rgb=stacked[:, :3], alpha=stacked[:, 4:], depth=stacked[:, 3:4])
    return image, torch.stack(calm)[:, None]


def run(
    render: Any, values: list[Tensor], at: Cameras, dtype: torch.dtype, where: Tensor | float = 1.0
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Images and the gradients of a random cotangent, with respect to all six inputs, of the pixels `where`."""
    leaves = [value.detach().to(dtype).requires_grad_(True) for value in values]
    image = render(*leaves[:5], at, leaves[5])
    images = [image.rgb * where, image.alpha * where, image.depth * where]
    loss = sum(
        (x * STREAM.fork(f"cotangent{i}").normal(*x.shape).to(dtype)).sum() for i, x in enumerate(images)
    )
    return images, torch.autograd.grad(loss, leaves)


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def with_backend(name: ops.Backend) -> Any:
    def render(*arguments: object) -> SplatImage:
        with ops.use(name):
            return rasterize_gaussians(*arguments)

    return render


def saturated() -> list[Tensor]:
    """Few wide Gaussians of opacity 1: many pixels meet the clamp of alpha at 0.999."""
    values = [value.detach() for value in gaussians(20)]
    values[2] = values[2] * 5
    values[3] = torch.ones_like(values[3])
    return [value.requires_grad_(True) for value in values]


CASES = {
    "cloud": (cameras(), gaussians()),
    "whole blocks": (cameras(1, 64, 64), gaussians(views=1)),
    "opaque": (cameras(), gaussians(opacity=6.0)),
    "saturated": (cameras(), saturated()),
    "inside the cloud": (cameras(radius=0.3), gaussians()),  # behind the camera, outside the frustum, huge
    "wide": (cameras(1, 130, 70, radius=0.9), gaussians(views=1)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("reference", torch.float64, 1e-11),
        ("numba", torch.float64, 1e-9),
        ("reference", torch.float32, 1e-4),
        ("numba", torch.float32, 1e-4),
    ],
)
def test_twins_agree_with_the_dense_definition(
    case: str, backend: ops.Backend, dtype: torch.dtype, tolerance: float
) -> None:
    at, values = CASES[case]
    calm = dense_and_calm(*values[:5], at, values[5])[1]
    assert calm.float().mean() > 0.9
    images, gradients = run(dense, values, at, torch.float64, calm)
    found_images, found_gradients = run(with_backend(backend), values, at, dtype, calm)
    errors = {f"image {i}": relative(*pair) for i, pair in enumerate(zip(found_images, images, strict=True))}
    errors |= {name: relative(*pair) for name, *pair in zip(NAMES, found_gradients, gradients, strict=True)}
    assert {name: error for name, error in errors.items() if not error <= tolerance} == {}


def test_the_opaque_case_is_opaque_and_the_inside_case_is_outside() -> None:
    at, values = CASES["opaque"]
    image = dense(*values[:5], at, values[5])
    assert (image.alpha > 1 - 2e-4).float().mean() > 0.05, "pixels must close for the case to mean anything"
    at, values = CASES["inside the cloud"]
    p = values[0] @ torch.linalg.inv(at.c2w[0])[:3, :3].T + torch.linalg.inv(at.c2w[0])[:3, 3]
    assert 0.1 < (p[:, 2] < 0.01).float().mean() < 0.9
    assert ((p[:, 0] / p[:, 2]).abs()[p[:, 2] > 0.01] > 1.0).any()


def test_reference_gradients_by_finite_differences() -> None:
    at = cameras(1, 5, 4)
    values = [value.detach()[:4].clone().requires_grad_(True) for value in gaussians(4, spread=0.2, views=1)]
    values[2] = (values[2].detach() * 4).requires_grad_(True)  # wide: no pixel near the cut-off at 1/255
    values[3] = torch.tensor([0.6, 0.7, 0.5, 0.8], dtype=torch.float64, requires_grad=True)

    weight = STREAM.fork("finite").normal(3, 1, 5, 4, 5).double()

    def numbers(*leaves: Tensor) -> Tensor:
        image = torch.cat(reference.rasterize(*leaves[:5], at, leaves[5]), 1)
        return (weight * image).sum((1, 2, 3, 4))

    assert torch.autograd.gradcheck(numbers, tuple(values), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("parameter", [1, 2])
def test_both_halves_of_the_conic_gradient_arrive(parameter: int) -> None:
    """One long, tilted Gaussian: the gradients of its rotation and scales go mostly through the off-diagonal."""
    at = cameras(1, 48, 48)
    leaves = [
        torch.zeros(1, 3, dtype=torch.float64),
        torch.tensor([[0.9, 0.1, -0.2, 0.5]], dtype=torch.float64),
        torch.tensor([[0.3, 0.04, 0.06]], dtype=torch.float64),
        torch.tensor([0.7], dtype=torch.float64),
        torch.ones(1, 3, dtype=torch.float64),
        torch.zeros(1, 3, dtype=torch.float64),
    ]
    weight = STREAM.fork("halves").normal(1, 1, 48, 48).double()
    weight = torch.nn.functional.avg_pool2d(weight, 9, 1, 4)

    def loss(value: Tensor) -> Tensor:
        changed = [*leaves[:parameter], value, *leaves[parameter + 1 :]]
        with ops.use("numba"):
            return (rasterize_gaussians(*changed[:5], at, changed[5]).alpha * weight).sum()

    value = leaves[parameter].clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(value), value)
    step = 1e-6 * torch.eye(value.numel(), dtype=torch.float64).view(-1, *value.shape)
    numeric = torch.stack([(loss(value + e) - loss(value - e)).detach() / 2e-6 for e in step]).view_as(
        gradient
    )
    # Pixels that cross the cut-off at 1/255 jump by that much; the smooth weight keeps their sum small.
    torch.testing.assert_close(gradient, numeric, rtol=0.02, atol=0.02 * float(gradient.abs().max()))


@pytest.mark.parametrize("first_is_near", [True, False])
def test_depth_order_holds_to_the_last_bit(first_is_near: bool) -> None:
    """Two opaque splats one float apart, in either order of the list: the nearer one is seen."""
    at = cameras(1, 32, 32)
    c2w = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))[None].clone()
    c2w[0, 2, 3] = 0.5  # on +z, looking back: depth = 0.5 - z
    far = torch.tensor(0.1)
    near = torch.nextafter(far, torch.tensor(1.0))
    means = torch.zeros(2, 3)
    means[:, 2] = torch.stack([near, far] if first_is_near else [far, near])
    assert (0.5 - means[0, 2] < 0.5 - means[1, 2]) == first_is_near
    with ops.use("numba"):
        image = rasterize_gaussians(
            means,
            torch.tensor([[1.0, 0, 0, 0]] * 2),
            torch.full((2, 3), 0.05),
            torch.full((2,), 0.99),
            torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]),
            replace(at, c2w=c2w),
            torch.zeros(1, 3),
        )
    red, green, _ = image.rgb[0, :, 16, 18]
    assert (red > 0.9) == first_is_near
    assert (green > 0.9) != first_is_near


def test_order_of_near_equal_depths_is_full_precision_and_stable() -> None:
    depth = torch.full((5000,), 3.3)
    for index in range(1, 5000):
        depth[index] = torch.nextafter(depth[index - 1], torch.tensor(9.0))
    shuffled = torch.randperm(5000, generator=STREAM.fork("order").torch_generator())
    values = depth[shuffled].repeat(2).numpy()
    order = splat_numba._order_by_depth(values)
    assert (values[order][::2] == depth.numpy()).all()
    assert (order[::2] < order[1::2]).all(), "equal depths keep their order"


def test_the_stored_transmittance_is_exact_where_almost_nothing_passes() -> None:
    """Had it been computed as 1 - alpha, float32 would be wrong by 3e-4 here."""
    at, values = CASES["opaque"]
    background = values[5]
    results = []
    for dtype in (torch.float64, torch.float32):
        leaves = [value.detach().to(dtype).requires_grad_(True) for value in values]
        with ops.use("numba"):
            image = rasterize_gaussians(*leaves[:5], at, leaves[5])
        closed = (dense(*values[:5], at, background).alpha > 0.999).to(dtype)
        assert closed.sum() > 20
        results.append(torch.autograd.grad((image.rgb * closed).sum(), [leaves[5], leaves[0]]))
    for found, wanted in zip(results[1], results[0], strict=True):
        assert relative(found, wanted) < 1e-4
    assert relative(results[1][0], results[0][0]) < 1e-5


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    at, values = cameras(3, 70, 70), gaussians(5000, views=3)
    results = []
    for threads in ("1", "3"):
        monkeypatch.setenv("SDS3D_THREADS", threads)
        results.append(run(with_backend("numba"), values, at, torch.float32))
    for one, three in zip([*results[0][0], *results[0][1]], [*results[1][0], *results[1][1]], strict=True):
        assert torch.equal(one, three)


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_nothing_visible_shows_the_background(backend: ops.Backend) -> None:
    at = cameras()
    for values in (gaussians(0), [gaussians(5)[0].detach() + torch.tensor([0, 99.0, 0]), *gaussians(5)[1:]]):
        with ops.use(backend):
            image = rasterize_gaussians(*values[:5], at, values[5])
        torch.testing.assert_close(image.rgb, values[5][:, :, None, None].expand_as(image.rgb))
        assert not image.alpha.any()
        assert not image.depth.any()
        for gradient in torch.autograd.grad(image.rgb.sum(), values[1:5], allow_unused=True):
            assert gradient is None or not gradient.any()


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_one_opaque_gaussian_shows_its_color_and_depth(backend: ops.Backend) -> None:
    at = cameras(1, 41, 41, radius=2.0)
    color = torch.tensor([[0.2, 0.5, 0.9]])
    with ops.use(backend):
        image = rasterize_gaussians(
            torch.zeros(1, 3),
            torch.ones(1, 4),
            torch.full((1, 3), 0.3),
            torch.ones(1),
            color,
            at,
            torch.zeros(1, 3),
        )
    center = image.alpha[0, 0].argmax()
    alpha = image.alpha.flatten()[center]
    assert alpha == pytest.approx(0.999, abs=1e-5)
    torch.testing.assert_close(image.rgb[0].flatten(1)[:, center], color[0] * alpha)
    assert image.depth.flatten()[center] / alpha == pytest.approx(2.0, rel=1e-5)


def test_turning_scene_and_cameras_together_changes_nothing() -> None:
    at, values = CASES["cloud"]
    turn = torch.tensor([[0.3, -0.5, 0.7, 0.4]], dtype=torch.float64)
    matrix = reference.rotation_matrices(turn)[0]
    w, x, y, z = torch.nn.functional.normalize(turn, dim=-1)[0]
    product = torch.stack(
        [
            torch.stack([w, -x, -y, -z]),
            torch.stack([x, w, -z, y]),
            torch.stack([y, z, w, -x]),
            torch.stack([z, -y, x, w]),
        ]
    )
    c2w = at.c2w.clone()
    c2w[:, :3] = matrix @ at.c2w[:, :3]
    with ops.use("numba"):
        still = rasterize_gaussians(*values[:5], at, values[5])
        turned = rasterize_gaussians(
            values[0] @ matrix.T, values[1] @ product.T, *values[2:5], replace(at, c2w=c2w), values[5]
        )
    torch.testing.assert_close(turned.rgb, still.rgb, rtol=0, atol=1e-9)


def test_the_graph_can_be_walked_twice_and_refuses_changed_inputs() -> None:
    at, values = CASES["cloud"]
    leaves = [value.detach().float().requires_grad_(True) for value in values]
    image = with_backend("numba")(*leaves[:5], at, leaves[5])
    once = torch.autograd.grad(image.rgb.sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(image.rgb.sum(), leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    with torch.no_grad():
        leaves[0].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(image.rgb.sum(), leaves)


def test_projection_equals_gsplat() -> None:
    gsplat = pytest.importorskip("gsplat.cuda._torch_impl")
    at, values = CASES["inside the cloud"]
    means, quats, scales, opacity = (value.detach() for value in values[:4])
    rotation = reference.rotation_matrices(quats)
    covariance = rotation @ torch.diag_embed(scales**2) @ rotation.transpose(1, 2)
    w2c = reference.view_matrices(at, means)
    _, center, depth, conic, _ = gsplat._fully_fused_projection(
        means, covariance, w2c, at.intrinsics, at.width_px, at.height_px
    )
    for view in range(2):
        splats = reference.project(
            means,
            rotation * scales[:, None],
            opacity,
            w2c[view],
            at.intrinsics[view],
            at.width_px,
            at.height_px,
        )
        front = depth[view] > 0.01
        torch.testing.assert_close(splats.depth, depth[view])
        torch.testing.assert_close(splats.center_px[front], center[view][front], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(splats.conic[front], conic[view][front], rtol=1e-8, atol=1e-10)


def test_wrong_shapes_types_and_numbers_are_refused() -> None:
    at, values = CASES["cloud"]
    good = [value.detach().float() for value in values]
    with pytest.raises(ShapeError, match=r"background is .*expected \(\(2, 3\)"):
        rasterize_gaussians(*good[:5], at, good[5][:1])
    with pytest.raises(ShapeError, match=r"color is .*float64"):
        rasterize_gaussians(*good[:4], values[4].detach(), at, good[5])
    good[2][7, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="scales holds 1 non-finite numbers of 900"):
        rasterize_gaussians(*good[:5], at, good[5])


def test_the_cuda_adapter_speaks_the_language_of_gsplat(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that takes only arguments gsplat has, and returns what gsplat documents."""
    signature = inspect.signature(pytest.importorskip("gsplat").rasterization)
    at, values = CASES["cloud"]

    def rasterization(**asked: Any) -> tuple[Tensor, Tensor, dict[str, object]]:
        signature.bind(**asked)
        assert (asked["render_mode"], asked["rasterize_mode"]) == ("RGB+D", "classic")
        seen = replace(
            at,
            c2w=torch.linalg.inv(asked["viewmats"].double()),
            intrinsics=asked["Ks"].double(),
            width_px=asked["width"],
            height_px=asked["height"],
        )
        inputs = [asked[name].double() for name in ("means", "quats", "scales", "opacities", "colors")]
        image = dense(*inputs, seen, torch.zeros(2, 3, dtype=torch.float64))
        layers = torch.cat([image.rgb, image.depth], 1)
        return layers.permute(0, 2, 3, 1).float(), image.alpha.permute(0, 2, 3, 1).float(), {}

    monkeypatch.setattr(splat_cuda, "_load", lambda index: rasterization)
    with ops.use("cuda"):
        found = rasterize_gaussians(*values[:5], at, values[5])
    wanted = dense(*values[:5], at, values[5])
    for name in ("rgb", "alpha", "depth"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine where gsplat cannot run")
def test_a_gsplat_that_cannot_run_says_why_and_what_to_do() -> None:
    at, values = CASES["cloud"]
    for _ in range(2):  # the second time from memory
        with ops.use("cuda"), pytest.raises(BackendError, match=r"CUDA(.|\n)*nvcc(.|\n)*device: cpu"):
            rasterize_gaussians(*values[:5], at, values[5])
