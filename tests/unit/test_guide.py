"""The Guide: several rules at once, clamps, image-space pulls, held targets; and the options of SDS and CSD."""

from dataclasses import dataclass, replace

import pytest
import torch

from sds3d.config.ramp import Ramp
from sds3d.errors import ConfigError
from sds3d.guidance import CSD, SDS
from sds3d.guidance.dds import DDS
from sds3d.guidance.noise import FreshNoise
from sds3d.guidance.terms import Term, buffers, extra_prompts
from sds3d.guidance.time import UniformTime
from sds3d.guide import Guide
from sds3d.interfaces import Cameras, Condition, Render, Shading
from sds3d.mathx.schedule import CosineSchedule, FlowSchedule
from sds3d.moment import Moment
from sds3d.priors.analytic import AnalyticPrior, Mixture
from sds3d.priors.text import PromptingConfig, TextBank
from sds3d.rng import Streams
from tests.toys import draw_at

SHAPE = (3, 4, 4)
Q = 0.3


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MEANS = {name: randn(*SHAPE, seed=index + 1) for index, name in enumerate(["y", "", "bad", "old"])}
X, NOISE = randn(2, *SHAPE, seed=21), randn(2, *SHAPE, seed=22)
CAMERAS = Cameras(
    c2w=torch.eye(4).expand(2, 4, 4),
    intrinsics=torch.eye(3).expand(2, 3, 3),
    width_px=4,
    height_px=4,
    azimuth_deg=torch.zeros(2),
    elevation_deg=torch.zeros(2),
    radius=torch.ones(2),
    fov_deg=torch.full((2,), 40.0),
)


def make_prior(schedule=None) -> AnalyticPrior:
    return AnalyticPrior({k: Mixture.gaussian(v, Q) for k, v in MEANS.items()}, schedule)


def make_guide(*terms: Term, prior: AnalyticPrior, negative: str = "", **options) -> Guide:
    return Guide(
        prior=prior,
        terms=terms,
        bank=TextBank(prior, "y", negative, PromptingConfig(view_dependent=False), extra_prompts(terms)),
        time=UniformTime(UniformTime.Config()),
        noise=FreshNoise(FreshNoise.Config()),
        streams=Streams(0),
        **options,
    )


@dataclass
class Seen:
    """Gradients on the render and on its normals."""

    rgb: torch.Tensor
    normal: torch.Tensor


def ask(
    guide: Guide, step: int = 0, steps: int = 10, shared: int | None = None, rgb=None, source=None
) -> Seen:
    """Gradient of the guide's loss on a fixed render."""
    image = (X if rgb is None else rgb).clone().requires_grad_()
    normal = randn(*image.shape, seed=40).requires_grad_()
    alpha = torch.full_like(image[:, :1], 0.6).detach()
    view = Render(rgb=image, alpha=alpha, depth=alpha, normal=normal)
    now = Moment(step, steps)
    moment = now if shared is None else Moment(shared, steps)
    old = None if source is None else replace(view, rgb=source, normal=None)
    render = None if old is None else lambda: old
    guide(view, CAMERAS, Shading(), now, moment, render).loss.backward()
    grads = [torch.zeros_like(v) if v.grad is None else v.grad for v in (image, normal)]
    return Seen(*grads)


def sds(prior: AnalyticPrior, **options) -> SDS:
    return SDS(SDS.Config(**options), prior)


def test_a_mix_is_the_weighted_sum_of_its_parts() -> None:
    prior = make_prior()
    terms = [
        Term(rule=sds(prior), weight=Ramp.constant(0.8)),
        Term(rule=CSD(CSD.Config(), prior), weight=Ramp(start=2.0, end=0.0)),
    ]
    step = 5
    alone = [
        ask(make_guide(replace(term, weight=Ramp.constant(1.0)), prior=prior), step).rgb for term in terms
    ]
    both = ask(make_guide(*terms, prior=prior), step).rgb
    torch.testing.assert_close(both, 0.8 * alone[0] + 1.0 * alone[1])


