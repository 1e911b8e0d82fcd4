"""Stable Diffusion 1.x / 2.x, its distilled kin and InstaFlow on tiny random pipelines, against diffusers' own."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, StableDiffusionPipeline
from torch import nn

from sds3d.errors import PriorError
from sds3d.guidance import SDS
from sds3d.interfaces import Told
from sds3d.mathx.cfg import cfg
from sds3d.mathx.predict import (
    eps_from_flow,
    eps_from_v,
    eps_from_x0,
    flow_from_eps,
    v_from_eps,
    x0_from_eps,
)
from sds3d.mathx.schedule import FlowSchedule, TableSchedule
from sds3d.priors import PriorConfig, open_prior
from sds3d.priors.families import FAMILIES
from sds3d.priors.network import NetworkPrior, with_module
from tests.tiny.checks import PROMPT, check_bundles, check_codec, check_half, check_student, randn, sample
from tests.tiny.few_step import make_lcm, make_turbo
from tests.tiny.stable_diffusion import make_instaflow, make_stable_diffusion
from tests.tiny.texts import CLIP_TOKENS
from tests.toys import draw_at, told

CPU = torch.device("cpu")
FLOAT32 = PriorConfig(dtype="float32")
CLOSE = {"rtol": 0, "atol": 1e-4}


def pipeline_of(folder: Path, kind: Any = StableDiffusionPipeline) -> Any:
    pipe = kind.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(folder: Path, **settings: Any) -> NetworkPrior:
    return open_prior(folder, replace(FLOAT32, **settings), CPU)


def trailing(count: int) -> list[float]:
    return [1.0 - k / count for k in range(count + 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stable_diffusion(tmp_path_factory.mktemp("eps"))


@pytest.fixture(scope="module")
def prior(folder: Path) -> NetworkPrior:
    return load(folder)


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    return pipeline_of(folder)


@pytest.fixture(scope="module")
def zero_snr_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stable_diffusion(tmp_path_factory.mktemp("zero"), prediction="v_prediction", zero_snr=True)


@pytest.fixture(scope="module")
def lcm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lcm(tmp_path_factory.mktemp("lcm"))


@pytest.fixture(scope="module")
def flow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_instaflow(tmp_path_factory.mktemp("flow"))


def both(
    prior: NetworkPrior, pipe: Any, times: Sequence[float], scale: float = 5.0, **more: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Our sample and the pipeline's, as many steps as there are pairs of times."""
    x = randn(1, *prior.shape)
    settings = {"num_inference_steps": len(times) - 1, "guidance_scale": scale, "output_type": "latent"}
    theirs = pipe(PROMPT, latents=x, **settings, **more).images
    assert [round(1000 * t) - 1 for t in times[:-1]] == pipe.scheduler.timesteps.tolist()
    return sample(prior, x, times, scale), theirs


# --- 1.5 and 2.1 -------------------------------------------------------------------------------------------------


def test_sampling_reproduces_the_eps_pipeline(prior: NetworkPrior, pipe: Any) -> None:
    """In the way of Stable Diffusion 1.5: the steps 801, 601, ... 1, then to the first trained step."""
    ours, theirs = both(prior, pipe, [0.802, 0.602, 0.402, 0.202, 0.002, 0.001])
    torch.testing.assert_close(ours, theirs, **CLOSE)
    other = both(prior, pipe, [0.802, 0.602, 0.402, 0.202, 0.002, 0.001], negative_prompt="a blue car")[1]
    assert (ours - other).abs().max() > 1e-3


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_sampling_reproduces_the_pipeline_of_other_predictions(prediction: str, tmp_path: Path) -> None:
    folder = make_stable_diffusion(tmp_path, prediction=prediction)
    ours, theirs = both(load(folder), pipeline_of(folder), trailing(5))
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_image_px_sets_the_size(folder: Path, pipe: Any) -> None:
    prior = load(folder, image_px=48)
    assert prior.shape == (4, 24, 24)
    assert prior.image_px == 48
    times = [0.668, 0.335, 0.002, 0.001]
    torch.testing.assert_close(*both(prior, pipe, times, height=48, width=48), **CLOSE)
    with pytest.raises(PriorError, match="multiple of 16"):
        load(folder, image_px=40)


def test_text_is_that_of_the_pipeline(prior: NetworkPrior, pipe: Any) -> None:
    tokens, null = pipe.encode_prompt(PROMPT, CPU, 1, True)
    torch.testing.assert_close(prior.encode_text([PROMPT, ""]), torch.cat([tokens, null]))
    assert prior.warnings([PROMPT]) == []
    (message,) = prior.warnings(["red mug " * 7 + "blue car"])
    assert f"reads {CLIP_TOKENS}" in message
    assert "'blue car'" in message


