"""Paths of the ODE and the rules that use them (ISM, TSM, SDI, CDS, RFDS), against exact scores in float64.

Notation: y = x / alpha, l = sigma / alpha, q the prior's variance; E(y, l) = l (y - mu) / (q + l^2) is the exact eps.
"""

import math
from dataclasses import replace

import pytest
import torch

from sds3d.config.ramp import Ramp
from sds3d.guidance.cds import CDS
from sds3d.guidance.csd import CSD
from sds3d.guidance.ism import ISM
from sds3d.guidance.rfds import RFDS
from sds3d.guidance.sdi import SDI
from sds3d.guidance.sds import SDS
from sds3d.guidance.trajectory import eps_of, follow, guided_eps, integrate, noised, stride_times
from sds3d.guidance.tsm import TSM
from sds3d.interfaces import Condition, Draw, attach_gradient
from sds3d.mathx.cfg import rescale
from sds3d.mathx.ode import ddim_step
from sds3d.mathx.predict import eps_from_x0, flow_from_eps, x0_from_eps
from sds3d.mathx.schedule import CosineSchedule, FlowSchedule, TableSchedule
from sds3d.moment import Moment
from sds3d.priors.analytic import AnalyticPrior, Mixture
from sds3d.rng import Stream
from tests.toys import draw_at, told