def test_windows_switch_at_the_right_step() -> None:
    """SDS-Bridge's form: one rule until 0.8 of the run, the other from there on."""
    prior = make_prior()
    first, second = (
        Term(rule=sds(prior), window=(0.0, 0.8)),
        Term(rule=CSD(CSD.Config(), prior), window=(0.8, 1.0)),
    )
    mixed = make_guide(first, second, prior=prior)
    only = [make_guide(replace(term, window=(0.0, 1.0)), prior=prior) for term in (first, second)]
    for step, index in ((0, 0), (7, 0), (8, 1), (9, 1)):
        expected = ask(only[index], step).rgb
        assert torch.equal(ask(mixed, step).rgb, expected), step
        assert not torch.equal(ask(only[1 - index], step).rgb, expected)


def test_rules_outside_their_window_cost_nothing() -> None:
    prior = make_prior()
    guide = make_guide(
        Term(rule=sds(prior), window=(0.0, 0.5)), Term(rule=sds(prior, target_steps=3)), prior=prior
    )
    for step, calls in ((4, 2 + 6), (5, 6)):
        prior.calls = 0
        ask(guide, step)
        assert prior.calls == calls


@pytest.mark.parametrize("mode", ["pbr", "albedo"])
def test_albedo_and_shaded_terms_each_pull_at_their_own_picture(mode: str) -> None:
    """A mix is the sum of both; without light there is no shaded picture, and that term is silent."""
    prior = make_prior()
    terms = [
        Term(rule=sds(prior), sees="albedo", weight=Ramp.constant(0.8)),
        Term(rule=sds(prior), sees="shaded", weight=Ramp.constant(0.2)),
    ]
    assert buffers(terms) == ("albedo",)
    leaves = {name: randn(2, *SHAPE, seed=seed) for name, seed in (("rgb", 21), ("albedo", 50))}
    pulls = []
    for chosen in (terms, terms[:1], terms[1:]):
        seen = {name: value.clone().requires_grad_() for name, value in leaves.items()}
        flat = torch.ones_like(seen["rgb"][:, :1])
        view = Render(alpha=flat, depth=flat, **seen)
        # One stream per term: alone, the second would draw as the first.
        guide = make_guide(*chosen, prior=prior)
        loss = guide(view, CAMERAS, Shading(mode=mode), Moment(3, 10), Moment(3, 10)).loss
        if loss.requires_grad:
            loss.backward()
        pulls.append({k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in seen.items()})
    both, albedo, shaded = pulls
    torch.testing.assert_close(both["albedo"], albedo["albedo"])
    torch.testing.assert_close(both["rgb"], shaded["rgb"])
    assert albedo["rgb"].abs().max() == shaded["albedo"].abs().max() == 0.0
    assert albedo["albedo"].abs().max() > 0.0
    assert (shaded["rgb"].abs().max() > 0.0) == (mode == "pbr")


def test_a_render_without_the_picture_of_a_term_is_refused() -> None:
    prior = make_prior()
    flat = X[:, :1]
    view = Render(rgb=X, alpha=flat, depth=flat)
    for sees, message in (
        ("albedo", "sees albedo, but this scene renders none"),
        ("normal", "renders no normals"),
    ):
        guide = make_guide(Term(rule=sds(prior), sees=sees), prior=prior)
        with pytest.raises(ConfigError, match=message):
            guide(view, CAMERAS, Shading(), Moment(0, 10), Moment(0, 10))
    with pytest.raises(ConfigError, match="needs a prior with latents of 4 channels, this one has 3"):
        make_guide(Term(rule=sds(prior), sees="normal_latent"), prior=prior)


