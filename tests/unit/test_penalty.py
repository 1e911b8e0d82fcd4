import math

import pytest
import torch

from sds3d.mathx import penalty
from sds3d.rng import Stream

STREAM = Stream(7, "penalty")


def ray(bins: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    edges = (STREAM.fork("edges").uniform(2, bins + 1).double() + 0.05).cumsum(-1)
    weights = STREAM.fork("weights").uniform(2, bins).double() / bins
    return weights, 0.5 * (edges[:, 1:] + edges[:, :-1]), edges.diff(dim=-1)


def test_distortion_is_its_double_sum() -> None:
    w, m, delta = ray()
    pairs = (w[:, :, None] * w[:, None, :] * (m[:, :, None] - m[:, None, :]).abs()).sum((1, 2))
    torch.testing.assert_close(penalty.distortion(w, m, delta), pairs + (w.square() * delta).sum(-1) / 3)


def test_distortion_of_one_box_is_the_mean_distance_of_two_uniform_points() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    assert math.isclose(penalty.distortion(one, 4 * one, 0.6 * one).item(), 0.6 / 3, rel_tol=1e-12)


def test_distortion_does_not_change_when_a_bin_is_split() -> None:
    w, m, delta = ray()
    split = [value.repeat_interleave(2, -1) for value in (w / 2, m, delta / 2)]
    quarter = delta.repeat_interleave(2, -1) / 4
    sign = torch.tensor([-1.0, 1.0]).double().repeat(w.shape[1])
    torch.testing.assert_close(
        penalty.distortion(split[0], split[1] + sign * quarter, split[2]), penalty.distortion(w, m, delta)
    )


def test_distortion_ignores_empty_slots() -> None:
    w, m, delta = ray()
    keep = torch.arange(9) % 3 != 1
    gaps = torch.where(keep, w, 0)
    torch.testing.assert_close(
        penalty.distortion(gaps, torch.where(keep, m, 0), torch.where(keep, delta, 0)),
        penalty.distortion(w[:, keep], m[:, keep], delta[:, keep]),
    )


def test_entropy_is_ln_2_at_a_half_symmetric_and_low_at_the_ends() -> None:
    o = torch.tensor([0.5, 0.1, 0.9, 0.0, 1.0], dtype=torch.float64)
    h = penalty.binary_entropy(o)
    assert math.isclose(h[0].item(), math.log(2), rel_tol=1e-12)
    torch.testing.assert_close(h[1], h[2])
    assert h[3:].max() < 0.01


def test_opacity_is_a_tenth_when_empty_and_its_slope_grows_to_one() -> None:
    o = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    value = penalty.opacity(o)
    (slope,) = torch.autograd.grad(value.sum(), o)
    torch.testing.assert_close(value.detach(), torch.tensor([0.1, math.sqrt(1.01)]).double())
    assert slope[0] == 0
    assert 0.99 < slope[1] < 1


def test_orientation_punishes_only_normals_that_face_away_and_only_them() -> None:
    direction = torch.tensor([[0.0, 0, 1]]).expand(3, 3).double()
    aim = [[0, 0, -1.0], [0, 0.6, 0.8], [0, 0, 1.0]]
    normals = torch.tensor(aim, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64, requires_grad=True)
    value = penalty.orientation(weights, normals, direction)
    torch.testing.assert_close(value.detach(), torch.tensor([0.0, 0.5 * 0.64, 0.25]).double())
    value.sum().backward()
    assert weights.grad is None
    assert normals.grad[0].abs().max() == 0
    assert normals.grad[1:, 2].min() > 0


def test_z_variance_of_two_equal_shells_is_a_quarter_of_the_gap_squared() -> None:
    w = torch.tensor([[0.3, 0.0, 0.3], [0.0, 0.0, 0.0]], dtype=torch.float64)
    m = torch.tensor([[1.0, 2.0, 1.8]], dtype=torch.float64).expand(2, 3)
    torch.testing.assert_close(penalty.z_variance(w, m), torch.tensor([0.8**2 / 4, 0.0]).double())


def test_total_variation_of_a_plane_is_the_sum_of_its_slopes() -> None:
    x = STREAM.fork("x").uniform(6, 3).double()
    slope = torch.tensor([2.0, -3.0, 0.5]).double()
    shifted = ((x[:, None] + 0.1 * torch.eye(3).double()) * slope).sum(-1)
    expected = torch.full((6,), 0.55, dtype=torch.float64)
    torch.testing.assert_close(penalty.total_variation((x * slope).sum(-1), shifted), expected)


def test_grid_total_variation_of_a_ramp() -> None:
    ramp = torch.arange(5.0).double()[:, None, None].expand(5, 4, 3) * 0.3
    torch.testing.assert_close(penalty.grid_total_variation(ramp), torch.tensor(0.09 / 3).double())


def test_normal_smoothness_is_zero_for_flat_and_positive_for_bent() -> None:
    flat = torch.zeros(1, 3, 4, 5).double()
    flat[:, 1] = 1
    bent = flat.clone()
    bent[:, :, :, 2:] = flat.roll(1, 1)[:, :, :, 2:]
    assert penalty.normal_smoothness(flat).item() == 0
    # one of four horizontal steps changes two of three components by one
    assert math.isclose(penalty.normal_smoothness(bent).item(), 2 / (3 * 4), rel_tol=1e-12)


@pytest.mark.parametrize("name", ["distortion", "z_variance", "opacity", "binary_entropy"])
def test_gradients_by_finite_differences(name: str) -> None:
    w, m, delta = ray(4)
    w.requires_grad_(True)
    rest = {"distortion": (m, delta), "z_variance": (m,)}.get(name, ())
    assert torch.autograd.gradcheck(lambda x: getattr(penalty, name)(x, *rest), (w,))