def test_encode_and_decode_are_those_of_the_pipeline(prior: NetworkPrior, pipe: Any) -> None:
    check_codec(prior, pipe)


def test_bundles_in_one_call_equal_single_calls(prior: NetworkPrior) -> None:
    check_bundles(prior)


def test_bfloat16(folder: Path, prior: NetworkPrior) -> None:
    check_half(open_prior(folder, PriorConfig(dtype="bfloat16"), CPU), prior)


def test_student(prior: NetworkPrior) -> None:
    check_student(prior)


# --- zero terminal SNR -------------------------------------------------------------------------------------------


def test_zero_terminal_snr_starts_at_pure_noise(zero_snr_folder: Path) -> None:
    """The step at t = 1 has no signal at all, and a v-network is asked there as in the pipeline."""
    prior, pipe = load(zero_snr_folder), pipeline_of(zero_snr_folder)
    assert prior.schedule.alphas_cumprod[-1] == 0.0
    torch.testing.assert_close(*both(prior, pipe, trailing(5)), **CLOSE)


def test_zero_terminal_snr_stays_finite_in_float32(zero_snr_folder: Path) -> None:
    """At t = 1, v = -x0: the clean estimate comes back through eps with the error that the schedule's floor allows."""
    prior, one = load(zero_snr_folder), torch.ones(1)
    x, text = randn(1, *prior.shape), prior.encode_text([PROMPT])
    (eps,) = prior.eps(x, one, Told(text=text))
    a, s = prior.schedule.alpha(one), prior.schedule.sigma(one)
    assert prior.schedule.snap(one) == 1.0
    assert 0.0 < a < 1e-3
    with torch.no_grad():
        v = prior.denoiser.module(x, 999, text).sample
    torch.testing.assert_close(x0_from_eps(x, eps, a, s), -v, rtol=0, atol=4e-3)
    sds = SDS(SDS.Config(), prior)
    grad = sds.residual(
        x, draw_at([1.0], randn(1, *prior.shape, seed=1), prior.schedule), told(text[0], text[0], 1)
    )
    assert torch.isfinite(grad.grad).all()


def test_an_eps_network_is_not_asked_at_zero_snr(tmp_path: Path) -> None:
    prior = load(make_stable_diffusion(tmp_path, zero_snr=True))
    assert prior.schedule.snap(torch.tensor([1.0, 0.9996, 0.5])).tolist() == pytest.approx(
        [0.999, 0.999, 0.5]
    )


# --- conversions -------------------------------------------------------------------------------------------------

TABLE = TableSchedule(torch.linspace(0.9991, 0.0047, 1000, dtype=torch.float64))
ZERO_SNR = TableSchedule(torch.linspace(0.9991, 0.0, 1000, dtype=torch.float64))


@pytest.mark.parametrize("schedule", [TABLE, ZERO_SNR, FlowSchedule(trained=True)])
@pytest.mark.parametrize("time", [0.001, 0.5, 0.999, 1.0])
def test_conversions_round_trip_at_both_ends(schedule: Any, time: float) -> None:
    """What each kind of network says about the same image and noise is the same eps and the same image.

    Up to float32's rounding of x_t, enlarged by what eps and x0 are divided by.
    """
    t = torch.tensor([time])
    a, s = schedule.alpha(t), schedule.sigma(t)
    x0, noise = randn(1, 4, 6, 6), randn(1, 4, 6, 6, seed=1)
    x_t, v, u = a * x0 + s * noise, a * noise - s * x0, noise - x0
    of_noise, of_clean = 1e-6 * (1.0 + float(a / s)), 1e-6 * (1.0 + float(s / a))
    known = {"epsilon": noise, "sample": eps_from_x0(x_t, x0, a, s)}
    if isinstance(schedule, FlowSchedule):
        known["flow"] = eps_from_flow(x_t, u, s)
        torch.testing.assert_close(flow_from_eps(x_t, noise, s), u, rtol=0, atol=of_clean)
    else:
        known["v_prediction"] = eps_from_v(x_t, v, a, s)
        torch.testing.assert_close(v_from_eps(x_t, noise, a, s), v, rtol=0, atol=of_clean)
    for eps in known.values():
        torch.testing.assert_close(eps, noise, rtol=0, atol=of_noise)
        torch.testing.assert_close(x0_from_eps(x_t, eps, a, s), x0, rtol=0, atol=of_clean)