def test_normals_as_latents_are_normals_and_mask_resized() -> None:
    means = {name: randn(4, 2, 2, seed=index) for index, name in enumerate(["y", ""])}
    prior = AnalyticPrior({k: Mixture.gaussian(v, Q) for k, v in means.items()})
    guide = make_guide(Term(rule=sds(prior), sees="normal_latent"), prior=prior)
    alpha = torch.full((2, 1, 4, 4), 0.5, dtype=torch.float64, requires_grad=True)
    normal = randn(2, 3, 4, 4, seed=9).requires_grad_()
    view = Render(rgb=X, alpha=alpha, depth=X[:, :1], normal=normal)
    x = guide.encoded(guide.image(view, "normal_latent"), "normal_latent")
    assert x.shape == (2, 4, 2, 2)
    torch.testing.assert_close(x[:, 3:], torch.full((2, 1, 2, 2), 0.5, dtype=torch.float64))
    guide(view, CAMERAS, Shading(), Moment(0, 10), Moment(0, 10)).loss.backward()
    assert normal.grad.abs().max() > 0.0
    assert alpha.grad.abs().max() > 0.0


def test_a_term_that_sees_normals_pulls_at_normals_alone() -> None:
    """x = alpha (n + 1) / 2 + (1 - alpha) / 2, so d loss / d n = alpha / 2 of the gradient on x, over views."""
    prior = make_prior()
    seen = ask(make_guide(Term(rule=CSD(CSD.Config(), prior), sees="normal"), prior=prior))
    plain = ask(make_guide(Term(rule=CSD(CSD.Config(), prior)), prior=prior))
    assert float(seen.rgb.abs().max()) == 0.0
    # CSD does not depend on x, so both terms give the same gradient on what they see.
    torch.testing.assert_close(seen.normal, 0.5 * 0.6 * plain.rgb)


def test_score_clamp_bounds_every_element_and_may_grow() -> None:
    prior = make_prior()
    rule = sds(prior, cfg_scale=50.0)
    free = ask(make_guide(Term(rule=rule), prior=prior), 5).rgb * 2
    guide = make_guide(Term(rule=rule), prior=prior, score_clamp=Ramp(start=2.0, end=8.0))
    torch.testing.assert_close(ask(guide, 5).rgb * 2, free.clamp(-5.0, 5.0))
    assert float(free.abs().max()) > 8.0


def test_image_weight_adds_its_pull_in_image_space() -> None:
    """On a pixel prior of the render's size: (1 + image_weight) (x - x0_hat) / b with weight recon."""
    prior = make_prior()
    plain = ask(make_guide(Term(rule=sds(prior)), prior=prior)).rgb
    both = ask(make_guide(Term(rule=sds(prior, image_weight=0.3)), prior=prior)).rgb
    torch.testing.assert_close(both, 1.3 * plain)


def test_image_weight_resizes_renders_to_the_targets_size() -> None:
    prior = make_prior()
    rgb = randn(2, 3, 8, 8, seed=5)
    got = ask(make_guide(Term(rule=sds(prior, image_weight=0.3)), prior=prior), rgb=rgb).rgb
    plain = ask(make_guide(Term(rule=sds(prior)), prior=prior), rgb=rgb).rgb
    assert got.shape == rgb.shape
    torch.testing.assert_close(got, 1.3 * plain)  # prior and image pull use one resize


def test_held_targets_survive_save_and_load_with_their_image_targets() -> None:
    prior = make_prior()
    terms = (
        Term(rule=sds(prior, image_weight=0.5, target_steps=2)),
        Term(rule=sds(prior, cfg_scale=2.0), weight=Ramp.constant(0.5)),
    )
    first, second = (make_guide(*terms, prior=prior, hold=3) for _ in range(2))
    ask(first, 3, shared=3)
    second.load_state_dict(first.state_dict())
    prior.calls = 0
    moved = X + 0.1
    later = [ask(guide, 4, shared=3, rgb=moved).rgb for guide in (first, second)]
    assert prior.calls == 0
    assert torch.equal(later[0], later[1])
    held = first.held
    one = held[0].weight * (moved - held[0].target) + 0.5 * (moved - held[0].image_target)
    two = held[1].weight * (moved - held[1].target)
    torch.testing.assert_close(later[0], (one + 0.5 * two) / 2)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


