"""The loop and the optimiser: descent, resume equality, non-finite gradients."""

import pytest
import torch
from torch import nn

from sds3d.config.ramp import Ramp
from sds3d.errors import CheckpointError, ConfigError, NonFiniteError
from sds3d.events.bus import StepDone
from sds3d.interfaces import ParamGroup
from sds3d.moment import Moment
from sds3d.optim import Optimizer, OptimizerConfig
from sds3d.optimize import PenaltyConfig
from sds3d.priors.analytic import Mixture
from tests.toys import CANVAS_TARGET as TARGET
from tests.toys import canvas_loop as build


def test_sds_under_a_gaussian_prior_ends_at_its_mean() -> None:
    loop = build(steps=400, optimizer=OptimizerConfig(lr_factor=Ramp(start=1.0, end=0.02)))
    loop.run(400, lambda event: None)
    assert (loop.parts.scene.image.detach() - TARGET).abs().max() < 0.05


@pytest.mark.parametrize("hold", [1, 3])
def test_twenty_steps_equal_ten_save_load_ten(hold: int) -> None:
    whole, first, second = build(20, hold), build(20, hold), build(20, hold)
    whole.run(20, lambda event: None)
    first.run(10, lambda event: None)
    second.load_state_dict(first.state_dict())
    second.run(20, lambda event: None)
    assert second.index == 20
    assert torch.equal(whole.parts.scene.image, second.parts.scene.image)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


def test_seeds_differ_and_repeat() -> None:
    runs = [build(15, seed=seed) for seed in (0, 0, 1)]
    for run in runs:
        run.run(15, lambda event: None)
    a, b, c = (run.parts.scene.image.detach() for run in runs)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_held_targets_ask_the_prior_once_per_hold() -> None:
    loop = build(12, hold=4)
    loop.run(12, lambda event: None)
    assert loop.parts.prior.calls == 3 * 2


def test_holding_needs_a_rule_with_a_target() -> None:
    with pytest.raises(ConfigError, match="clean target"):
        build(hold=2, rule="csd")


def test_a_penalty_the_scene_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match="tv_density"):
        build(penalties=PenaltyConfig(tv_density=Ramp.constant(1.0)))


def test_a_penalty_pulls_with_its_weight() -> None:
    loop = build(60, penalties=PenaltyConfig(opacity=Ramp.constant(1e4)))
    loop.run(60, lambda event: None)
    assert loop.parts.scene.image.mean() < TARGET.mean() - 0.3


def test_events_carry_step_and_gradient_norm() -> None:
    events: list[StepDone] = []
    loop = build(25, log_every=10)
    loop.run(25, events.append)
    assert [event.step for event in events] == [10, 20, 25]
    assert all(event.grad_norm > 0 and event.nonfinite == 0 for event in events)


def test_nonfinite_gradients_change_nothing_and_are_counted() -> None:
    loop = build(60)
    loop.run(5, lambda event: None)
    before = loop.state_dict()
    original = loop.parts.prior.mixtures["y"]
    loop.parts.prior.mixtures["y"] = Mixture.gaussian(TARGET * float("nan"), 0.01)
    loop.run(6, lambda event: None)
    after = loop.state_dict()
    assert torch.equal(before["scene.image"], after["scene.image"])
    assert torch.equal(before["optimizer.image.0.exp_avg"], after["optimizer.image.0.exp_avg"])
    assert int(after["optimizer.nonfinite"]) == 1
    loop.parts.prior.mixtures["y"] = original
    loop.run(7, lambda event: None)
    assert not torch.equal(loop.parts.scene.image, before["scene.image"])


def test_nonfinite_gradients_can_stop_the_run() -> None:
    loop = build(60, stop_on_nonfinite=True)
    loop.parts.prior.mixtures["y"] = Mixture.gaussian(TARGET * float("inf"), 0.01)
    with pytest.raises(NonFiniteError, match="step 0"):
        loop.run(1, lambda event: None)


def test_mostly_skipped_runs_end_with_an_explanation() -> None:
    loop = build(100)
    loop.parts.prior.mixtures["y"] = Mixture.gaussian(TARGET * float("nan"), 0.01)
    with pytest.raises(NonFiniteError, match="skipped"):
        loop.run(100, lambda event: None)


def test_a_foreign_checkpoint_is_refused() -> None:
    loop = build()
    tensors = loop.state_dict()
    tensors["scene.image"] = torch.zeros(3, 9, 9)
    with pytest.raises(CheckpointError, match="does not fit"):
        loop.load_state_dict(tensors)


def test_no_gradient_reaches_the_prior() -> None:
    loop = build(3)
    mean = loop.parts.prior.mixtures["y"].means.requires_grad_()
    loop.run(3, lambda event: None)
    assert mean.grad is None


def test_optimizer_matches_plain_adam() -> None:
    torch_param, ours = (nn.Parameter(torch.ones(5)) for _ in range(2))
    adam = torch.optim.Adam([torch_param], lr=0.1, betas=(0.9, 0.99), eps=1e-15)
    optimizer = Optimizer(
        [ParamGroup(name="p", params=[ours], lr=0.1)], OptimizerConfig(lr_factor=Ramp.constant(1.0))
    )
    for k in range(10):
        adam.zero_grad()
        ((torch_param - k) ** 2).sum().backward()
        adam.step()
        optimizer.step(((ours - k) ** 2).sum(), Moment(k, 10))
    torch.testing.assert_close(ours, torch_param)


def test_gradient_norm_clipping_bounds_the_gradient() -> None:
    p = nn.Parameter(torch.zeros(4))
    optimizer = Optimizer([ParamGroup(name="p", params=[p], lr=0.1)], OptimizerConfig(max_grad_norm=0.5))
    report = optimizer.step((100.0 * p).sum(), Moment(0, 1))
    assert float(report.grad_norm) == pytest.approx(200.0)
    assert float(p.grad.norm()) == pytest.approx(0.5, rel=1e-4)


def test_replacing_rows_carries_adam_state() -> None:
    p = nn.Parameter(torch.arange(4.0))
    optimizer = Optimizer([ParamGroup(name="p", params=[p], lr=0.1)], OptimizerConfig())
    optimizer.step((p * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum(), Moment(0, 2))
    old = optimizer.state_dict()["p.0.exp_avg"]
    gather, fresh = torch.tensor([3, 0, 0]), torch.tensor([False, False, True])
    new = nn.Parameter(p.detach()[gather].clone())
    optimizer.replace("p", p, new, gather, fresh)
    state = optimizer.state_dict()["p.0.exp_avg"]
    torch.testing.assert_close(state, torch.stack([old[3], old[0], torch.zeros(())]))
    optimizer.step(new.sum(), Moment(1, 2))
    assert optimizer.params() == [new]