class AsV(nn.Module):
    """A network that says in v what another says in eps."""

    def __init__(self, inner: nn.Module, schedule: TableSchedule) -> None:
        super().__init__()
        self.inner, self.schedule = inner, schedule

    def forward(self, x: torch.Tensor, step: torch.Tensor, *given: Any, **more: Any) -> tuple[torch.Tensor]:
        t = (step + 1) / len(self.schedule.alphas_cumprod)
        eps = self.inner(x, step, *given, **more)[0]
        return (v_from_eps(x, eps, self.schedule.alpha(t), self.schedule.sigma(t)),)


def test_sds_gradients_of_one_denoiser_in_eps_and_in_v_agree(folder: Path, prior: NetworkPrior) -> None:
    twin = load(folder)
    twin.denoiser = with_module(twin.denoiser, AsV(twin.denoiser.module, twin.schedule))
    twin.prediction = "v_prediction"
    x, noise = randn(3, *prior.shape), randn(3, *prior.shape, seed=1)
    text, null = prior.encode_text([PROMPT, ""])
    grads = []
    for one in (prior, twin):
        rule = SDS(SDS.Config(), one)
        draw = draw_at([0.02, 0.5, 1.0], noise, one.schedule)
        grads.append(rule.residual(x, draw, told(text, null, 3)).grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)
    assert grads[0].abs().max() > 0.1


# --- few steps ---------------------------------------------------------------------------------------------------


def test_snap_goes_to_the_nearest_allowed_step() -> None:
    schedule = replace(TABLE, allowed=torch.tensor([249, 499, 749, 999]))
    t = torch.tensor([0.0, 0.02, 0.3, 0.374, 0.376, 0.8, 0.9, 1.0])
    snapped = schedule.snap(t)
    assert snapped.tolist() == [0.25, 0.25, 0.25, 0.25, 0.5, 0.75, 1.0, 1.0]
    torch.testing.assert_close(schedule.snap(snapped), snapped, rtol=0, atol=0)
    assert schedule.snap(torch.tensor([0.375])) == 0.5  # half way: the noisier
    assert schedule.index(t).tolist() == TABLE.index(t).tolist()


def test_lcm_sampling_reproduces_the_pipeline(lcm_folder: Path) -> None:
    """Consistency steps: each jumps to the clean estimate, which is noised anew to the next of the steps."""
    prior, pipe = load(lcm_folder), pipeline_of(lcm_folder, LatentConsistencyModelPipeline)
    x = randn(1, *prior.shape)
    noise = torch.Generator().manual_seed(7)
    settings = {"num_inference_steps": 4, "guidance_scale": 8.5, "output_type": "latent"}
    theirs = pipe(PROMPT, latents=x, generator=torch.Generator().manual_seed(7), **settings).images
    times = [(step + 1) / 1000 for step in pipe.scheduler.timesteps.tolist()]
    told, schedule = Told(text=prior.encode_text([PROMPT])), prior.schedule
    for now, then in zip(times, [*times[1:], 0.0], strict=True):
        t, s = torch.tensor([now]), torch.tensor([then])
        assert schedule.snap(t) == t
        x0 = x0_from_eps(x, prior.eps(x, t, told)[0], schedule.alpha(t), schedule.sigma(t))
        x = x0
        if then > 0.0:
            x = schedule.alpha(s) * x0 + schedule.sigma(s) * torch.randn(x0.shape, generator=noise)
    torch.testing.assert_close(x, theirs, **CLOSE)


def test_lcm_is_told_the_guidance_scale(lcm_folder: Path) -> None:
    prior, weak = load(lcm_folder), load(lcm_folder, lcm_guidance=2.0)
    pipe = pipeline_of(lcm_folder, LatentConsistencyModelPipeline)
    x, t, told = randn(2, *prior.shape), torch.tensor([0.5, 1.0]), Told(text=prior.encode_text([PROMPT] * 2))
    for one, scale in ((prior, 8.5), (weak, 2.0)):
        embedding = pipe.get_guidance_scale_embedding(torch.full((2,), scale - 1.0), embedding_dim=32)
        with torch.no_grad():
            raw = pipe.unet(x, torch.tensor([499, 999]), told.text, timestep_cond=embedding).sample
        torch.testing.assert_close(one.eps(x, t, told)[0], raw, **CLOSE)
    assert (prior.eps(x, t, told)[0] - weak.eps(x, t, told)[0]).abs().max() > 1e-3
    check_student(prior)


def test_lcm_is_asked_at_the_steps_it_was_distilled_at(lcm_folder: Path) -> None:
    allowed = load(lcm_folder).schedule.allowed
    assert allowed.tolist() == list(range(19, 1000, 20))