def test_a_source_render_reaches_editing_rules() -> None:
    prior = make_prior()
    rule = DDS(DDS.Config(source_prompt="y"), prior)
    guide = make_guide(Term(rule=rule), prior=prior)
    assert float(ask(guide, source=X).rgb.abs().max()) == 0.0
    assert float(ask(guide, source=X + 1.0).rgb.abs().max()) > 1e-3
    with pytest.raises(ConfigError, match=r"edit\.run"):
        ask(guide)


def test_the_source_is_rendered_once_per_residual_and_not_while_a_target_is_held() -> None:
    prior = make_prior()
    rule = DDS(DDS.Config(source_prompt="y"), prior)
    guide = make_guide(Term(rule=rule), Term(rule=rule), prior=prior, hold=3)
    alpha = torch.ones_like(X[:, :1])
    view, asked = Render(rgb=X.clone().requires_grad_(), alpha=alpha, depth=alpha), []

    def source() -> Render:
        asked.append(1)
        return view

    for step in range(6):
        guide(view, CAMERAS, Shading(), Moment(step, 10), Moment(step - step % 3, 10), source)
    assert len(asked) == 2


def test_all_terms_of_a_step_share_one_noise() -> None:
    prior = make_prior()
    guide = make_guide(Term(rule=sds(prior)), Term(rule=sds(prior, cfg_scale=2.0)), prior=prior)
    sample, drawn = guide.noise.sample, []

    def counted(*words):
        drawn.append(sample(*words))
        return drawn[-1]

    guide.noise.sample = counted
    ask(guide)
    assert len(drawn) == 1


def test_two_rules_may_not_name_different_texts_alike() -> None:
    prior = make_prior()
    rules = [DDS(DDS.Config(source_prompt=text), prior) for text in ("y", "old")]
    with pytest.raises(ConfigError, match="different texts"):
        extra_prompts(tuple(Term(rule=rule) for rule in rules))


# SDS and CSD options, at the level of residuals.


def condition(prior: AnalyticPrior, **changes) -> Condition:
    text, null = prior.encode_text(["y", ""])
    return replace(Condition(text=text.expand(2, -1, -1), null=null.expand(2, -1, -1)), **changes)


def eps_of(name: str, draw) -> torch.Tensor:
    a, s = draw.alpha, draw.sigma
    return s * (a * X + s * NOISE - a * MEANS[name]) / (a**2 * Q + s**2)


def draw_for(schedule, times=(0.3, 0.8)):
    return draw_at(list(times), NOISE, schedule)


@pytest.mark.parametrize("schedule", [CosineSchedule(), FlowSchedule()])
def test_sds_without_noise_subtraction_is_the_bare_prediction(schedule) -> None:
    """SJC without variance reduction: w eps_hat."""
    prior, draw = make_prior(schedule), draw_for(schedule)
    null, text = eps_of("", draw), eps_of("y", draw)
    residual = sds(prior, cfg_scale=4.0, weight="sds", subtract_noise=False).residual(
        X, draw, condition(prior)
    )
    expected = draw.sigma**2 * (null + 4.0 * (text - null))
    torch.testing.assert_close(residual.grad, expected, rtol=1e-9, atol=1e-9)
    assert residual.target is None


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_cfg_rescale_has_its_formula(share: float) -> None:
    """x0 (share std(x0_y) / std(x0_hat) + 1 - share); no change at 0."""
    prior = make_prior()
    draw = draw_for(prior.schedule)
    plain = sds(prior, cfg_scale=6.0).residual(X, draw, condition(prior)).target
    text = sds(prior, cfg_scale=1.0).residual(X, draw, condition(prior)).target
    got = sds(prior, cfg_scale=6.0, cfg_rescale=share).residual(X, draw, condition(prior)).target
    spread = [v.flatten(1).std(dim=1)[:, None, None, None] for v in (text, plain)]
    torch.testing.assert_close(got, plain * (share * spread[0] / spread[1] + 1.0 - share))
    assert torch.equal(got, plain) == (share == 0.0)


