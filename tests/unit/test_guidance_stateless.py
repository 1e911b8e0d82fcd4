"""NFSD, SDS-Bridge, SSD, ASD, DDS and PDS against priors whose score is known exactly, in double precision."""

from dataclasses import replace

import pytest
import torch

from sds3d.config.ramp import Ramp
from sds3d.errors import ConfigError
from sds3d.guidance import CSD
from sds3d.guidance.asd import ASD
from sds3d.guidance.bridge import Bridge
from sds3d.guidance.dds import DDS
from sds3d.guidance.nfsd import NFSD
from sds3d.guidance.pds import PDS
from sds3d.guidance.ssd import SSD
from sds3d.interfaces import Condition, Draw, Rule, attach_gradient
from sds3d.mathx.schedule import CosineSchedule, FlowSchedule, TableSchedule
from sds3d.moment import Moment
from sds3d.priors.analytic import AnalyticPrior, Mixture
from sds3d.rng import Stream
from tests.toys import draw_at

SHAPE = (3, 4, 4)
Q = 0.3  # variance of the prior, s^2 in the closed forms
TABLE = TableSchedule(torch.cos(torch.linspace(0.01, 1.55, 1000, dtype=torch.float64)) ** 2)
SCHEDULES = [CosineSchedule(), FlowSchedule(), TABLE]
VP = [CosineSchedule(), TABLE]
NAMES = ["y", "", "bad", "plus", "minus", "old"]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MEANS = {name: randn(*SHAPE, seed=index + 1) for index, name in enumerate(NAMES)}
X, NOISE, SOURCE = randn(4, *SHAPE, seed=21), randn(4, *SHAPE, seed=22), randn(4, *SHAPE, seed=23)
TIMES = [0.05, 0.15, 0.45, 0.85]


def gaussian_prior(schedule=VP[0], same_mean: bool = False, variance: float = Q) -> AnalyticPrior:
    return AnalyticPrior(
        {name: Mixture.gaussian(MEANS["y" if same_mean else name], variance) for name in NAMES}, schedule
    )


def condition(prior: AnalyticPrior, count: int = 4, **changes) -> Condition:
    rows = dict(zip(NAMES, prior.encode_text(NAMES), strict=True))
    text, null, bad, plus, minus, old = (rows[name].expand(count, -1, -1) for name in NAMES)
    extra = {"nfsd_negative": bad, "bridge_plus": plus, "bridge_minus": minus, "source": old}
    return replace(Condition(text=text, null=null, extra=extra, source=SOURCE[:count]), **changes)


def known(prior: AnalyticPrior, name: str, count: int = 4) -> torch.Tensor:
    return prior.encode_text([name])[0].expand(count, -1, -1)


def draw_for(schedule, times=TIMES) -> Draw:
    return draw_at(times, NOISE[: len(times)], schedule)


def grad(rule: Rule, cond: Condition, draw: Draw | None = None, x: torch.Tensor = X) -> torch.Tensor:
    return rule.residual(x, draw or draw_for(rule.prior.schedule), cond).grad


def eps_of(name: str, draw: Draw, x: torch.Tensor) -> torch.Tensor:
    """Closed form sigma (x_t - alpha mu) / (alpha^2 q + sigma^2)."""
    a, s = draw.alpha, draw.sigma
    return s * (a * x + s * draw.noise - a * MEANS[name]) / (a**2 * Q + s**2)


def build(kind: type[Rule], prior: AnalyticPrior, **options) -> Rule:
    return kind(kind.Config(**options), prior)


ALL = [NFSD, Bridge, SSD, ASD, DDS, PDS]
COUNTS = {NFSD: 3, Bridge: 2, SSD: 2, ASD: 3, DDS: 4, PDS: 4}


@pytest.mark.parametrize("kind", ALL)
def test_passes_are_as_stated(kind: type[Rule]) -> None:
    prior = gaussian_prior()
    grad(build(kind, prior), condition(prior))
    assert prior.calls == COUNTS[kind]
    assert kind.info.passes.startswith(str(COUNTS[kind]))