def test_turbo_is_asked_at_four_steps(tmp_path: Path) -> None:
    prior = load(make_turbo(tmp_path / "a"))
    assert prior.schedule.allowed.tolist() == [249, 499, 749, 999]
    assert load(make_turbo(tmp_path / "b", name="")).schedule.allowed is None
    cached = tmp_path / "models--someone--SDXL-Lightning" / "snapshots" / "0123"
    assert load(make_turbo(cached, name="")).schedule.allowed.tolist() == [249, 499, 749, 999]


def test_turbo_sampling_reproduces_the_pipeline(tmp_path: Path) -> None:
    """Without guidance, as these models are used; Euler's steps are those of DDIM in other variables."""
    folder = make_turbo(tmp_path)
    prior, pipe = load(folder), pipeline_of(folder)
    x = randn(1, *prior.shape)
    start = pipe.scheduler.init_noise_sigma
    pipe.scheduler.set_timesteps(4)
    sigma = pipe.scheduler.sigmas[0].double()
    settings = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}
    theirs = pipe(PROMPT, latents=x, **settings).images
    ours = sample(prior, x * start / (sigma**2 + 1.0).sqrt(), trailing(4))
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_allowed_steps_are_what_the_user_says(tmp_path: Path) -> None:
    folder = make_turbo(tmp_path)
    assert load(folder, allowed_steps=(999, 499)).schedule.allowed.tolist() == [499, 999]
    for wrong in ((1000,), (), (-1, 999)):
        with pytest.raises(PriorError, match=r"allowed_steps: .*expected whole numbers from 0 to 999"):
            load(folder, allowed_steps=wrong)
    (folder / "sds3d_prior.json").write_text('{"allowed_steps": [999]}')
    assert load(folder).schedule.snap(torch.tensor([0.1])) == 1.0


# --- InstaFlow ---------------------------------------------------------------------------------------------------


def published_sampler(pipe: Any, x: torch.Tensor, steps: int, scale: float) -> torch.Tensor:
    """The sampler of the published pipeline, https://github.com/gnobitab/InstaFlow, in its own convention."""
    tokens, null = pipe.encode_prompt(PROMPT, CPU, 1, True)
    for k in range(steps):
        timestep = torch.tensor([1000.0 * (1.0 - k / steps)])
        with torch.no_grad():
            velocities = [pipe.unet(x, timestep, text).sample for text in (null, tokens)]
        x = x + cfg(*velocities, scale) / steps
    return x


@pytest.mark.parametrize("steps", [1, 6])
def test_instaflow_sampling_reproduces_the_published_sampler(flow_folder: Path, steps: int) -> None:
    prior, pipe = load(flow_folder), pipeline_of(flow_folder)
    x = randn(1, *prior.shape)
    theirs = published_sampler(pipe, x, steps, 1.5)
    torch.testing.assert_close(sample(prior, x, trailing(steps), 1.5), theirs, **CLOSE)


def test_instaflow_is_a_flow_from_noise_to_image(flow_folder: Path, tmp_path: Path) -> None:
    prior, x, t = load(flow_folder), randn(1, 4, 16, 16), torch.tensor([0.3])
    text = prior.encode_text([PROMPT])
    (eps,) = prior.eps(x, t, Told(text=text))
    clean = x0_from_eps(x, eps, prior.schedule.alpha(t), prior.schedule.sigma(t))
    with torch.no_grad():
        said = prior.denoiser.module(x, torch.tensor([300.0]), text).sample
    torch.testing.assert_close(clean - eps, said, rtol=1e-4, atol=1e-4)
    assert isinstance(prior.schedule, FlowSchedule)
    assert FAMILIES["RectifiedFlowPipeline"].offers == {"student", "flow"}
    declared = load(make_instaflow(tmp_path, named=False))
    torch.testing.assert_close(declared.eps(x, t, Told(text=text))[0], eps)
    check_student(prior)


def test_a_contradicting_prediction_is_refused(tmp_path: Path) -> None:
    folder = make_stable_diffusion(tmp_path)
    (folder / "sds3d_prior.json").write_text('{"prediction": "v_prediction"}')
    with pytest.raises(PriorError, match=r"'v_prediction'.*says 'epsilon'"):
        load(folder)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert DDIMScheduler.from_config(config).config.prediction_type == "epsilon"
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(config | {"prediction_type": "score"})
    )
    (folder / "sds3d_prior.json").unlink()
    with pytest.raises(PriorError, match="'score' is unknown"):
        load(folder)
