"""The time laws: ranges, monotone falls, densities, and what each refuses."""

from itertools import pairwise

import pytest
import torch

from sds3d.config.ramp import Ramp
from sds3d.errors import ConfigError
from sds3d.guidance.time import (
    TIME_LAWS,
    AnnealedTime,
    DescendingTime,
    DreamTime,
    LogitNormalTime,
    PiecewiseTime,
    ShiftedTime,
    UniformTime,
    WarmupTime,
    shift_time,
)
from sds3d.moment import Moment
from sds3d.rng import Stream

STEPS = 200


def times(law, steps: int = STEPS, views: int = 1) -> torch.Tensor:
    """t of every step of a run (step, view)."""
    return torch.stack([law.sample(Moment(k, steps), views, Stream(0, "t", k)) for k in range(steps)])


def many(law, step: int = 0, steps: int = STEPS, views: int = 4000) -> torch.Tensor:
    return law.sample(Moment(step, steps), views, Stream(3, "t", step))


@pytest.mark.parametrize("kind", sorted(TIME_LAWS))
def test_laws_draw_one_repeatable_float_per_view_in_the_unit_interval(kind: str) -> None:
    law = TIME_LAWS[kind](TIME_LAWS[kind].Config())
    drawn = times(law, 40, 3)
    assert drawn.shape == (40, 3)
    assert drawn.dtype == torch.float32
    assert drawn.min() > 0.0
    assert drawn.max() < 1.0
    assert torch.equal(drawn, times(law, 40, 3))
    drawn[0, 0] = 7.0  # views do not share memory
    assert TIME_LAWS[kind].__doc__


FALLING = {
    "annealed": (0.98, 0.3),
    "descending": (0.7, 0.1),
    "dreamtime": (0.98, 0.02),
    "piecewise": (0.98, 0.98 - 0.96 * 0.8),
}


@pytest.mark.parametrize("kind", sorted(FALLING))
def test_deterministic_laws_fall_from_their_start_to_their_end(kind: str) -> None:
    law = TIME_LAWS[kind](TIME_LAWS[kind].Config())
    drawn = times(law, 1000)[:, 0]
    assert bool((drawn.diff() <= 1e-7).all())
    start, end = FALLING[kind]
    assert float(drawn[0]) == pytest.approx(start, abs=2e-3)
    tail = 0.3 if kind == "dreamtime" else 2e-3  # DreamTime spends little of the run on small t
    assert end - 2e-3 <= float(drawn[-1]) <= end + tail
    assert times(law, 5, 4).std(dim=1).max() == 0.0


def test_descending_follows_the_square_root() -> None:
    drawn = times(DescendingTime(DescendingTime.Config()), 100)[:, 0]
    torch.testing.assert_close(drawn, 0.7 - 0.6 * (torch.arange(100) / 100).sqrt(), rtol=1e-5, atol=1e-6)


def test_linear_anneal_is_a_ramp_of_the_annealed_law() -> None:
    """SDI: 0.98 to 0.25, linear."""
    drawn = times(AnnealedTime(AnnealedTime.Config(t=Ramp(start=0.98, end=0.25))), 100)[:, 0]
    torch.testing.assert_close(drawn, 0.98 - 0.73 * torch.arange(100) / 100, rtol=1e-5, atol=1e-6)


def test_hard_switch_is_a_step_ramp_of_the_uniform_law() -> None:
    """VSD: largest t 0.98, and 0.5 from step 5000 on."""
    high = Ramp(start=0.98, end=0.5, over_steps=(0, 5000), shape="step")
    law = UniformTime(UniformTime.Config(high=high))
    before, after = (many(law, step, 10_000).max() for step in (4999, 5000))
    assert 0.97 < before <= 0.98
    assert 0.49 < after <= 0.5


def test_warmup_shrinks_its_upper_end_and_stays() -> None:
    law = WarmupTime(WarmupTime.Config(per_view=True))
    for step, high in ((0, 0.98), (750, 0.74), (1500, 0.5), (4000, 0.5)):
        drawn = many(law, step, 5000)
        assert drawn.min() == pytest.approx(0.02, abs=2e-3)
        assert drawn.max() == pytest.approx(high, abs=2e-3)
        assert drawn.max() <= high + 1e-6
    assert many(WarmupTime(WarmupTime.Config())).unique().numel() == 1


def test_dreamtime_with_a_uniform_density_is_a_linear_anneal() -> None:
    law = DreamTime(DreamTime.Config(m1=0.98, m2=0.02))
    drawn = times(law, 500)[:, 0]
    torch.testing.assert_close(drawn, 0.98 - 0.96 * torch.arange(500) / 500, rtol=0, atol=2e-3)


