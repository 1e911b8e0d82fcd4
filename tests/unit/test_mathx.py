"""Schedules, conversions, guidance mixing and ODE steps: identities in double precision."""

import pytest
import torch
from diffusers import DDIMScheduler

from sds3d.mathx.cfg import cfg, perp_neg, rescale
from sds3d.mathx.ode import ddim_step
from sds3d.mathx.predict import (
    eps_from_flow,
    eps_from_v,
    eps_from_x0,
    flow_from_eps,
    v_from_eps,
    x0_from_eps,
)
from sds3d.mathx.schedule import CosineSchedule, FlowSchedule, TableSchedule
from sds3d.mathx.weight import WEIGHTS, weight

T = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)


def stable_diffusion_table() -> TableSchedule:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return TableSchedule((1.0 - betas).cumprod(0))


SCHEDULES = [stable_diffusion_table(), CosineSchedule(), FlowSchedule()]


def pair(count: int = 25) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (count, 3, 4, 4)
    return (
        torch.randn(shape, generator=generator, dtype=torch.float64),
        torch.randn(shape, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize("schedule", SCHEDULES[:2])
def test_variance_preserving_schedules_lie_on_the_unit_circle(schedule) -> None:
    total = schedule.alpha(T) ** 2 + schedule.sigma(T) ** 2
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


def test_flow_schedule_is_linear() -> None:
    schedule = FlowSchedule()
    torch.testing.assert_close(schedule.alpha(T) + schedule.sigma(T), torch.ones(25, 1, 1, 1).double())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_signal_to_noise_ratio_falls_strictly_and_ends_are_clean_and_noisy(schedule) -> None:
    snr = (schedule.alpha(T) / schedule.sigma(T)).flatten()
    assert (snr.diff() < 0).all()
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert schedule.alpha(ends)[0] == 1.0
    assert schedule.sigma(ends)[0] == 0.0
    assert schedule.sigma(ends)[1] > 0.99


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_snap_is_idempotent_and_near(schedule) -> None:
    snapped = schedule.snap(T)
    assert torch.equal(schedule.snap(snapped), snapped)
    assert ((snapped - T).abs() <= 0.5e-3 + 1e-12).all()


@pytest.mark.parametrize(
    ("index", "level"), [(20, 0.1380), (100, 0.3439), (500, 1.6183), (700, 3.3344), (999, 14.615)]
)
def test_stable_diffusion_noise_levels(index: int, level: float) -> None:
    schedule = stable_diffusion_table()
    t = torch.tensor([(index + 1) / 1000], dtype=torch.float64)
    assert int(schedule.index(t)) == index
    assert float(schedule.sigma(t) / schedule.alpha(t)) == pytest.approx(level, rel=2e-4)


@pytest.mark.parametrize("schedule", SCHEDULES[:2])
def test_predictions_round_trip(schedule) -> None:
    x0, eps = pair()
    a, s = schedule.alpha(T), schedule.sigma(T)
    x_t = a * x0 + s * eps
    torch.testing.assert_close(x0_from_eps(x_t, eps, a, s), x0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(eps_from_x0(x_t, x0, a, s), eps, rtol=1e-10, atol=1e-10)
    v = v_from_eps(x_t, eps, a, s)
    torch.testing.assert_close(v, a * eps - s * x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(eps_from_v(x_t, v, a, s), eps, rtol=1e-9, atol=1e-9)


def test_flow_prediction_round_trips() -> None:
    x0, eps = pair()
    t = T[:, None, None, None]
    x_t = (1 - t) * x0 + t * eps
    u = flow_from_eps(x_t, eps, t)
    torch.testing.assert_close(u, eps - x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(eps_from_flow(x_t, u, t), eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_velocity_residual_is_eps_residual_over_alpha(schedule) -> None:
    x0, eps = pair()
    a, s = schedule.alpha(T), schedule.sigma(T)
    x_t = a * x0 + s * eps
    guess = eps + 0.1 * x0
    residual = v_from_eps(x_t, guess, a, s) - v_from_eps(x_t, eps, a, s)
    torch.testing.assert_close(residual, (guess - eps) / a, rtol=1e-9, atol=1e-9)


def test_cfg_is_affine_with_null_at_zero_and_text_at_one() -> None:
    null, text = pair()
    assert torch.equal(cfg(null, text, 0.0), null)
    torch.testing.assert_close(cfg(null, text, 1.0), text)
    torch.testing.assert_close(cfg(null, text, 7.0) - cfg(null, text, 3.0), 4.0 * (text - null))


def test_perp_neg_with_parallel_negatives_is_cfg() -> None:
    null, text = pair()
    parallel = torch.stack([null + 2.0 * (text - null), null - 0.5 * (text - null)], dim=1)
    mixed = perp_neg(null, text, parallel, torch.tensor([[-1.0, -2.0]]).double().expand(25, 2), 5.0)
    torch.testing.assert_close(mixed, cfg(null, text, 5.0), rtol=1e-9, atol=1e-9)


def test_perp_neg_moves_at_right_angles_to_the_prompt() -> None:
    null, text = pair()
    negative = torch.randn(25, 1, 3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mixed = perp_neg(null, text, negative, torch.full((25, 1), -1.5).double(), 1.0)
    dot = ((mixed - text) * (text - null)).sum((1, 2, 3))
    assert dot.abs().max() < 1e-9
    assert (mixed - text).abs().max() > 0.1


def test_perp_neg_commutes_with_permuting_views() -> None:
    null, text = pair()
    negative = torch.randn(25, 2, 3, 4, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weights = -torch.rand(25, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    order = torch.randperm(25, generator=torch.Generator().manual_seed(6))
    direct = perp_neg(null, text, negative, weights, 3.0)[order]
    torch.testing.assert_close(
        direct, perp_neg(null[order], text[order], negative[order], weights[order], 3.0)
    )


def test_rescale_restores_the_spread_of_the_text_prediction() -> None:
    text, mixed = pair()
    full = rescale(3.0 * mixed, text, 1.0)
    torch.testing.assert_close(full.std((1, 2, 3)), text.std((1, 2, 3)))
    assert torch.equal(rescale(mixed, text, 0.0), mixed)


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_weights_at_a_known_level(name: str) -> None:
    a, s = (torch.full((1, 1, 1, 1), v) for v in (0.6, 0.8))
    expected = {"sds": 0.64, "uniform": 1.0, "fantasia3d": 0.384, "recon": 4.0 / 3.0, "velocity": 5.0 / 3.0}
    assert float(weight(name, a, s)) == pytest.approx(expected[name])


def test_ddim_step_agrees_with_the_diffusers_scheduler() -> None:
    reference = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
    reference.set_timesteps(10)
    table = TableSchedule(reference.alphas_cumprod.double())
    x, eps = pair(2)
    index = int(reference.timesteps[3])
    expected = reference.step(eps, index, x).prev_sample
    t = torch.full((2,), (index + 1) / 1000, dtype=torch.float64)
    torch.testing.assert_close(ddim_step(x, eps, table, t, t - 0.1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_there_and_back_with_the_same_eps_is_the_identity(schedule) -> None:
    x, eps = pair()
    s = T * 0.5
    back = ddim_step(ddim_step(x, eps, schedule, T, s), eps, schedule, s, T)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
