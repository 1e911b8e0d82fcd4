"""Guidance rules against priors whose score is known exactly, in double precision."""

import pytest
import torch

from sds3d.config.ramp import Ramp
from sds3d.guidance import CSD, RULES, SDS
from sds3d.guidance.pixel_clip import clip_pixel_gradient
from sds3d.guidance.time import AnnealedTime, UniformTime
from sds3d.interfaces import Condition, attach_gradient
from sds3d.mathx.schedule import CosineSchedule, FlowSchedule, TableSchedule
from sds3d.moment import Moment
from sds3d.priors.analytic import AnalyticPrior, Mixture
from sds3d.rng import Stream
from tests.toys import draw_at, told

SHAPE = (3, 4, 4)
VARIANCE = 0.3
TABLE = TableSchedule(torch.cos(torch.linspace(0.01, 1.55, 1000, dtype=torch.float64)) ** 2)
SCHEDULES = [CosineSchedule(), FlowSchedule(), TABLE]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MEAN_TEXT, MEAN_NULL = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)


def gaussian_prior(schedule, variance: float = VARIANCE) -> AnalyticPrior:
    return AnalyticPrior(
        {"y": Mixture.gaussian(MEAN_TEXT, variance), "": Mixture.gaussian(MEAN_NULL, variance)}, schedule
    )


def condition(prior: AnalyticPrior, count: int) -> Condition:
    text, null = prior.encode_text(["y", ""])
    return told(text, null, count)


