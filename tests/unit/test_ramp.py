"""Ramps: ends, order, clocks and shapes."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sds3d.config.ramp import Ramp
from sds3d.moment import Moment

SHAPES = ["linear", "sqrt", "cosine", "log", "step"]


@given(st.floats(-5, 5), st.integers(0, 99))
def test_constant_never_moves(value: float, step: int) -> None:
    ramp = Ramp.constant(value)
    assert ramp.is_constant
    assert ramp.at(Moment(step, 100)) == pytest.approx(value)


@pytest.mark.parametrize("shape", SHAPES)
def test_holds_its_ends_outside_the_interval(shape: str) -> None:
    ramp = Ramp(start=0.9, end=0.1, over_frac=(0.2, 0.6), shape=shape)
    assert ramp.at(Moment(0, 100)) == pytest.approx(0.9)
    assert ramp.at(Moment(20, 100)) == pytest.approx(0.9)
    assert ramp.at(Moment(60, 100)) == pytest.approx(0.1)
    assert ramp.at(Moment(99, 100)) == pytest.approx(0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_is_monotone_and_stays_between_its_ends(shape: str) -> None:
    values = [Ramp(start=0.9, end=0.1, shape=shape).at(Moment(step, 50)) for step in range(50)]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(values))
    assert min(values) >= 0.1 - 1e-12
    assert max(values) <= 0.9 + 1e-12


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", 1.0 + 0.25 * 3.0),
        ("sqrt", 1.0 + 0.5 * 3.0),
        ("cosine", 1.0 + (0.5 - 0.5 * math.cos(math.pi / 4)) * 3.0),
        ("log", 4.0**0.25),
        ("step", 1.0),
    ],
)
def test_value_a_quarter_of_the_way(shape: str, expected: float) -> None:
    assert Ramp(start=1.0, end=4.0, shape=shape).at(Moment(25, 100)) == pytest.approx(expected)


def test_steps_clock_ignores_the_length_of_the_run() -> None:
    ramp = Ramp(start=0.0, end=1.0, over_steps=(0, 10))
    assert ramp.at(Moment(5, 20)) == ramp.at(Moment(5, 20_000)) == 0.5


def test_fraction_clock_ignores_the_number_of_steps() -> None:
    ramp = Ramp(start=0.0, end=1.0)
    assert ramp.at(Moment(5, 10)) == ramp.at(Moment(500, 1000)) == 0.5


def test_empty_interval_is_a_jump() -> None:
    ramp = Ramp(start=0.0, end=1.0, over_steps=(3, 3))
    assert [ramp.at(Moment(step, 10)) for step in (2, 3, 4)] == [0.0, 1.0, 1.0]