@pytest.mark.parametrize("halved", [True, False])
def test_dreamtime_spends_its_steps_as_its_density_says(halved: bool) -> None:
    config = DreamTime.Config(halved=halved)
    drawn = times(DreamTime(config), 3000)[:, 0].double()
    t = torch.linspace(0.02, 0.98, 9601, dtype=torch.float64)
    factor = 2.0 if halved else 1.0
    above, below = (t - 0.8).clamp(min=0) / 0.3, (0.5 - t).clamp(min=0) / 0.1
    density = torch.exp(-(above**2 + below**2) / factor)
    edges = torch.tensor([0.02, 0.4, 0.5, 0.65, 0.8, 0.9, 0.98], dtype=torch.float64)
    share = [density[(t >= a) & (t < b)].sum() / density.sum() for a, b in pairwise(edges)]
    spent = [((drawn >= a) & (drawn < b)).double().mean() for a, b in pairwise(edges)]
    torch.testing.assert_close(torch.stack(spent), torch.stack(share), rtol=0, atol=4e-3)


def test_dreamtime_variants_differ() -> None:
    ours, without_half = (times(DreamTime(DreamTime.Config(halved=h)), 50) for h in (True, False))
    assert (ours - without_half).abs().max() > 0.01


def test_piecewise_passes_through_its_knots() -> None:
    law = PiecewiseTime(PiecewiseTime.Config())
    for progress, p in ((0.0, 0.0), (0.05, 0.15), (0.1, 0.3), (0.3, 0.45), (0.5, 0.6), (0.75, 0.7)):
        step = round(progress * STEPS)
        assert float(law.sample(Moment(step, STEPS), 1, Stream(0, "t"))) == pytest.approx(0.98 - 0.96 * p)


def test_piecewise_is_constant_outside_its_knots() -> None:
    law = PiecewiseTime(PiecewiseTime.Config(knots=((0.25, 0.2), (0.5, 0.6))))
    drawn = times(law, 4)[:, 0]
    expected = 0.98 - 0.96 * torch.tensor([0.2, 0.2, 0.6, 0.6])
    torch.testing.assert_close(drawn, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("knots", [(), ((0.0, 0.5), (1.0, 0.2)), ((0.5, 0.1), (0.5, 0.2))])
def test_piecewise_refuses_knots_that_let_t_rise(knots) -> None:
    with pytest.raises(ConfigError, match="knots"):
        PiecewiseTime.Config(knots=knots)


@pytest.mark.parametrize(
    ("options", "match"), [({"m1": 0.4, "m2": 0.5}, "m2"), ({"low": 0.9, "high": 0.5}, "low")]
)
def test_dreamtime_refuses_a_density_without_order(options, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        DreamTime.Config(**options)


def test_shift_has_its_known_values_and_is_flux_with_an_exponent() -> None:
    u = torch.tensor([0.02, 0.5, 0.7, 1.0], dtype=torch.float64)
    expected = torch.tensor([0.0576923, 0.75, 0.875, 1.0], dtype=torch.float64)
    torch.testing.assert_close(shift_time(u, 3.0), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shift_time(u, 1.0), u)
    e_mu = torch.tensor(1.15, dtype=torch.float64).exp()
    torch.testing.assert_close(shift_time(u, float(e_mu)), e_mu / (e_mu + 1 / u - 1))


def test_shifted_covers_the_index_range_of_rfds() -> None:
    """Index 300 to 980 of SD3's schedule: sigma from 0.058 to 0.875, uniform in u."""
    drawn = many(ShiftedTime(ShiftedTime.Config()))
    assert drawn.min() == pytest.approx(0.0577, abs=2e-3)
    assert drawn.max() == pytest.approx(0.875, abs=2e-3)
    u = drawn / (3.0 - 2.0 * drawn)
    assert u.mean() == pytest.approx(0.36, abs=0.02)
    assert u.std() == pytest.approx(0.68 / 12**0.5, abs=0.02)
    assert many(ShiftedTime(ShiftedTime.Config(per_view=False))).unique().numel() == 1


def test_logit_normal_has_the_mean_and_spread_of_its_logit() -> None:
    drawn = many(LogitNormalTime(LogitNormalTime.Config(mean=0.4, std=0.8))).double()
    logit = (drawn / (1 - drawn)).log()
    assert logit.mean() == pytest.approx(0.4, abs=0.05)
    assert logit.std() == pytest.approx(0.8, abs=0.05)


def test_logit_normal_shift_adds_its_logarithm_to_the_logit() -> None:
    plain, shifted = (many(LogitNormalTime(LogitNormalTime.Config(shift=k))).double() for k in (1.0, 3.0))
    torch.testing.assert_close(shifted, shift_time(plain, 3.0), rtol=1e-4, atol=1e-5)
    assert many(LogitNormalTime(LogitNormalTime.Config(per_view=False))).unique().numel() == 1
    wide = many(LogitNormalTime(LogitNormalTime.Config(std=50.0, low=0.1, high=0.8)))
    assert (wide.min(), wide.max()) == (pytest.approx(0.1), pytest.approx(0.8))