def test_cfg_rescale_of_the_conditional_prediction_is_itself() -> None:
    prior = make_prior()
    draw = draw_for(prior.schedule)
    plain, rescaled = (
        sds(prior, cfg_scale=1.0, cfg_rescale=k).residual(X, draw, condition(prior)).target
        for k in (0.0, 1.0)
    )
    torch.testing.assert_close(plain, rescaled)


def test_eta_matters_only_between_target_steps() -> None:
    prior = make_prior()
    draw, cond = draw_for(prior.schedule), condition(prior)

    def target(**options) -> torch.Tensor:
        return sds(prior, **options).residual(X, draw, cond).target

    assert torch.equal(target(eta=1.0), target(eta=0.0))
    noisy = target(eta=1.0, target_steps=3)
    assert (noisy - target(target_steps=3)).abs().max() > 1e-2
    assert torch.equal(noisy, target(eta=1.0, target_steps=3))


def test_velocity_weight_on_a_flow_prior_is_rfds() -> None:
    """v_hat - (eps - x), v_hat = (x_t - x0_hat) / t."""
    prior = make_prior(FlowSchedule())
    draw = draw_for(prior.schedule)
    x_t = draw.diffuse(X)
    null, text = eps_of("", draw), eps_of("y", draw)
    eps = null + 4.0 * (text - null)
    clean = (x_t - draw.sigma * eps) / draw.alpha
    velocity = (x_t - clean) / draw.sigma
    residual = sds(prior, cfg_scale=4.0, weight="velocity").residual(X, draw, condition(prior))
    torch.testing.assert_close(residual.grad, velocity - (NOISE - X), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
@pytest.mark.parametrize("schedule", [CosineSchedule(), FlowSchedule()])
def test_csd_with_the_coefficients_of_sds_is_sds(schedule, scale: float) -> None:
    prior, draw = make_prior(schedule), draw_for(schedule)
    four = CSD.Config(
        text=Ramp.constant(scale), negative=Ramp.constant(0.0), null=Ramp.constant(1.0 - scale), noise=1.0
    )
    got = CSD(four, prior).residual(X, draw, condition(prior)).grad
    expected = sds(prior, cfg_scale=scale, weight="sds").residual(X, draw, condition(prior)).grad
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_csd_mixes_its_four_predictions() -> None:
    prior = make_prior()
    draw = draw_for(prior.schedule)
    bad = prior.encode_text(["bad"])[0].expand(2, -1, -1)
    config = CSD.Config(
        text=Ramp.constant(1.5),
        negative=Ramp(start=0.0, end=-2.0),
        null=Ramp.constant(-0.25),
        noise=0.7,
        weight="uniform",
    )
    prior.calls = 0
    at = replace(draw, now=Moment(1, 4))
    got = CSD(config, prior).residual(X, at, condition(prior, negative=bad)).grad
    expected = 1.5 * eps_of("y", draw) - 0.5 * eps_of("bad", draw) - 0.25 * eps_of("", draw) - 0.7 * NOISE
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert prior.calls == 3


def test_csd_without_a_negative_prompt_takes_the_null_prompt_for_it() -> None:
    """(1, -v, v - 1): no negative prompt is plain CSD at any v, for two passes."""
    prior = make_prior()
    draw = draw_for(prior.schedule)
    config = CSD.Config(negative=Ramp.constant(-0.6), null=Ramp.constant(-0.4))
    got = CSD(config, prior).residual(X, draw, condition(prior)).grad
    assert prior.calls == 2
    torch.testing.assert_close(got, CSD(CSD.Config(), prior).residual(X, draw, condition(prior)).grad)
