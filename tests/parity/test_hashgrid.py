import pytest
import torch

from sds3d import ops
from sds3d.ops.hashgrid import HashGrid, HashGridConfig, encode_reference
from sds3d.rng import Stream

STREAM = Stream(3, "hashgrid")
SMALL = {"levels": 5, "log2_rows": 10, "coarsest_cells": 4, "finest_cells": 40}


def grid(features: int = 2, dtype: torch.dtype = torch.float64) -> HashGrid:
    module = HashGrid(HashGridConfig(features=features, **SMALL), STREAM.fork("init"))
    module.table.data = STREAM.fork("table").normal(*module.table.shape)
    return module.to(dtype)


def points(n: int = 700, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return STREAM.fork("points").uniform(n, 3).to(dtype)


@pytest.mark.parametrize("features", [2, 3])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_twins_agree_forward_and_backward(features: int, dtype: torch.dtype, bound: float) -> None:
    module, x = grid(features, dtype), points(dtype=dtype)
    cotangent = STREAM.fork("cotangent").normal(x.shape[0], module.width).to(dtype)
    results = []
    for backend in ("reference", "numba"):
        with ops.use(backend):
            encoded = module(x)
        (gradient,) = torch.autograd.grad((encoded * cotangent).sum(), module.table)
        results.append((encoded, gradient))
    for reference, numba in zip(*results, strict=True):
        assert reference.abs().max() > 0.1
        assert (reference - numba).abs().max() <= bound * reference.abs().max()


def test_the_grid_has_dense_and_hashed_levels() -> None:
    assert [dense for *_, dense in grid().levels] == [True, True, False, False, False]


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_interpolation_weights_sum_to_one(backend: ops.Backend) -> None:
    module = grid()
    module.table.data.fill_(1.0)
    with ops.use(backend):
        torch.testing.assert_close(module(points()), torch.ones(700, module.width, dtype=torch.float64))


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_a_dense_level_reproduces_linear_functions(backend: ops.Backend) -> None:
    module = grid()
    cells = module.levels[0][0]
    side = torch.arange(cells + 1, dtype=torch.float64) / cells
    z, y, x = torch.meshgrid(side, side, side, indexing="ij")
    module.table.data[: (cells + 1) ** 3] = torch.stack([x + 2 * y, y - 3 * z], -1).view(-1, 2)
    at = torch.cat([points(), torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0.5]], dtype=torch.float64)])
    with ops.use(backend):
        first = module(at, active=1)[:, :2]
    expected = torch.stack([at[:, 0] + 2 * at[:, 1], at[:, 1] - 3 * at[:, 2]], -1)
    torch.testing.assert_close(first, expected)


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_locked_levels_are_zero_and_get_exactly_no_gradient(backend: ops.Backend) -> None:
    module = grid()
    locked = module.levels[3][1]
    with ops.use(backend):
        encoded = module(points(), active=3)
        encoded.square().sum().backward()
    assert encoded.shape[1] == module.width
    assert not encoded[:, 6:].any()
    assert not module.table.grad[locked:].any()
    assert module.table.grad[:locked].any()


def test_result_does_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for threads in ("1", "3"):
        monkeypatch.setenv("SDS3D_THREADS", threads)
        module = grid(dtype=torch.float32)
        encoded = module(points(dtype=torch.float32))
        encoded.square().sum().backward()
        found.append((encoded, module.table.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_reference_is_twice_differentiable_in_the_points() -> None:
    module = grid()
    x = points(4).requires_grad_(True)  # generic points, away from cell borders
    table = module.table.detach()
    assert torch.autograd.gradcheck(lambda p: encode_reference(p, table, module.levels), (x,))
    (gradient,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    (through,) = torch.autograd.grad(gradient.square().sum(), module.table)
    assert through.abs().max() > 0


def test_no_points_give_no_features_but_a_graph() -> None:
    module = grid()
    encoded = module(points(0))
    assert encoded.shape == (0, module.width)
    encoded.sum().backward()
    assert not module.table.grad.any()


def test_both_backends_share_one_state_dict() -> None:
    module = grid()
    assert set(module.state_dict()) == {"table"}