def levels(schedule, t: float) -> tuple[float, float]:
    column = torch.tensor([t], dtype=torch.float64)
    return float(schedule.alpha(column)), float(schedule.sigma(column))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_analytic_eps_is_the_gradient_of_the_log_density(schedule) -> None:
    mixture = Mixture(
        means=randn(3, *SHAPE, seed=5),
        variances=torch.tensor([0.2, 0.5, 1.1], dtype=torch.float64),
        weights=torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64),
    )
    x = randn(2, *SHAPE, seed=6).requires_grad_()
    t = torch.tensor([0.3, 0.7], dtype=torch.float64)
    a, s = schedule.alpha(t), schedule.sigma(t)
    size = x[0].numel()
    spread = a[:, :, 0, 0] ** 2 * mixture.variances + s[:, :, 0, 0] ** 2
    square = (x[:, None] - a[:, None] * mixture.means[None]).square().sum((2, 3, 4))
    log_p = (mixture.weights.log() - 0.5 * square / spread - 0.5 * size * spread.log()).logsumexp(1)
    (score,) = torch.autograd.grad(log_p.sum(), x)
    torch.testing.assert_close(mixture.eps(x.detach(), a, s), -s * score, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_sds_residual_has_its_closed_form(schedule, t: float) -> None:
    """eps* - eps = (a s (x - mu) - a^2 q eps) / (a^2 q + s^2): pull to the mean plus pure noise."""
    prior = gaussian_prior(schedule)
    a, s = levels(schedule, t)
    x, noise = randn(2, *SHAPE, seed=3), randn(2, *SHAPE, seed=4)
    rule = SDS(SDS.Config(cfg_scale=1.0, weight="uniform"), prior)
    grad = rule.residual(x, draw_at([t, t], noise, schedule), condition(prior, 2)).grad
    expected = (a * s * (x - MEAN_TEXT) - a**2 * VARIANCE * noise) / (a**2 * VARIANCE + s**2)
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_expected_sds_with_guidance_vanishes_at_the_overshot_mean(schedule) -> None:
    """Fixed point mu_y + (g - 1)(mu_y - mu_0): the closed form of over-saturation."""
    scale, t = 4.0, 0.6
    prior = gaussian_prior(schedule)
    x = (MEAN_TEXT + (scale - 1.0) * (MEAN_TEXT - MEAN_NULL)).expand(2, -1, -1, -1)
    noise = randn(1, *SHAPE, seed=9)
    antithetic = torch.cat([noise, -noise])
    rule = SDS(SDS.Config(cfg_scale=scale), prior)
    grad = rule.residual(x, draw_at([t, t], antithetic, schedule), condition(prior, 2)).grad
    torch.testing.assert_close(grad.mean(0), torch.zeros(SHAPE, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_csd_is_independent_of_x_and_noise(schedule) -> None:
    prior = gaussian_prior(schedule)
    t = 0.4
    a, s = levels(schedule, t)
    rule = CSD(CSD.Config(weight="uniform"), prior)
    expected = s * a * (MEAN_NULL - MEAN_TEXT) / (a**2 * VARIANCE + s**2)
    for seed in (1, 2):
        x, noise = randn(1, *SHAPE, seed=seed), randn(1, *SHAPE, seed=seed + 10)
        grad = rule.residual(x, draw_at([t], noise, schedule), condition(prior, 1)).grad
        torch.testing.assert_close(grad[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sds_is_sds_at_one_plus_csd(schedule) -> None:
    prior, scale = gaussian_prior(schedule), 7.5
    draw = draw_at([0.3, 0.8], randn(2, *SHAPE, seed=4), schedule)
    x, cond = randn(2, *SHAPE, seed=3), condition(prior, 2)

    def grad(rule) -> torch.Tensor:
        return rule.residual(x, draw, cond).grad

    full = grad(SDS(SDS.Config(cfg_scale=scale, weight="sds"), prior))
    plain = grad(SDS(SDS.Config(cfg_scale=1.0, weight="sds"), prior))
    classifier = grad(CSD(CSD.Config(weight="sds"), prior))
    torch.testing.assert_close(full, plain + (scale - 1.0) * classifier, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weight", ["sds", "uniform", "fantasia3d", "recon"])
def test_residual_is_weight_times_distance_to_target(weight: str) -> None:
    prior = gaussian_prior(CosineSchedule())
    rule = SDS(SDS.Config(weight=weight), prior)
    x = randn(2, *SHAPE, seed=3)
    residual = rule.residual(
        x, draw_at([0.3, 0.8], randn(2, *SHAPE, seed=4), prior.schedule), condition(prior, 2)
    )
    torch.testing.assert_close(residual.grad, residual.weight * (x - residual.target))


def test_recon_weight_is_one_in_image_space() -> None:
    prior = gaussian_prior(CosineSchedule())
    rule = SDS(SDS.Config(weight="recon"), prior)
    residual = rule.residual(
        randn(2, *SHAPE), draw_at([0.3, 0.8], randn(2, *SHAPE), prior.schedule), condition(prior, 2)
    )
    torch.testing.assert_close(residual.weight, torch.ones(2, 1, 1, 1, dtype=torch.float64))


def test_one_target_step_is_plain_sds_and_many_reach_a_sample() -> None:
    """With enough DDIM steps from t = 1 the target of x_1 = noise is mu + sqrt(q) noise, a sample of the prior."""
    schedule = CosineSchedule()
    prior = gaussian_prior(schedule)
    x, noise = randn(2, *SHAPE, seed=3), randn(2, *SHAPE, seed=4)
    draw, cond = draw_at([0.999, 0.999], noise, schedule), condition(prior, 2)
    one = SDS(SDS.Config(cfg_scale=1.0), prior).residual(x, draw, cond)
    a, s = (f(draw.t) for f in (schedule.alpha, schedule.sigma))
    x_t = a * x + s * noise
    (eps,) = prior.eps(x_t, draw.t, cond.as_text())
    torch.testing.assert_close(one.target, (x_t - s * eps) / a, rtol=1e-6, atol=1e-6)
    many = SDS(SDS.Config(cfg_scale=1.0, target_steps=50), prior).residual(x, draw, cond)
    sample = MEAN_TEXT + VARIANCE**0.5 * noise
    assert (many.target - sample).abs().max() < 0.08
    assert (one.target - sample).abs().max() > 0.5


def test_multi_step_target_costs_its_steps() -> None:
    prior = gaussian_prior(CosineSchedule())
    rule = SDS(SDS.Config(target_steps=4), prior)
    rule.residual(randn(1, *SHAPE), draw_at([0.9], randn(1, *SHAPE), prior.schedule), condition(prior, 1))
    assert prior.calls == 8


def test_clipping_keeps_targets_in_range() -> None:
    prior = gaussian_prior(CosineSchedule())
    cond, draw = condition(prior, 1), draw_at([0.8], randn(1, *SHAPE), prior.schedule)
    free = SDS(SDS.Config(cfg_scale=8.0), prior).residual(randn(1, *SHAPE), draw, cond)
    clipped = SDS(SDS.Config(cfg_scale=8.0, clip_x0=True), prior).residual(randn(1, *SHAPE), draw, cond)
    assert free.target.abs().max() > 1.5
    assert clipped.target.abs().max() <= 1.0


@pytest.mark.parametrize("kind", ["csd", "sds"])  # others: beside their own identities
def test_rules_are_deterministic_and_commute_with_permuting_views(kind: str) -> None:
    prior = gaussian_prior(CosineSchedule())
    rule = RULES[kind](RULES[kind].Config(), prior)
    x, noise, t = randn(4, *SHAPE, seed=1), randn(4, *SHAPE, seed=2), [0.2, 0.4, 0.6, 0.8]
    order = [2, 0, 3, 1]
    whole = rule.residual(x, draw_at(t, noise, prior.schedule), condition(prior, 4)).grad
    again = rule.residual(x, draw_at(t, noise, prior.schedule), condition(prior, 4)).grad
    shuffled = rule.residual(
        x[order], draw_at([t[i] for i in order], noise[order], prior.schedule), condition(prior, 4)
    ).grad
    assert torch.equal(whole, again)
    torch.testing.assert_close(whole[order], shuffled)


def test_perp_neg_condition_reaches_the_rule() -> None:
    prior = AnalyticPrior(
        {name: Mixture.gaussian(randn(*SHAPE, seed=i), 0.3) for i, name in enumerate(["y", "", "n"])}
    )
    text, null, negative = prior.encode_text(["y", "", "n"])
    plain = told(text, null, 2)
    against = Condition(
        text=plain.text,
        null=plain.null,
        negatives=negative.expand(2, 1, -1, -1),
        negative_weights=torch.tensor([[0.0], [-1.0]], dtype=torch.float64),
    )
    draw = draw_at([0.5, 0.5], randn(2, *SHAPE, seed=8), prior.schedule)
    rule, x = SDS(SDS.Config(cfg_scale=2.0), prior), randn(2, *SHAPE, seed=9)
    without, with_negative = rule.residual(x, draw, plain).grad, rule.residual(x, draw, against).grad
    torch.testing.assert_close(without[0], with_negative[0])
    assert (without[1] - with_negative[1]).abs().max() > 1e-3


def test_attach_gradient_gives_exactly_grad_over_views() -> None:
    x = randn(4, *SHAPE).requires_grad_()
    grad = randn(4, *SHAPE, seed=3).requires_grad_()
    attach_gradient(x, grad).backward()
    torch.testing.assert_close(x.grad, grad.detach() / 4)
    assert grad.grad is None


def test_draw_forks_are_independent_and_repeatable() -> None:
    draw = draw_at([0.5], randn(1, *SHAPE), CosineSchedule())
    assert torch.equal(draw.fork(1).noise, draw.fork(1).noise)
    assert not torch.equal(draw.fork(1).noise, draw.fork(2).noise)
    assert torch.equal(draw.fork(1).t, draw.t)


def test_pixel_clip_bounds_the_gradient_and_keeps_its_direction() -> None:
    rgb = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    incoming = randn(2, 3, 5, 5, seed=1).float()
    clip_pixel_gradient(rgb, 0.3).backward(incoming)
    largest = incoming.abs().amax(1, keepdim=True)
    torch.testing.assert_close(rgb.grad, incoming * (0.3 / largest).clamp(max=1.0))
    assert rgb.grad.abs().max() <= 0.3 + 1e-6


def test_uniform_time_stays_in_its_moving_range() -> None:
    law = UniformTime(UniformTime.Config(low=Ramp.constant(0.1), high=Ramp(start=0.9, end=0.3)))
    for step in (0, 50, 99):
        t = law.sample(Moment(step, 100), 500, Stream(0, "t", step))
        high = 0.9 - 0.6 * step / 100
        assert 0.1 <= t.min() < 0.12
        assert high - 0.02 < t.max() <= high


def test_uniform_time_can_share_one_t() -> None:
    t = UniformTime(UniformTime.Config(per_view=False)).sample(Moment(0, 1), 6, Stream(0, "t"))
    assert t.unique().numel() == 1


def test_annealed_time_follows_the_square_root_law() -> None:
    law = AnnealedTime(AnnealedTime.Config())
    t = torch.stack([law.sample(Moment(k, 100), 1, Stream(0, "t", k)) for k in range(100)]).flatten()
    expected = 0.98 - 0.68 * (torch.arange(100) / 100).sqrt()
    torch.testing.assert_close(t, expected, rtol=1e-5, atol=1e-6)
