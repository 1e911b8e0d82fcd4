"""Reward-weighted rules and the image-prompt rule, in double precision."""

from dataclasses import replace

import pytest
import torch

from sds3d.config.option import Chosen
from sds3d.errors import ConfigError
from sds3d.guidance import SDS
from sds3d.guidance.isd import ISD
from sds3d.guidance.reward import RewardWeighted, reward_weights
from sds3d.interfaces import Condition
from sds3d.mathx.schedule import CosineSchedule
from sds3d.moment import Moment
from sds3d.priors.analytic import AnalyticPrior, Mixture
from sds3d.rewards import JudgeReward
from tests.toys import draw_at, told

SHAPE = (3, 4, 4)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_prior() -> AnalyticPrior:
    names = {"y": randn(*SHAPE, seed=1), "": randn(*SHAPE, seed=2), "image": randn(*SHAPE, seed=3)}
    return AnalyticPrior(
        {name: Mixture.gaussian(mean, 0.3) for name, mean in names.items()}, CosineSchedule()
    )


def condition(prior: AnalyticPrior, count: int = 2) -> Condition:
    text, null = prior.encode_text(["y", ""])
    return told(text, null, count)


def weighted(prior: AnalyticPrior, reward=None, **options) -> RewardWeighted:
    config = RewardWeighted.Config(inner=Chosen("sds", SDS.Config(cfg_scale=2.0)), until=1.0, **options)
    rule = RewardWeighted(config, prior)
    rule.reward = reward or (lambda images, prompt: images.mean((1, 2, 3)))
    return rule


def draw_for(prior: AnalyticPrior):
    return draw_at([0.4, 0.7], randn(2, *SHAPE, seed=5), prior.schedule)


def test_one_noise_is_the_inner_rule() -> None:
    prior, x = make_prior(), randn(2, *SHAPE, seed=4)
    inner = SDS(SDS.Config(cfg_scale=2.0), prior).residual(x, draw_for(prior), condition(prior))
    outer = weighted(prior, noises=1).residual(x, draw_for(prior), condition(prior))
    assert torch.equal(inner.grad, outer.grad)


def test_after_the_reward_phase_the_inner_rule_acts_alone() -> None:
    prior, x = make_prior(), randn(2, *SHAPE, seed=4)
    rule = weighted(prior, noises=4)
    rule.config = replace(rule.config, until=0.5)
    late = replace(draw_for(prior), now=Moment(5, 10))
    prior.calls = 0
    rule.residual(x, late, condition(prior))
    assert prior.calls == 2


def test_equal_rewards_and_softmax_average_the_inner_rule() -> None:
    prior, x = make_prior(), randn(2, *SHAPE, seed=4)
    draw, cond = draw_for(prior), condition(prior)
    sds = SDS(SDS.Config(cfg_scale=2.0), prior)
    draws = [draw, *(draw.fork(i) for i in range(1, 3))]
    mean = torch.stack([sds.residual(x, each, cond).grad for each in draws]).mean(0)
    same = weighted(prior, lambda images, prompt: images.new_zeros(len(images)), noises=3, mixing="softmax")
    torch.testing.assert_close(same.residual(x, draw, cond).grad, mean, rtol=1e-10, atol=1e-10)


def test_minmax_on_identical_gradients_scales_by_eight_tenths() -> None:
    weights = reward_weights(randn(6, 3), "minmax")
    torch.testing.assert_close(weights.sum(0), torch.full((3,), 0.8, dtype=torch.float64))
    best, worst = randn(6, 3).argmax(0), randn(6, 3).argmin(0)
    torch.testing.assert_close(weights.gather(0, best[None]), torch.full((1, 3), 0.45, dtype=torch.float64))
    torch.testing.assert_close(weights.gather(0, worst[None]), torch.full((1, 3), -0.05, dtype=torch.float64))


@pytest.mark.parametrize("mixing", ["minmax", "best", "top2", "softmax", "mean"])
def test_weights_follow_a_permutation_of_the_noises(mixing) -> None:
    rewards, order = randn(5, 3, seed=8), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(reward_weights(rewards, mixing)[order], reward_weights(rewards[order], mixing))