@pytest.mark.parametrize("kind", ALL)
def test_same_draw_same_numbers_and_views_may_be_permuted(kind: type[Rule]) -> None:
    prior = gaussian_prior()
    rule, draw = build(kind, prior), draw_for(prior.schedule)
    order = [2, 0, 3, 1]
    whole = grad(rule, condition(prior), draw)
    assert torch.equal(whole, grad(rule, condition(prior), draw))
    shuffled = rule.residual(
        X[order],
        replace(draw, t=draw.t[order], noise=NOISE[order]),
        condition(prior, source=SOURCE[order]),
    )
    torch.testing.assert_close(whole[order], shuffled.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ALL)
def test_gradient_is_g_over_views_and_none_reaches_the_prior(kind: type[Rule]) -> None:
    prior = gaussian_prior()
    means = [mixture.means.requires_grad_() for mixture in prior.mixtures.values()]
    x = X.clone().requires_grad_()
    residual = build(kind, prior).residual(x.detach(), draw_for(prior.schedule), condition(prior))
    attach_gradient(x, residual.grad).backward()
    torch.testing.assert_close(x.grad, residual.grad / 4)
    assert all(mean.grad is None for mean in means)
    for mean in means:
        mean.requires_grad_(False)


@pytest.mark.parametrize("kind", ALL)
def test_targets_are_exact_where_promised(kind: type[Rule]) -> None:
    prior = gaussian_prior()
    residual = build(kind, prior).residual(X, draw_for(prior.schedule), condition(prior))
    assert (residual.target is not None) == kind.has_target
    if residual.target is not None:
        torch.testing.assert_close(residual.grad, residual.weight * (X - residual.target))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nfsd_has_its_closed_form_per_view(schedule) -> None:
    """t < 0.2: eps_null + s (eps_y - eps_null); above, eps_null - eps_bad takes the place of the first term."""
    prior, draw = gaussian_prior(schedule), draw_for(schedule)
    null, bad, text = (eps_of(name, draw, X) for name in ("", "bad", "y"))
    early = torch.tensor([True, True, False, False])[:, None, None, None]
    expected = torch.where(early, null, null - bad) + 5.0 * (text - null)
    torch.testing.assert_close(
        grad(build(NFSD, prior, scale=5.0, weight="uniform"), condition(prior)),
        expected,
        rtol=1e-9,
        atol=1e-9,
    )


def test_nfsd_with_null_as_its_negative_is_scaled_csd_above_the_switch() -> None:
    prior = gaussian_prior()
    draw, cond = draw_for(prior.schedule, [0.2, 0.5, 0.7, 0.9]), condition(prior)
    same = replace(cond, extra={**cond.extra, "nfsd_negative": cond.null})
    classifier = grad(build(CSD, prior), cond, draw)
    prior.calls = 0
    torch.testing.assert_close(grad(build(NFSD, prior), same, draw), 7.5 * classifier)
    torch.testing.assert_close(grad(build(NFSD, prior, negative=" "), cond, draw), 7.5 * classifier)
    assert prior.calls == 3 + 2  # an empty negative is the null prompt and costs nothing


def test_nfsd_with_the_prompt_as_its_negative_loses_one_unit_of_scale() -> None:
    prior = gaussian_prior()
    draw, cond = draw_for(prior.schedule, [0.2, 0.5, 0.7, 0.9]), condition(prior)
    same = replace(cond, extra={**cond.extra, "nfsd_negative": cond.text})
    torch.testing.assert_close(
        grad(build(NFSD, prior), same, draw), 6.5 * grad(build(CSD, prior), cond, draw)
    )


def test_nfsd_does_not_depend_on_the_runs_negative_prompt() -> None:
    prior = gaussian_prior()
    rule, cond = build(NFSD, prior), condition(prior)
    against = replace(cond, negative=known(prior, "minus"))
    assert torch.equal(grad(rule, cond), grad(rule, against))
    assert not torch.allclose(grad(rule, cond), grad(build(NFSD, prior, switch=0.0), cond))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bridge_has_its_closed_form(schedule) -> None:
    """w s (eps(plus) - eps(minus)): no dependence on x or on the noise under equal variances."""
    prior, draw = gaussian_prior(schedule), draw_for(schedule)
    a, s = draw.alpha, draw.sigma
    expected = 40.0 * s * a * (MEANS["minus"] - MEANS["plus"]) / (a**2 * Q + s**2)
    rule = build(Bridge, prior)
    torch.testing.assert_close(grad(rule, condition(prior)), expected, rtol=1e-9, atol=1e-9)
    other = rule.residual(SOURCE, replace(draw, noise=-NOISE), condition(prior)).grad
    torch.testing.assert_close(other, expected, rtol=1e-9, atol=1e-9)


