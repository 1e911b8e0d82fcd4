"""Stable Diffusion 3 on a tiny random pipeline, against diffusers' own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from sds3d.errors import PriorError
from sds3d.interfaces import Told
from sds3d.mathx.predict import eps_from_flow, flow_from_eps, x0_from_eps
from sds3d.mathx.schedule import FlowSchedule
from sds3d.priors import PriorConfig, load_prior, open_prior
from sds3d.priors.families import FAMILIES
from sds3d.priors.families.sd3 import T5_TOKENS
from sds3d.priors.network import NetworkPrior
from tests.tiny.checks import PROMPT, check_bundles, check_codec, check_half, check_student, randn, sample
from tests.tiny.sd3 import PROJECTIONS, T5_WIDTH, make_sd3
from tests.tiny.texts import CLIP_TOKENS

CPU = torch.device("cpu")
FLOAT32 = PriorConfig(dtype="float32")


def pipeline_of(folder: Path, **parts: None) -> Any:
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def prior(folder: Path) -> NetworkPrior:
    return open_prior(folder, FLOAT32, CPU)


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    return pipeline_of(folder)


def both(
    prior: NetworkPrior, pipe: Any, scale: float = 4.0, **more: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Our sample and the pipeline's, from t = 1 over the pipeline's own (shifted) times."""
    x = randn(1, *prior.shape)
    settings = {"num_inference_steps": 5, "guidance_scale": scale, "output_type": "latent", **more}
    theirs = pipe(PROMPT, latents=x, **settings).images
    return sample(prior, x, pipe.scheduler.sigmas.tolist(), scale), theirs


def test_sampling_reproduces_the_pipeline(prior: NetworkPrior, pipe: Any) -> None:
    ours, theirs = both(prior, pipe)
    assert pipe.scheduler.sigmas[0] == 1.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (ours - both(prior, pipe, negative_prompt="a blue car")[1]).abs().max() > 1e-3


def test_without_t5_its_tokens_are_zero(tmp_path: Path) -> None:
    folder = make_sd3(tmp_path, t5=False, shift=1.0)
    prior, pipe = open_prior(folder, FLOAT32, CPU), pipeline_of(folder, text_encoder_3=None, tokenizer_3=None)
    torch.testing.assert_close(*both(prior, pipe), rtol=0, atol=1e-4)
    tokens = prior.text.packing.tokens_of(prior.encode_text([PROMPT]))
    assert tokens[:, CLIP_TOKENS:].abs().max() == 0.0
    assert len(prior.text.modules()) == 2
    (message,) = prior.warnings(["red mug " * 9])
    assert "reads 16" in message


def test_image_px_sets_the_size_within_the_known_positions(folder: Path, pipe: Any) -> None:
    prior = open_prior(folder, PriorConfig(dtype="float32", image_px=44), CPU)
    assert prior.shape == (16, 22, 22)
    torch.testing.assert_close(*both(prior, pipe, height=44, width=44), rtol=0, atol=1e-4)
    with pytest.raises(PriorError, match=r"multiple of 4, e\.g\. 40 or 44"):
        open_prior(folder, PriorConfig(dtype="float32", image_px=42), CPU)
    with pytest.raises(PriorError, match="end at 48"):
        open_prior(folder, PriorConfig(dtype="float32", image_px=52), CPU)


def test_text_is_that_of_the_pipeline(prior: NetworkPrior, pipe: Any) -> None:
    tokens, null, pooled, null_pooled = pipe.encode_prompt(PROMPT, None, None)
    said, packing = prior.encode_text([PROMPT, ""]), prior.text.packing
    assert tokens.shape == (1, CLIP_TOKENS + T5_TOKENS, T5_WIDTH)
    assert pooled.shape == (1, sum(PROJECTIONS))
    torch.testing.assert_close(packing.tokens_of(said), torch.cat([tokens, null]), rtol=0, atol=1e-4)
    torch.testing.assert_close(packing.pooled_of(said), torch.cat([pooled, null_pooled]))
    assert len(prior.text.modules()) == 3


def test_only_words_that_no_encoder_reads_are_reported(prior: NetworkPrior) -> None:
    assert prior.warnings(["red mug " * 50]) == []
    (message,) = prior.warnings(["red mug " * 128 + "blue car"])
    assert f"reads {T5_TOKENS}" in message
    assert "blue car" in message


def test_the_network_predicts_noise_minus_image(prior: NetworkPrior) -> None:
    """The raw output and eps are the same statement, at both ends of the flow."""
    x, told = randn(1, *prior.shape), Told(text=prior.encode_text([PROMPT]))
    packing = prior.text.packing
    for time in (0.0, 1e-3, 0.5, 0.999):
        t = torch.tensor([time])
        with torch.no_grad():
            u = prior.denoiser.module(
                x, packing.tokens_of(told.text), packing.pooled_of(told.text), 1000.0 * t, return_dict=False
            )[0]
        (eps,) = prior.eps(x, t, told)
        column = t[:, None, None, None]
        torch.testing.assert_close(eps, eps_from_flow(x, u, column))
        torch.testing.assert_close(flow_from_eps(x, eps, column), u, rtol=1e-3, atol=1e-3)
        clean = x0_from_eps(x, eps, prior.schedule.alpha(t), prior.schedule.sigma(t))
        torch.testing.assert_close(eps - clean, u, rtol=1e-3, atol=1e-3)


def test_it_is_a_flow_and_its_own_flow_view(folder: Path, prior: NetworkPrior) -> None:
    assert FAMILIES["StableDiffusion3Pipeline"].offers == {"student", "flow"}
    view = load_prior(PriorConfig(name=str(folder), dtype="float32", as_flow=True), CPU)
    x, t, told = randn(1, *prior.shape), torch.tensor([0.7]), Told(text=prior.encode_text([PROMPT]))
    torch.testing.assert_close(view.eps(x, t, told)[0], prior.eps(x, t, told)[0])


def test_schedule_and_contradicting_scheduler(prior: NetworkPrior, folder: Path, tmp_path: Path) -> None:
    assert isinstance(prior.schedule, FlowSchedule)
    for part in folder.iterdir():
        if part.name != "model_index.json":
            (tmp_path / part.name).symlink_to(part)
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(PriorError, match="DDIMScheduler contradicts StableDiffusion3Pipeline"):
        open_prior(tmp_path, FLOAT32, CPU)


def test_encode_and_decode_are_those_of_the_pipeline(prior: NetworkPrior, pipe: Any) -> None:
    check_codec(prior, pipe)
    assert pipe.vae.config.shift_factor != 0.0


def test_bundles_in_one_call_equal_single_calls(prior: NetworkPrior) -> None:
    check_bundles(prior)


def test_bfloat16(folder: Path, prior: NetworkPrior) -> None:
    check_half(open_prior(folder, PriorConfig(), CPU), prior)


def test_student(prior: NetworkPrior) -> None:
    check_student(prior)