SHAPE = (3, 4, 4)
Q = 0.3
TABLE = TableSchedule(torch.cos(torch.linspace(0.01, 1.55, 1000, dtype=torch.float64)) ** 2)
COSINE, FLOW = CosineSchedule(), FlowSchedule()
SCHEDULES = [COSINE, FLOW, TABLE]
ZERO = torch.zeros((), dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MEAN, MEAN_NULL, MEAN_NEGATIVE = (randn(*SHAPE, seed=seed) for seed in (1, 2, 3))
X, NOISE = randn(2, *SHAPE, seed=4), randn(2, *SHAPE, seed=5)


def prior_of(schedule, *, null=MEAN_NULL, negative=MEAN_NEGATIVE, q: float = Q) -> AnalyticPrior:
    means = {"y": MEAN, "": null, "n": negative}
    return AnalyticPrior({name: Mixture.gaussian(mean, q) for name, mean in means.items()}, schedule)


def one_mean(schedule, q: float = Q) -> AnalyticPrior:
    """The same Gaussian for every prompt."""
    return prior_of(schedule, null=MEAN, negative=MEAN, q=q)


def condition(prior: AnalyticPrior, count: int = 2, *, negative: bool = False) -> Condition:
    text, null, bad = prior.encode_text(["y", "", "n"])
    cond = told(text, null, count)
    return replace(cond, negative=bad.expand(count, -1, -1)) if negative else cond


def lam(schedule, t: float) -> float:
    column = torch.tensor([t], dtype=torch.float64)
    return float(schedule.sigma(column) / schedule.alpha(column))


def exact(y: torch.Tensor, level: float, mean: torch.Tensor = MEAN, q: float = Q) -> torch.Tensor:
    return level * (y - mean) / (q + level**2)


def at(schedule, t: float, noise: torch.Tensor = NOISE) -> Draw:
    return draw_at([t] * len(noise), noise, schedule)


def times(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b.expand_as(a), rtol=tolerance, atol=tolerance)


def limit(quantity, stride: float) -> torch.Tensor:
    """Richardson's estimate of quantity(0) for a first-order method."""
    return 2.0 * quantity(stride / 2) - quantity(stride)


def constant(value: float) -> Ramp:
    return Ramp.constant(value)


# --- the engine ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("start", "end", "stride", "count"),
    [
        (0.001, 0.001, 0.2, 1),
        (0.001, 0.201, 0.2, 1),
        (0.001, 0.601, 0.2, 3),
        (0.001, 0.602, 0.2, 4),
        (0.9, 0.3, 0.2, 3),
        (0.9, 0.299, 0.2, 4),
        (0.0, 1.0, 0.1, 10),
        (0.0, 1.0, 1 / 3, 3),
    ],
)
def test_ways_are_cut_into_the_promised_number_of_strides(schedule, dtype, start, end, stride, count) -> None:
    path = stride_times(
        schedule, torch.tensor([start], dtype=dtype), torch.tensor([end], dtype=dtype), stride
    )
    assert len(path) == count + 1
    assert (float(path[0]), float(path[-1])) == pytest.approx((start, end))
    steps = torch.stack(path).diff(dim=0) * (1 if end >= start else -1)
    assert (steps >= 0).all()
    assert steps.max() < stride * 1.01
    for inner in path[1:-1]:
        torch.testing.assert_close(schedule.snap(inner), inner, rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_stride_has_its_closed_form(schedule) -> None:
    """E(y_b, l_b) = l_b d (q + l_a l_b) / ((q + l_a^2) (q + l_b^2)), d = y_a - mu."""
    prior, (a, b) = one_mean(schedule), (0.3, 0.6)
    la, lb = lam(schedule, a), lam(schedule, b)
    x_a = noised(X, at(schedule, 0.9), times(a, a))
    there = integrate(x_a, eps_of(prior, condition(prior).as_null()), schedule, times(a, a), times(b, b), 0.5)
    (seen,) = prior.eps(there.x, times(b, b), condition(prior).as_null())
    d = X + la * NOISE - MEAN
    close(seen, lb * d * (Q + la * lb) / ((Q + la**2) * (Q + lb**2)))
    close(there.eps, exact(X + la * NOISE, la))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_many_strides_follow_the_exact_ode_with_first_order(schedule) -> None:
    """y(l) = mu + (x - mu) sqrt((q + l^2) / q); halving the stride halves the error."""
    prior = one_mean(schedule)
    field, t = eps_of(prior, condition(prior).as_null()), times(0.7, 0.7)
    alpha, level = schedule.alpha(t), lam(schedule, 0.7)
    solution = alpha * (MEAN + (X - MEAN) * math.sqrt((Q + level**2) / Q))

    def error(stride: float) -> float:
        return float((integrate(X, field, schedule, 0 * t, t, stride).x - solution).abs().max())

    coarse, fine = error(0.04), error(0.02)
    assert fine < 0.1 * X.abs().max()
    assert 0.4 < fine / coarse < 0.6


def test_inversion_and_sampling_meet_again() -> None:
    prior = prior_of(COSINE)
    field, low, high = guided_eps(prior, condition(prior), 3.0), times(0.1, 0.1), times(0.7, 0.7)
    x_low = noised(X, at(COSINE, 0.5), low)

    def error(stride: float) -> float:
        up = integrate(x_low, field, COSINE, low, high, stride).x
        assert (up - x_low).abs().max() > 0.3
        return float((integrate(up, field, COSINE, high, low, stride).x - x_low).abs().max())

    coarse, fine = error(0.02), error(0.01)
    assert fine < 0.3
    assert 0.4 < fine / coarse < 0.6


def test_views_at_other_times_take_their_own_way_and_wait_untouched() -> None:
    prior = prior_of(COSINE)
    cond = condition(prior, 3)
    x, start, end = randn(3, *SHAPE, seed=8), times(0.1, 0.5, 0.4), times(0.8, 0.6, 0.4)
    prior.calls = 0
    together = integrate(x, eps_of(prior, cond.as_text()), COSINE, start, end, 0.2)
    assert prior.calls == 4
    assert torch.equal(together.x[2], x[2])
    for i in range(3):
        alone_field = eps_of(prior, condition(prior, 1).as_text())
        alone = integrate(x[i : i + 1], alone_field, COSINE, start[i : i + 1], end[i : i + 1], 0.2)
        close(together.x[i : i + 1], alone.x)
        close(together.eps[i : i + 1], alone.eps)


def test_field_may_have_any_scale() -> None:
    prior = prior_of(COSINE)
    cond, t = condition(prior), times(0.5, 0.5)
    text, null = prior.eps(X, t, cond.as_text(), cond.as_null())
    close(guided_eps(prior, cond, -7.5)(X, t), null - 7.5 * (text - null))


def test_end_at_the_pure_noise_of_a_flow_is_reached() -> None:
    prior = one_mean(FLOW)
    end = integrate(X, eps_of(prior, condition(prior).as_text()), FLOW, times(0, 0), times(1, 1), 0.25)
    assert torch.isfinite(end.x).all()
    close(end.x, end.eps)  # at t = 1 the image is the noise


def test_path_without_strides_is_refused() -> None:
    with pytest.raises(ValueError, match="two times"):
        follow(X, lambda x, t: x, COSINE, [times(0.5, 0.5)])


# --- ISM -------------------------------------------------------------------------------------------------------


def one_interval(s: float, t: float, **settings) -> dict:
    """Settings under which x is noised straight to s: one interval s -> t."""
    plain = {"delta": constant(t - s), "start": s, "cfg_scale": 1.0, "weight": "uniform", "factor": 1.0}
    return {**plain, **settings}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ism_on_one_interval_has_its_closed_form(schedule) -> None:
    """grad = d q (l_t - l_s) / ((q + l_s^2) (q + l_t^2)), d = y_s - mu: a pull to the mean."""
    prior, (s, t) = one_mean(schedule), (0.4, 0.7)
    ls, lt = lam(schedule, s), lam(schedule, t)
    for start in (s, 0.9):  # a start above s means s
        rule = ISM(ISM.Config(**one_interval(s, t, start=start)), prior)
        grad = rule.residual(X, at(schedule, t), condition(prior)).grad
        close(grad, (X + ls * NOISE - MEAN) * Q * (lt - ls) / ((Q + ls**2) * (Q + lt**2)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ism_inverts_with_the_empty_prompt_and_guides_against_the_negative(schedule) -> None:
    prior, (s, t), scale = prior_of(schedule), (0.4, 0.7), 7.5
    ls, lt = lam(schedule, s), lam(schedule, t)
    rule = ISM(ISM.Config(**one_interval(s, t, cfg_scale=scale)), prior)
    grad = rule.residual(X, at(schedule, t), condition(prior, negative=True)).grad
    y_s = X + ls * NOISE
    eps_s = exact(y_s, ls, MEAN_NULL)
    y_t = y_s + (lt - ls) * eps_s
    against = exact(y_t, lt, MEAN_NEGATIVE)
    close(grad, against + scale * (exact(y_t, lt) - against) - eps_s)


def test_ism_with_reversed_cfg_inverts_with_the_mixed_field() -> None:
    prior, (s, t), g = prior_of(COSINE), (0.4, 0.7), 2.0
    ls, lt = lam(COSINE, s), lam(COSINE, t)
    rule = ISM(ISM.Config(**one_interval(s, t, inversion_scale=g)), prior)
    grad = rule.residual(X, at(COSINE, t), condition(prior, negative=True)).grad
    y_s = X + ls * NOISE
    null, negative = exact(y_s, ls, MEAN_NULL), exact(y_s, ls, MEAN_NEGATIVE)
    eps_s = null + g * (negative - null)
    close(grad, exact(y_s + (lt - ls) * eps_s, lt) - eps_s)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ism_vanishes_with_its_interval(schedule) -> None:
    """grad / (l_t - l_s) -> d q / (q + l^2)^2, and is 0 at delta = 0."""
    prior, t, delta = one_mean(schedule), 0.6, 1e-3
    cond, draw = condition(prior), at(schedule, t)
    ls, lt = lam(schedule, t - delta), lam(schedule, t)
    grad = ISM(ISM.Config(**one_interval(t - delta, t)), prior).residual(X, draw, cond).grad
    close(grad / (lt - ls), (X + ls * NOISE - MEAN) * Q / (Q + lt**2) ** 2, 1e-2)
    for settings in ({"start": 0.0}, {"start": 0.3}):
        none = ISM(ISM.Config(**one_interval(t, t) | settings), prior).residual(X, draw, cond).grad
        close(none, ZERO, 1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ism_with_exact_inversion_has_its_closed_form(schedule) -> None:
    """((x - mu) / sqrt(q)) (l_b / sqrt(q + l_b^2) - l_a / sqrt(q + l_a^2)); no noise remains."""
    prior, (s, t) = one_mean(schedule), (0.5, 0.501)
    ls, lt = lam(schedule, s), lam(schedule, t)

    def grad(stride: float) -> torch.Tensor:
        settings = one_interval(s, t, start=0.0, stride=stride, strides=1000)
        return ISM(ISM.Config(**settings), prior).residual(X, at(schedule, t, 0 * X), condition(prior)).grad

    gain = lt / math.sqrt(Q + lt**2) - ls / math.sqrt(Q + ls**2)
    expected = (X - MEAN) * gain / math.sqrt(Q)
    torch.testing.assert_close(limit(grad, 0.025), expected, rtol=0.01, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rule", [ISM, TSM])
def test_interval_rules_vanish_under_a_point_mass(schedule, rule) -> None:
    """Every trajectory is straight, so all predictions on it agree, whatever the strides."""
    prior = one_mean(schedule, q=0.0)
    config = rule.Config(cfg_scale=7.5, delta=constant(0.1), start=0.05)
    close(rule(config, prior).residual(X, at(schedule, 0.7), condition(prior)).grad, ZERO, 1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ism_with_random_noise_is_sds(schedule) -> None:
    prior, draw = prior_of(schedule), at(schedule, 0.6)
    cond = condition(prior)
    ism = ISM(ISM.Config(random_noise=True), prior).residual(X, draw, cond).grad
    assert prior.calls == 2
    close(ism, 0.1 * SDS(SDS.Config(weight="recon"), prior).residual(X, draw, cond).grad)


def test_ism_is_linear_in_the_guidance_scale() -> None:
    prior, draw = prior_of(COSINE), at(COSINE, 0.6)
    one, two, six = (
        ISM(ISM.Config(cfg_scale=scale), prior).residual(X, draw, condition(prior)).grad
        for scale in (1.0, 2.0, 6.0)
    )
    close(six, one + 5.0 * (two - one))


def test_ism_interval_follows_its_ramp() -> None:
    """0.1 at the start of the run, 0.08 from 30 % of it on."""
    prior, cond = one_mean(COSINE), condition(one_mean(COSINE))
    for step, delta in ((0, 0.1), (15, 0.09), (30, 0.08), (99, 0.08)):
        draw = replace(at(COSINE, 0.6), now=Moment(step, 100))
        moving = ISM(ISM.Config(), prior).residual(X, draw, cond).grad
        close(moving, ISM(ISM.Config(delta=constant(delta)), prior).residual(X, draw, cond).grad)


def test_ism_starts_at_most_its_strides_below() -> None:
    """With one stride of 0.2 the inversion starts at s - 0.2 from noise; with many it starts clean at 0."""
    prior, t = one_mean(COSINE), 0.7
    config = ISM.Config(**one_interval(0.6, t, start=0.0, strides=1))
    grad = ISM(config, prior).residual(X, at(COSINE, t), condition(prior)).grad
    l0, ls, lt = (lam(COSINE, value) for value in (0.4, 0.6, 0.7))
    y_s = X + l0 * NOISE
    y_s = y_s + (ls - l0) * exact(y_s, l0)
    close(grad, (y_s - MEAN) * Q * (lt - ls) / ((Q + ls**2) * (Q + lt**2)))
    clean = ISM(ISM.Config(), prior)
    one, other = (clean.residual(X, at(COSINE, t, n), condition(prior)).grad for n in (NOISE, -NOISE))
    assert torch.equal(one, other)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("t", "strides"), [(0.05, 1), (0.2, 1), (0.28, 1), (0.45, 2), (0.75, 4), (0.98, 5)])
def test_interval_rules_cost_their_passes(schedule, t: float, strides: int) -> None:
    """max(1, ceil((s - i0) / 0.2)) + 1 + 2 with s = t - 0.08; TSM one more; reversed CFG doubles the inversion."""
    prior = prior_of(schedule)
    cond, draw = condition(prior, negative=True), at(schedule, t)
    delta = constant(0.08)
    for rule, settings, expected in (
        (ISM, {}, strides + 3),
        (TSM, {}, strides + 4),
        (ISM, {"inversion_scale": 1.5}, 2 * (strides + 1) + 2),
    ):
        prior.calls = 0
        rule(rule.Config(delta=delta, **settings), prior).residual(X, draw, cond)
        assert prior.calls == expected


# --- TSM -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("settings", [{}, {"inversion_scale": 2.0}, {"delta": constant(0.3)}])
def test_tsm_at_ratio_zero_is_ism(schedule, settings) -> None:
    prior, draw = prior_of(schedule), at(schedule, 0.7)
    cond = condition(prior, negative=True)
    tsm = TSM(TSM.Config(ratio=0.0, **settings), prior).residual(X, draw, cond).grad
    close(tsm, ISM(ISM.Config(**settings), prior).residual(X, draw, cond).grad, 1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tsm_at_ratio_one_is_csd_times_the_scale(schedule) -> None:
    """At m = t both predictions share x_t: g (eps_y - eps_null), and 0 where the prompts agree."""
    draw, settings = at(schedule, 0.7), {"ratio": 1.0, "cfg_scale": 4.0, "factor": 1.0, "weight": "uniform"}
    prior = prior_of(schedule)
    tsm = TSM(TSM.Config(**settings), prior).residual(X, draw, condition(prior)).grad
    csd = CSD(CSD.Config(weight="uniform"), prior).residual(X, draw, condition(prior)).grad
    close(tsm, 4.0 * csd)
    same = one_mean(schedule)
    close(TSM(TSM.Config(**settings), same).residual(X, draw, condition(same)).grad, ZERO, 1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ratio", [0.3, 0.954])
def test_tsm_has_its_closed_form(schedule, ratio: float) -> None:
    """The one-stride formula at t minus the same at m."""
    prior, (s, t) = one_mean(schedule), (0.4, 0.8)
    m = float(schedule.snap(times(s + ratio * (t - s))))
    ls, lm, lt = (lam(schedule, value) for value in (s, m, t))
    grad = (
        TSM(TSM.Config(**one_interval(s, t, ratio=ratio)), prior)
        .residual(X, at(schedule, t), condition(prior))
        .grad
    )
    d = X + ls * NOISE - MEAN

    def one_stride(level: float) -> torch.Tensor:
        return level * d * (Q + ls * level) / ((Q + ls**2) * (Q + level**2))

    close(grad, one_stride(lt) - one_stride(lm))


# --- SDI -------------------------------------------------------------------------------------------------------

STILL = {"jitter": 0.0, "extra_noise": 0.0}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("weight", ["recon", "sds"])
def test_sdi_with_random_noise_is_sds(schedule, weight: str) -> None:
    prior, draw = prior_of(schedule), at(schedule, 0.6)
    cond = condition(prior)
    sdi = SDI(SDI.Config(random_noise=True, weight=weight, **STILL), prior).residual(X, draw, cond)
    sds = SDS(SDS.Config(weight=weight), prior).residual(X, draw, cond)
    for name in ("grad", "target", "weight"):
        close(getattr(sdi, name), getattr(sds, name))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sdi_with_exact_inversion_has_its_closed_form(schedule) -> None:
    """x - x0_hat = (x - mu) (1 - sqrt(q / (q + l^2))): towards the mean, without noise."""
    prior, t = one_mean(schedule), 0.6

    def grad(stride: float) -> torch.Tensor:
        config = SDI.Config(cfg_scale=1.0, inversion_scale=1.0, steps=round(1 / stride), **STILL)
        return SDI(config, prior).residual(X, at(schedule, t), condition(prior)).grad

    expected = (X - MEAN) * (1 - math.sqrt(Q / (Q + lam(schedule, t) ** 2)))
    torch.testing.assert_close(limit(grad, 0.02), expected, rtol=0.01, atol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sdi_vanishes_at_the_root_of_its_fixed_point_equation(schedule) -> None:
    """kappa* = l (x - mu) / q solves eps(alpha x + sigma kappa) = kappa; inversion stays below, at half for small l."""
    prior, cond = one_mean(schedule), condition(one_mean(schedule))
    # A table has no level between 0 and its first step, so its inversions of small t are coarse.
    for t in (0.3, 0.8) if schedule is TABLE else (0.02, 0.3, 0.8):
        level = lam(schedule, t)
        root = level * (X - MEAN) / Q
        rule = SDI(SDI.Config(random_noise=True, **STILL), prior)
        close(rule.residual(X, at(schedule, t, root), cond).grad, ZERO, 1e-10)
        t_both = times(t, t)
        a, s = schedule.alpha(t_both), schedule.sigma(t_both)
        field = eps_of(prior, cond.as_text())

        def share(stride: float) -> torch.Tensor:
            path = integrate(X, field, schedule, 0 * t_both, t_both, stride)  # noqa: B023
            return (path.x - a * X) / s / root  # noqa: B023

        ratio = limit(share, t / 10)
        expected = (math.sqrt(1 + level**2 / Q) - 1) / level / (level / Q)
        assert 0.0 < expected <= 0.5 + 1e-9
        torch.testing.assert_close(ratio, torch.full_like(ratio, expected), rtol=0.05, atol=0.005)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sdi_step_is_a_ddim_step_of_the_clean_estimate(schedule) -> None:
    """With kappa = eps(x_t), x = x0_hat(t): x - grad at the next time is the clean estimate after one DDIM step."""
    prior, (t, later) = prior_of(schedule), (0.8, 0.6)
    cond, t_both, later_both = condition(prior), times(t, t), times(later, later)
    field = guided_eps(prior, cond, 7.5)
    kappa = field(NOISE, t_both)
    x = x0_from_eps(NOISE, kappa, schedule.alpha(t_both), schedule.sigma(t_both))
    x_later = ddim_step(NOISE, kappa, schedule, t_both, later_both)
    expected = x0_from_eps(
        x_later, field(x_later, later_both), schedule.alpha(later_both), schedule.sigma(later_both)
    )
    residual = SDI(SDI.Config(random_noise=True, **STILL), prior).residual(
        x, at(schedule, later, kappa), cond
    )
    close(x - residual.grad, expected)


def test_sdi_inverts_under_the_prompt_with_negative_guidance() -> None:
    prior, (start, t), g = prior_of(COSINE), (0.3, 0.5), -7.5
    l0, lt = lam(COSINE, start), lam(COSINE, t)
    config = SDI.Config(start=start, steps=1, cfg_scale=1.0, inversion_scale=g, **STILL)
    residual = SDI(config, prior).residual(X, at(COSINE, t), condition(prior))
    y = X + l0 * NOISE
    null = exact(y, l0, MEAN_NULL)
    y = y + (lt - l0) * (null + g * (exact(y, l0) - null))
    close(residual.target, y - lt * exact(y, lt))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sdi_extra_noise_reaches_the_target_shrunk_by_the_prior(schedule) -> None:
    """x0_hat moves by 0.3 l n q / (q + l^2)."""
    prior, t = one_mean(schedule), 0.5
    cond, level = condition(prior), lam(schedule, t)
    with_noise, without = (
        SDI(SDI.Config(jitter=0.0, extra_noise=extra), prior).residual(X, at(schedule, t), cond).target
        for extra in (0.3, 0.0)
    )
    close(with_noise - without, 0.3 * level * NOISE * Q / (Q + level**2))


def test_sdi_is_zero_at_the_mean() -> None:
    prior = one_mean(COSINE)
    close(
        SDI(SDI.Config(**STILL), prior)
        .residual(MEAN.expand(2, -1, -1, -1), at(COSINE, 0.8), condition(prior))
        .grad,
        ZERO,
        1e-10,
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("t", "strides"), [(0.05, 1), (0.25, 3), (0.55, 6), (0.98, 10)])
def test_sdi_costs_its_passes(schedule, t: float, strides: int) -> None:
    """2 ceil(10 u) + 2, at most 22."""
    prior = prior_of(schedule)
    SDI(SDI.Config(jitter=0.0), prior).residual(X, at(schedule, t), condition(prior))
    assert prior.calls == 2 * strides + 2


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sdi_jitter_is_shared_and_stays_below_pure_noise(schedule) -> None:
    prior, cond = prior_of(schedule), condition(prior_of(schedule))
    rule, still = SDI(SDI.Config(jitter=0.1, extra_noise=0.0), prior), SDI(SDI.Config(**STILL), prior)
    draw = at(schedule, 0.4)
    jitter = 0.1 * float(draw.stream.fork("jitter").uniform(1))
    assert 0.0 < jitter < 0.1
    later = at(schedule, float(schedule.snap(times(0.4 + jitter))))
    close(rule.residual(X, draw, cond).grad, still.residual(X, later, cond).grad)
    assert torch.isfinite(rule.residual(X, at(schedule, 1.0), cond).grad).all()


def test_sdi_clips_its_target_on_request() -> None:
    prior, cond, draw = prior_of(COSINE), condition(prior_of(COSINE)), at(COSINE, 0.9)
    free, clipped = (
        SDI(SDI.Config(clip_x0=clip), prior).residual(X, draw, cond).target for clip in (False, True)
    )
    close(clipped, free.clamp(-1, 1))
    assert free.abs().max() > 1.0


# --- CDS -------------------------------------------------------------------------------------------------------


def cds(prior, gap: float = 0.2, **settings) -> CDS:
    plain = {"cfg_scale": constant(1.0), "gap": gap, "perturb": 0.0}
    return CDS(CDS.Config(**plain | settings), prior)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_cds_has_its_closed_form_and_pulls_to_the_mean(schedule) -> None:
    """(x + l_t n - mu) q (l_t - l_t') / ((q + l_t^2) (q + l_t'^2)): noisier minus cleaner."""
    prior, (lower, upper) = one_mean(schedule), (0.4, 0.6)
    ll, lu = lam(schedule, lower), lam(schedule, upper)
    grad = cds(prior).residual(X, at(schedule, lower), condition(prior)).grad
    close(grad, (X + lu * NOISE - MEAN) * Q * (lu - ll) / ((Q + lu**2) * (Q + ll**2)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_cds_is_ism_with_its_levels_exchanged(schedule) -> None:
    """Equal displacement d from the mean, at the upper level for CDS and at the lower for ISM: equal gradients."""
    prior, (lower, upper) = one_mean(schedule), (0.4, 0.6)
    ll, lu = lam(schedule, lower), lam(schedule, upper)
    down = cds(prior).residual(X, at(schedule, lower, NOISE * ll / lu), condition(prior)).grad
    up = ISM(ISM.Config(**one_interval(lower, upper)), prior)
    close(down, up.residual(X, at(schedule, upper), condition(prior)).grad)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_cds_vanishes_without_a_gap_and_under_a_point_mass(schedule) -> None:
    prior, point = prior_of(schedule), one_mean(schedule, q=0.0)
    draw, scale = at(schedule, 0.4), constant(51.0)
    close(cds(prior, gap=0.0, cfg_scale=scale).residual(X, draw, condition(prior)).grad, ZERO, 1e-9)
    close(cds(point, cfg_scale=scale).residual(X, draw, condition(point)).grad, ZERO, 1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_cds_weighs_at_the_upper_time_and_guides_both_ends(schedule) -> None:
    prior, (lower, upper), g = prior_of(schedule), (0.4, 0.6), 5.0
    ll, lu = lam(schedule, lower), lam(schedule, upper)
    rule = cds(prior, cfg_scale=constant(g), weight="sds")
    grad = rule.residual(X, at(schedule, lower), condition(prior)).grad
    assert prior.calls == 4

    def guided(y: torch.Tensor, level: float) -> torch.Tensor:
        null = exact(y, level, MEAN_NULL)
        return null + g * (exact(y, level) - null)

    y = X + lu * NOISE
    first = guided(y, lu)
    second = guided(y + (ll - lu) * first, ll)
    close(grad, schedule.sigma(times(upper)) ** 2 * (first - second))


def test_cds_upper_time_is_drawn_once_and_bounded() -> None:
    prior, cond = prior_of(COSINE), condition(prior_of(COSINE))
    draw = at(COSINE, 0.4)
    u = float(draw.stream.fork("gap").uniform(1))
    moved = cds(prior, gap=0.1, perturb=0.2).residual(X, draw, cond).grad
    close(moved, cds(prior, gap=0.1 + 0.2 * u).residual(X, draw, cond).grad, 1e-6)
    close(
        cds(prior, gap=0.9).residual(X, draw, cond).grad,
        cds(prior, gap=0.58).residual(X, draw, cond).grad,
    )
    beyond = cds(prior, gap=0.1).residual(X, at(COSINE, 0.99), cond).grad
    close(beyond, ZERO, 1e-9)  # no room above: both times are equal


def test_cds_scale_follows_its_ramp() -> None:
    prior, cond = prior_of(COSINE), condition(prior_of(COSINE))
    ramp = cds(prior, cfg_scale=Ramp(start=101.0, end=51.0))
    half = ramp.residual(X, replace(at(COSINE, 0.4), now=Moment(1, 2)), cond).grad
    close(half, cds(prior, cfg_scale=constant(76.0)).residual(X, at(COSINE, 0.4), cond).grad)


def test_cds_rescale_compares_clean_estimates() -> None:
    """grad = (D2 - D1) / l_t', D the clean estimates, D1 unscaled, the step made with the rescaled prediction."""
    prior, (lower, upper), g, share = prior_of(COSINE), (0.4, 0.6), 6.0, 0.5
    cond, ll, lu = condition(prior), lam(COSINE, lower), lam(COSINE, upper)
    grad = cds(prior, cfg_scale=constant(g), cfg_rescale=share).residual(X, at(COSINE, lower), cond).grad
    up, low = times(upper, upper), times(lower, lower)
    x_t = noised(X, at(COSINE, upper), up)
    a, s = COSINE.alpha(up), COSINE.sigma(up)
    d1 = x0_from_eps(x_t, guided_eps(prior, cond, g)(x_t, up), a, s)
    text = x0_from_eps(x_t, eps_of(prior, cond.as_text())(x_t, up), a, s)
    scaled = eps_from_x0(x_t, rescale(d1, text, share), a, s)
    x_low = ddim_step(x_t, scaled, COSINE, up, low)
    d2 = x0_from_eps(x_low, guided_eps(prior, cond, g)(x_low, low), COSINE.alpha(low), COSINE.sigma(low))
    close(grad, (d2 - d1) / ll)
    assert lu > ll
    assert (scaled - guided_eps(prior, cond, g)(x_t, up)).abs().max() > 0.01


# --- RFDS family -----------------------------------------------------------------------------------------------


def rfds(prior, noise: str = "fresh", scale: float = 1.0, **settings) -> RFDS:
    return RFDS(RFDS.Config(noise=noise, cfg_scale=constant(scale), **settings), prior, Stream(0, "rules"))


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_rfds_is_the_velocity_residual_and_sds_on_a_flow(t: float) -> None:
    prior, draw = prior_of(FLOW), at(FLOW, t)
    cond = condition(prior)
    grad = rfds(prior, scale=100.0).residual(X, draw, cond).grad
    assert prior.calls == 2
    x_t = (1 - t) * X + t * NOISE
    null, text = (
        flow_from_eps(x_t, eps, draw.sigma) for eps in prior.eps(x_t, draw.t, cond.as_null(), cond.as_text())
    )
    close(grad, null + 100.0 * (text - null) - (NOISE - X))
    close(grad, SDS(SDS.Config(cfg_scale=100.0, weight="velocity"), prior).residual(X, draw, cond).grad)


@pytest.mark.parametrize("noise", ["fresh", "rev", "ucm", "learned"])
def test_rfds_family_vanishes_where_the_prior_is_the_image(noise: str) -> None:
    """Point mass at x: v = noise - x whatever the noise, and RFDS-Rev leaves the noise unchanged."""
    prior = one_mean(FLOW, q=0.0)
    x = MEAN.expand(2, -1, -1, -1)
    rule = rfds(prior, noise, ucm_warmup=0.0, ucm_start=0.01)
    draw = at(FLOW, 0.6)
    close(rule.residual(x, draw, condition(prior)).grad, ZERO, 1e-9)
    if noise == "rev":
        close(rule._noise(x, draw, condition(prior)), NOISE)


@pytest.mark.parametrize("t", [0.2, 0.7])
def test_rfds_rev_is_the_published_correction(t: float) -> None:
    """noise + (1 - t) (v_y + x - noise) = eps_y, then RFDS with it; on InstaFlow the step is 1: noise = v_y + x."""
    prior, draw = prior_of(FLOW), at(FLOW, t)
    cond = condition(prior)
    x_t = draw.diffuse(X)
    v = flow_from_eps(x_t, eps_of(prior, cond.as_text())(x_t, draw.t), draw.sigma)
    for step, noise in (("eps", NOISE + (1 - t) * (v + X - NOISE)), ("velocity", X + v)):
        prior.calls = 0
        rev = rfds(prior, "rev", 50.0, rev_step=step).residual(X, draw, cond).grad
        assert prior.calls == 3
        close(rev, rfds(prior, scale=50.0).residual(X, at(FLOW, t, noise), cond).grad)


def test_ucm_with_many_steps_is_coupled_by_the_ode() -> None:
    """The prompt's flow carries x to (x - mu) / sqrt(q): the residual holds no randomness, and its error is O(1/K)."""
    prior, cond, draw = prior_of(FLOW), condition(prior_of(FLOW)), at(FLOW, 0.6)
    coupled = (X - MEAN) / math.sqrt(Q)

    def rule(stride: float) -> RFDS:
        return rfds(prior, "ucm", ucm_warmup=0.0, ucm_steps=round(1 / stride))

    def noise(stride: float) -> torch.Tensor:
        return rule(stride)._noise(X, draw, cond)

    coarse, fine = (float((noise(stride) - coupled).abs().max()) for stride in (0.04, 0.02))
    assert 0.4 < fine / coarse < 0.6
    torch.testing.assert_close(limit(noise, 0.02), coupled, rtol=0.01, atol=0.01)
    one, other = (rule(0.25).residual(X, at(FLOW, 0.6, n), cond).grad for n in (NOISE, -NOISE))
    assert torch.equal(one, other)


def test_ucm_begins_with_rfds_and_counts_its_passes() -> None:
    prior, cond = prior_of(FLOW), condition(prior_of(FLOW))
    rule, plain = rfds(prior, "ucm", 60.0), rfds(prior, scale=60.0)
    for step, passes in ((0, 2), (17, 2), (18, 5), (99, 5)):
        draw = replace(at(FLOW, 0.6), now=Moment(step, 100))
        prior.calls = 0
        grad = rule.residual(X, draw, cond).grad
        assert prior.calls == passes
        same = torch.equal(grad, plain.residual(X, draw, cond).grad)
        assert same == (passes == 2)


def test_learned_noise_finds_the_fixed_point() -> None:
    """noise = v_y + x holds at kappa* = l (x - mu) / q, the root that SDI's inversion only approaches."""
    prior, t = prior_of(FLOW), 0.3
    cond, draw, x = condition(prior, 1), at(FLOW, t, NOISE[:1]), X[:1]
    rule = rfds(prior, "learned", 50.0)
    (group,) = rule.groups()
    assert group.lr == 0.01
    (noise,) = group.params
    prior.calls = 0
    residual = rule.residual(x, draw, cond)
    assert prior.calls == 2
    loss = residual.aux_loss
    (gradient,) = torch.autograd.grad(loss, noise)
    x_t = draw.alpha * x + draw.sigma * noise.detach()
    v = flow_from_eps(x_t, eps_of(prior, cond.as_text())(x_t, draw.t), draw.sigma)
    torch.testing.assert_close(
        gradient.double(), 2 * (noise.detach() - v - x) / noise.numel(), rtol=1e-4, atol=1e-6
    )
    step = torch.optim.SGD([noise], lr=0.25 * noise.numel())
    for _ in range(40):
        step.zero_grad()
        rule.residual(x, draw, cond).aux_loss.backward()
        step.step()
    root = (t / (1 - t)) * (x - MEAN) / Q
    torch.testing.assert_close(noise.detach().double(), root, rtol=1e-3, atol=1e-3)
    assert rfds(prior, "learned").residual(x, draw, cond).grad.requires_grad is False


def test_learned_noise_has_one_image_or_one_per_view_slot() -> None:
    prior, cond, draw = prior_of(FLOW), condition(prior_of(FLOW), 4), at(FLOW, 0.5, randn(4, *SHAPE))
    shared = rfds(prior, "learned")._noise(randn(4, *SHAPE), draw, cond)
    assert torch.equal(shared[0], shared[3])
    slots = rfds(prior, "learned", noise_images=2)._noise(randn(4, *SHAPE), draw, cond)
    assert torch.equal(slots[0], slots[2])
    assert not torch.equal(slots[0], slots[1])
    assert set(rfds(prior, "learned").state_dict()) == {"noise"}
    assert rfds(prior).groups() == ()


def test_random_weight_is_one_number_per_batch() -> None:
    prior, cond, draw = prior_of(FLOW), condition(prior_of(FLOW)), at(FLOW, 0.5)
    weighed = rfds(prior, random_weight=True).residual(X, draw, cond)
    ratio = weighed.grad / rfds(prior).residual(X, draw, cond).grad
    close(ratio, draw.stream.fork("weight").normal(2).sigmoid().mean().double())
    assert 0.0 < float(ratio[0, 0, 0, 0]) < 1.0


# --- what holds for all of them --------------------------------------------------------------------------------

CASES = {
    "ism": (ISM, {}),
    "ism-reversed": (ISM, {"inversion_scale": 2.0}),
    "ism-random": (ISM, {"random_noise": True}),
    "tsm": (TSM, {}),
    "tsm-code": (TSM, {"ratio": 0.954}),
    "sdi": (SDI, {}),
    "cds": (CDS, {}),
    "cds-rescale": (CDS, {"cfg_rescale": 0.5}),
    "rfds": (RFDS, {}),
    "rfds-random": (RFDS, {"random_weight": True}),
    "rfds-rev": (RFDS, {"noise": "rev"}),
    "ucm": (RFDS, {"noise": "ucm", "ucm_warmup": 0.0}),
    "irfds": (RFDS, {"noise": "learned"}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rules_are_deterministic_and_commute_with_permuting_views(case: str, schedule) -> None:
    kind, settings = CASES[case]
    prior = prior_of(schedule)
    rule = kind(kind.Config(**settings), prior, Stream(3, "rules"))
    x, noise, t = randn(4, *SHAPE, seed=1), randn(4, *SHAPE, seed=2), [0.2, 0.4, 0.6, 0.8]
    order = [2, 0, 3, 1]
    cond = condition(prior, 4, negative=True)
    whole = rule.residual(x, draw_at(t, noise, schedule), cond).grad
    assert torch.equal(whole, rule.residual(x, draw_at(t, noise, schedule), cond).grad)
    shuffled = rule.residual(x[order], draw_at([t[i] for i in order], noise[order], schedule), cond).grad
    torch.testing.assert_close(whole[order], shuffled)


@pytest.mark.parametrize("case", CASES)
def test_gradient_on_x_is_exactly_grad_over_views_and_nothing_else_learns(case: str) -> None:
    kind, settings = CASES[case]
    prior = prior_of(FLOW)
    for mixture in prior.mixtures.values():
        mixture.means.requires_grad_()
    rule = kind(kind.Config(**settings), prior, Stream(3, "rules"))
    x = X.clone().requires_grad_()
    residual = rule.residual(x.detach(), at(FLOW, 0.5), condition(prior))
    attach_gradient(x, residual.grad).backward()
    torch.testing.assert_close(x.grad, residual.grad / 2)
    assert all(mixture.means.grad is None for mixture in prior.mixtures.values())
    assert all(p.grad is None for p in rule.parameters())
    for mixture in prior.mixtures.values():
        mixture.means.requires_grad_(False)


@pytest.mark.parametrize("case", CASES)
def test_float32_stays_float32_and_agrees(case: str) -> None:
    kind, settings = CASES[case]
    prior = prior_of(FLOW)
    rule = kind(kind.Config(**settings), prior, Stream(3, "rules"))
    double = rule.residual(X, at(FLOW, 0.5), condition(prior)).grad
    single = rule.residual(X.float(), draw_at([0.5, 0.5], NOISE.float(), FLOW), condition(prior)).grad
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-3 * float(double.abs().max()))


@pytest.mark.parametrize("case", ["sdi", "rfds", "rfds-random", "rfds-rev", "ucm", "irfds"])
def test_rules_with_a_target_pull_exactly_towards_it(case: str) -> None:
    kind, settings = CASES[case]
    prior = prior_of(FLOW)
    residual = kind(kind.Config(**settings), prior).residual(X, at(FLOW, 0.5), condition(prior))
    assert kind.has_target
    assert torch.equal(residual.grad, residual.weight * (X - residual.target))


def test_rules_without_a_target_say_so() -> None:
    assert not any(kind.has_target for kind in (ISM, TSM, CDS))
    assert RFDS.needs(RFDS.Config()) == ("flow",)