def test_best_follows_the_noise_that_ends_brightest() -> None:
    """With a reward that is a linear function of the roll-out's end, the best noise is known in advance."""
    prior, x = make_prior(), randn(2, *SHAPE, seed=4)
    draw, cond = draw_for(prior), condition(prior)
    rule = weighted(prior, noises=4, mixing="best", rollout_steps=3)
    draws = [draw, *(draw.fork(i) for i in range(1, 4))]
    rewards = torch.stack([rule._score(x, each, cond) for each in draws])
    # Under one Gaussian the ODE is affine in the noise, with a positive factor (clamping to [0, 1] keeps the order).
    sds = SDS(SDS.Config(cfg_scale=2.0), prior)
    grads = torch.stack([sds.residual(x, each, cond).grad for each in draws])
    expected = torch.stack([grads[int(rewards[:, view].argmax()), view] for view in range(2)])
    torch.testing.assert_close(rule.residual(x, draw, cond).grad, expected)


def test_passes_are_counted() -> None:
    prior = make_prior()
    weighted(prior, noises=4, rollout_steps=3, mixing="softmax").residual(
        randn(2, *SHAPE), draw_for(prior), condition(prior)
    )
    assert prior.calls == 4 * (2 * 3 + 2)


def test_the_judge_reward_prefers_what_was_asked_for() -> None:
    import numpy as np

    from sds3d.toybox.colors import COLORS
    from sds3d.toybox.views import Views
    from sds3d.toybox.world import compose, render_layers, sample_toy

    rng, one = np.random.default_rng(0), np.ones(2)
    views = Views(30.0 * one, 15.0 * one, 3.3 * one, 40.0 * one)
    layers = render_layers([sample_toy(rng, "mug"), sample_toy(rng, "duck")], views, 64, rng)
    paint = np.array([COLORS["red"], COLORS["red"]])
    images = torch.from_numpy(compose(layers, paint, paint, np.ones((2, 3)))).permute(0, 3, 1, 2).float()
    reward = JudgeReward(JudgeReward.Config(), torch.device("cpu"))
    mug, duck = reward(images, "a red mug").tolist()
    assert mug > duck + 1.0
    assert reward(images, "a red mug")[0] > reward(images, "a blue mug")[0] + 1.0
    with pytest.raises(ConfigError, match="names no kind or colour"):
        reward(images, "happiness")


class ImagePrompted(AnalyticPrior):
    """An image prompt (a one-hot row, as text is) takes the place of the text."""

    def eps(self, x_t, t, *bundles):
        return super().eps(x_t, t, *(b if b.image is None else replace(b, text=b.image) for b in bundles))


def isd_setup(image: str) -> tuple[ImagePrompted, Condition]:
    prior = ImagePrompted(make_prior().mixtures, CosineSchedule())
    cond = replace(condition(prior), image=prior.encode_text([image]).expand(2, -1, -1))
    return prior, cond


def test_isd_with_an_image_that_says_nothing_new() -> None:
    """Adapter off: v = 1 gives (s - 1)(e_y - e_0), v = 0 gives SDS."""
    prior, cond = isd_setup("y")
    draw, x, scale = draw_for(prior), randn(2, *SHAPE, seed=4), 3.0
    null, text = prior.eps(draw.diffuse(x), draw.t, cond.as_null(), cond.as_text())
    full = ISD(ISD.Config(cfg_scale=scale, variate=1.0, weight="uniform"), prior)
    torch.testing.assert_close(full.residual(x, draw, cond).grad, (scale - 1) * (text - null))
    none = ISD(ISD.Config(cfg_scale=scale, variate=0.0, weight="uniform"), prior)
    sds = SDS(SDS.Config(cfg_scale=scale, weight="uniform"), prior)
    torch.testing.assert_close(none.residual(x, draw, cond).grad, sds.residual(x, draw, cond).grad)


def test_isd_control_variate_lowers_the_variance() -> None:
    prior, cond = isd_setup("image")
    x = randn(2, *SHAPE, seed=4)

    def spread(variate: float) -> float:
        rule = ISD(ISD.Config(variate=variate), prior)
        grads = [
            rule.residual(x, draw_at([0.4, 0.7], randn(2, *SHAPE, seed=s), prior.schedule), cond).grad
            for s in range(20, 40)
        ]
        return float(torch.stack(grads).var(0).mean())

    assert spread(1.0) < 1e-9 < spread(0.5) < spread(0.0)
    prior.calls = 0
    ISD(ISD.Config(variate=1.0), prior).residual(x, draw_for(prior), cond)
    assert prior.calls == 3


def test_isd_without_an_image_is_refused() -> None:
    prior = make_prior()
    with pytest.raises(ValueError, match="no image prompt"):
        ISD(ISD.Config(), prior).residual(randn(2, *SHAPE), draw_for(prior), condition(prior))