def test_bridge_from_null_to_prompt_is_scaled_csd_and_between_equals_zero() -> None:
    prior = gaussian_prior()
    cond = condition(prior)
    told = replace(cond, extra={**cond.extra, "bridge_plus": cond.text}, negative=known(prior, "bad"))
    rule = build(Bridge, prior, scale=Ramp.constant(3.0), minus="", weight="sds")
    torch.testing.assert_close(grad(rule, told), 3.0 * grad(build(CSD, prior), cond))
    equal = replace(cond, extra={"bridge_plus": cond.text, "bridge_minus": cond.text})
    assert torch.equal(grad(build(Bridge, prior), equal), torch.zeros_like(X))


def test_bridge_asks_for_its_two_descriptions() -> None:
    prompts = build(Bridge, gaussian_prior(), minus="{prompt}, flat").prompts()
    assert prompts["bridge_minus"] == "{prompt}, flat"
    assert prompts["bridge_plus"].startswith("{prompt}, detailed high resolution")


def length(a: torch.Tensor) -> torch.Tensor:
    return a.square().sum((1, 2, 3)).sqrt()


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum((1, 2, 3))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ssd_is_csd_above_the_threshold_and_orthogonal_to_the_noise_below(schedule) -> None:
    prior, draw = gaussian_prior(schedule), draw_for(schedule, [0.05, 0.1, 0.45, 0.85])
    got, h = (grad(build(kind, prior), condition(prior), draw) for kind in (SSD, CSD))
    torch.testing.assert_close(got[2:], h[2:])
    torch.testing.assert_close(
        dot(got, draw.noise)[:2], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(length(got), length(h))
    assert dot(got, eps_of("y", draw, X))[:2].min() > 0  # mode-seeking: along what the prior says
    assert dot(h, draw.noise).abs().min() > 1e-6


def test_ssd_compat_projection_keeps_its_formula_and_is_no_projection() -> None:
    prior, draw = gaussian_prior(), draw_for(VP[0], [0.05])
    cond, x, noise = condition(prior, 1), X[:1], NOISE[:1]
    got = grad(build(SSD, prior, projection="pgc3d"), cond, draw, x)
    h, eps = grad(build(CSD, prior), cond, draw, x), eps_of("y", draw, x)
    e = eps - (eps * noise).sum() / noise.norm() * noise
    torch.testing.assert_close(got, h.norm() / e.norm() * e)
    assert dot(got, noise).abs().item() > 0.1 * got.norm() * noise.norm()


def test_ssd_without_guidance_direction_is_zero_not_nan() -> None:
    prior = gaussian_prior(same_mean=True, variance=1e-12)
    assert torch.equal(grad(build(SSD, prior), condition(prior)), torch.zeros_like(X))


@pytest.mark.parametrize("schedule", VP)
def test_expected_asd_has_its_closed_form_and_its_sign(schedule) -> None:
    """(x - mu) (f(lambda_t) - f(lambda_t')), f = lambda / (q + lambda^2): repulsive where lambda < s."""
    prior = gaussian_prior(schedule)
    rule = build(ASD, prior, cfg_scale=1.0, weight="uniform", eta=0.5)
    times = [0.1, 0.9, 0.1, 0.9]
    noise = torch.cat([NOISE[:2], -NOISE[:2]])
    draw = replace(draw_for(schedule, times), noise=noise)
    x = torch.cat([X[:2], X[:2]])
    got = rule.residual(x, draw, condition(prior)).grad
    u = float(draw.stream.fork("asd").uniform(1))
    t = torch.tensor(times[:2], dtype=torch.float64)
    gap = torch.tensor([0.5 * (0.1 - 0.02), min(0.5 * (0.9 - 0.02), 0.099)], dtype=torch.float64)
    later = schedule.snap(t + u * gap)
    lambdas = [schedule.sigma(v) / schedule.alpha(v) for v in (t, later)]
    f = [value / (Q + value**2) for value in lambdas]
    expected = (X[:2] - MEANS["y"]) * (f[0] - f[1])
    torch.testing.assert_close(0.5 * (got[:2] + got[2:]), expected, rtol=1e-8, atol=1e-9)
    assert float(f[0][0] - f[1][0]) < 0 < float(f[0][1] - f[1][1])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_asd_without_a_gap_is_csd_times_scale_minus_one(schedule) -> None:
    prior, draw = gaussian_prior(schedule), draw_for(schedule)
    expected = 6.5 * grad(build(CSD, prior), condition(prior), draw)
    torch.testing.assert_close(grad(build(ASD, prior, eta=0.0), condition(prior), draw), expected)
    far = build(ASD, prior, t_min=Ramp.constant(1.0))  # t below t_min: no negative gap
    torch.testing.assert_close(grad(far, condition(prior), draw), expected)


def test_asd_never_asks_beyond_the_last_time() -> None:
    asked: list[torch.Tensor] = []

    class Spy(AnalyticPrior):
        def eps(self, x_t, t, *told):
            asked.append(t)
            return super().eps(x_t, t, *told)

    prior = Spy(gaussian_prior().mixtures)
    for seed in range(20):
        draw = replace(draw_for(prior.schedule, [0.5, 0.95, 0.98, 0.999]), stream=Stream(seed, "x"))
        grad(build(ASD, prior, eta=1.0), condition(prior), draw)
    later = torch.stack(asked[1::2])
    assert bool((later >= torch.stack(asked[::2])).all())
    assert float(later.max()) <= 0.999
    assert float(later[:, 0].max()) > 0.8  # eta (t - t_min) is used in full
    assert float(later[:, 0].min()) < 0.6


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", [DDS, PDS])
def test_editing_nothing_changes_nothing(kind: type[Rule], schedule) -> None:
    prior = gaussian_prior(schedule)
    cond = condition(prior)
    same = replace(cond, extra={"source": cond.text}, source=X)
    assert torch.equal(grad(build(kind, prior), same), torch.zeros_like(X))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_dds_vanishes_at_source_plus_scaled_difference_of_means(schedule) -> None:
    prior = gaussian_prior(schedule)
    x = SOURCE + 4.0 * (MEANS["y"] - MEANS["old"])
    got = grad(build(DDS, prior, cfg_scale=4.0), condition(prior), x=x)
    torch.testing.assert_close(got, torch.zeros_like(got), rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_dds_is_the_difference_of_two_predictions(schedule) -> None:
    prior, draw = gaussian_prior(schedule), draw_for(schedule)
    expected = eps_of("y", draw, X) - eps_of("old", draw, SOURCE)
    got = grad(build(DDS, prior, cfg_scale=1.0), condition(prior), draw)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [DDS, PDS])
def test_editing_rules_need_a_source(kind: type[Rule]) -> None:
    prior = gaussian_prior()
    assert kind.needs(kind.Config()) == ("source",)
    assert build(kind, prior, source_prompt="a mug").prompts() == {"source": "a mug"}
    with pytest.raises(ConfigError, match=r"edit\.run"):
        grad(build(kind, prior), condition(prior, source=None))


@pytest.mark.parametrize("kind", [DDS, PDS])
def test_editing_leaves_perp_neg_out(kind: type[Rule]) -> None:
    prior = gaussian_prior()
    cond = condition(prior)
    against = replace(
        cond,
        negatives=known(prior, "minus")[:, None],
        negative_weights=-torch.ones(4, 1, dtype=torch.float64),
    )
    assert torch.equal(grad(build(kind, prior), cond), grad(build(kind, prior), against))


def stochastic_latent(
    prior, draw: Draw, image: torch.Tensor, text, other: torch.Tensor, grid: int, betas: int
):
    """(x_s - c0 x0_hat - c1 x_t) / std with explicit noise at s, as in the paper."""
    schedule, t = draw.schedule, draw.t
    s = t - 1 / grid

    def bar(v: torch.Tensor) -> torch.Tensor:
        return schedule.alpha(v) ** 2

    beta = 1 - bar(t) / bar(t - 1 / betas)
    x_t = draw.diffuse(image)
    x_s = schedule.alpha(s) * image + schedule.sigma(s) * other
    (eps,) = prior.eps(x_t, t, text)
    clean = (x_t - draw.sigma * eps) / draw.alpha
    c0 = bar(s).sqrt() * beta / (1 - bar(t))
    c1 = (1 - beta).sqrt() * (1 - bar(s)) / (1 - bar(t))
    return (x_s - c0 * clean - c1 * x_t) / ((1 - bar(s)) / (1 - bar(t)) * beta).sqrt()


@pytest.mark.parametrize("schedule", VP)
@pytest.mark.parametrize(("grid", "betas"), [(500, 1000), (500, 500), (100, 1000)])
def test_pds_is_the_difference_of_stochastic_latents_whatever_the_shared_noise(schedule, grid, betas) -> None:
    prior, draw = gaussian_prior(schedule), draw_for(schedule)
    cond, other = condition(prior), randn(4, *SHAPE, seed=31)
    new = stochastic_latent(prior, draw, X, cond.as_text(), other, grid, betas)
    old = stochastic_latent(prior, draw, SOURCE, cond.as_extra("source"), other, grid, betas)
    got = grad(build(PDS, prior, cfg_scale=1.0, grid=grid, betas=betas), cond, draw)
    torch.testing.assert_close(got, new - old, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_pds_with_the_exact_posterior_is_dds_with_another_weight(schedule) -> None:
    prior = gaussian_prior(schedule)
    cond, draw = condition(prior), draw_for(schedule)
    exact = build(PDS, prior, cfg_scale=2.0, grid=500, betas=500).residual(X, draw, cond)
    plain = build(DDS, prior, cfg_scale=2.0, weight="recon").residual(X, draw, cond)
    torch.testing.assert_close(exact.target, plain.target, rtol=1e-6, atol=1e-6)
    kept = build(PDS, prior, cfg_scale=2.0).residual(X, draw, cond)
    away = [length(r.target - SOURCE) for r in (kept, exact)]
    assert bool((away[0] < away[1]).all())  # the reference's beta pulls towards the source


def test_pds_stays_finite_below_one_grid_step() -> None:
    prior = gaussian_prior()
    residual = build(PDS, prior).residual(
        X, draw_for(prior.schedule, [5e-4, 1e-3, 2e-3, 1e-2]), condition(prior)
    )
    assert bool(torch.isfinite(residual.grad).all())
    assert bool((residual.weight > 0).all())


@pytest.mark.parametrize("kind", [NFSD, SSD, Bridge, ASD])
def test_a_point_mass_prior_gives_zero_where_the_method_has_no_noise_left(kind: type[Rule]) -> None:
    """One shared mean: all predictions agree, and at variance 0 they equal the noise at every t only on the mean."""
    prior = gaussian_prior(same_mean=True, variance=1e-14)
    draw = draw_for(prior.schedule, [0.3, 0.5, 0.7, 0.9])
    x = MEANS["y"].expand(4, -1, -1, -1)
    got = grad(build(kind, prior), condition(prior), draw, x)
    torch.testing.assert_close(got, torch.zeros_like(got), rtol=0, atol=1e-9)


def test_perp_neg_reaches_nfsd_ssd_and_asd() -> None:
    prior = gaussian_prior()
    cond = condition(prior)
    against = replace(
        cond,
        negatives=known(prior, "minus")[:, None],
        negative_weights=-torch.ones(4, 1, dtype=torch.float64),
    )
    for kind in (NFSD, SSD, ASD):
        rule = build(kind, prior)
        prior.calls = 0
        changed = grad(rule, against)
        assert prior.calls == COUNTS[kind] + 1
        assert not torch.allclose(changed, grad(rule, cond))


def test_bridge_scale_may_move() -> None:
    prior = gaussian_prior()
    rule = build(Bridge, prior, scale=Ramp(start=10.0, end=20.0))
    early, late = (
        grad(rule, condition(prior), replace(draw_for(prior.schedule), now=Moment(k, 100))) for k in (0, 50)
    )
    torch.testing.assert_close(1.5 * early, late)
