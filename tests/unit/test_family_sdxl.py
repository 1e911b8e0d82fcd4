"""Stable Diffusion XL on a tiny random pipeline, against diffusers' own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline

from sds3d.errors import PriorError
from sds3d.priors import PriorConfig, open_prior
from sds3d.priors.network import NetworkPrior
from tests.tiny.checks import PROMPT, check_bundles, check_codec, check_half, check_student, randn, sample
from tests.tiny.sdxl import POOLED, WIDTHS, make_sdxl
from tests.tiny.texts import CLIP_TOKENS

CPU = torch.device("cpu")
FLOAT32 = PriorConfig(dtype="float32")
TIMES = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]


def pipeline_of(folder: Path) -> Any:
    """diffusers' pipeline with the sampler that visits TIMES."""
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def prior(folder: Path) -> NetworkPrior:
    return open_prior(folder, FLOAT32, CPU)


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    return pipeline_of(folder)


def theirs(pipe: Any, x: torch.Tensor, **more: Any) -> torch.Tensor:
    return pipe(
        PROMPT, num_inference_steps=5, guidance_scale=5.0, latents=x, output_type="latent", **more
    ).images


def test_sampling_reproduces_the_pipeline(prior: NetworkPrior, pipe: Any) -> None:
    x = randn(1, *prior.shape)
    ours = sample(prior, x, TIMES, 5.0)
    torch.testing.assert_close(ours, theirs(pipe, x), rtol=1e-5, atol=1e-4)
    # Each condition is heard: a wrong one is far away.
    assert (ours - theirs(pipe, x, negative_prompt="")).abs().max() > 1e-2
    assert (ours - theirs(pipe, x, original_size=(640, 64))).abs().max() > 1e-2


def test_a_v_model_with_read_empty_prompt_reproduces_the_pipeline(tmp_path: Path) -> None:
    folder = make_sdxl(tmp_path, prediction="v_prediction", zeros_for_empty=False)
    prior = open_prior(folder, FLOAT32, CPU)
    assert prior.prediction == "v_prediction"
    x = randn(1, *prior.shape)
    torch.testing.assert_close(
        sample(prior, x, TIMES, 5.0), theirs(pipeline_of(folder), x), rtol=1e-5, atol=1e-4
    )


def test_image_px_sets_the_size_of_sampling_too(folder: Path, pipe: Any) -> None:
    prior = open_prior(folder, PriorConfig(dtype="float32", image_px=48), CPU)
    assert prior.shape == (4, 24, 24)
    x = randn(1, *prior.shape)
    expected = theirs(pipe, x, height=48, width=48)
    torch.testing.assert_close(sample(prior, x, TIMES, 5.0), expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(PriorError, match=r"multiple of 16, e\.g\. 32 or 48"):
        open_prior(folder, PriorConfig(dtype="float32", image_px=40), CPU)


def test_text_is_that_of_the_pipeline(prior: NetworkPrior, pipe: Any) -> None:
    tokens, _, pooled, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    said = prior.encode_text([PROMPT, ""])
    packing = prior.text.packing
    assert packing.tokens_of(said).shape == (2, CLIP_TOKENS, sum(WIDTHS))
    torch.testing.assert_close(packing.tokens_of(said)[:1], tokens)
    torch.testing.assert_close(packing.pooled_of(said)[:1], pooled)
    assert pooled.shape == (1, POOLED)
    assert said[1].abs().max() == 0.0
    assert len(prior.text.modules()) == 2


def test_a_long_prompt_is_cut_with_a_warning(prior: NetworkPrior) -> None:
    assert prior.warnings([PROMPT]) == []
    (message,) = prior.warnings(["red mug " * 7 + "blue car"])
    assert "reads 16" in message
    assert "blue car" in message


def test_encode_and_decode_are_those_of_the_pipeline(prior: NetworkPrior, pipe: Any) -> None:
    check_codec(prior, pipe)


def test_bundles_in_one_call_equal_single_calls(prior: NetworkPrior) -> None:
    check_bundles(prior)


def test_bfloat16(folder: Path, prior: NetworkPrior) -> None:
    check_half(open_prior(folder, PriorConfig(), CPU), prior)


def test_student(prior: NetworkPrior) -> None:
    check_student(prior)


def test_an_lcm_is_told_its_guidance(tmp_path: Path) -> None:
    folder = make_sdxl(tmp_path, lcm=True)
    prior = open_prior(folder, PriorConfig(dtype="float32", lcm_guidance=5.0), CPU)
    x = randn(1, *prior.shape)
    ours = sample(prior, x, TIMES)
    torch.testing.assert_close(ours, theirs(pipeline_of(folder), x), rtol=1e-5, atol=1e-4)
    default = open_prior(folder, FLOAT32, CPU)
    assert (ours - sample(default, x, TIMES)).abs().max() > 1e-3


def test_a_distilled_model_is_asked_at_its_steps(folder: Path) -> None:
    config = PriorConfig(dtype="float32", allowed_steps=(249, 499, 749, 999))
    schedule = open_prior(folder, config, CPU).schedule
    torch.testing.assert_close(schedule.snap(torch.tensor([0.1, 0.6, 1.0])), torch.tensor([0.25, 0.5, 1.0]))


def test_a_vae_of_another_kind_is_refused(folder: Path, tmp_path: Path) -> None:
    config = make_sdxl(tmp_path) / "vae" / "config.json"
    config.write_text(config.read_text().replace('"latents_mean": null', '"latents_mean": [0, 0, 0, 0]'))
    with pytest.raises(PriorError, match="latents_mean"):
        open_prior(tmp_path, FLOAT32, CPU)


def test_missing_parts_are_all_named(folder: Path, tmp_path: Path) -> None:
    for part in folder.iterdir():
        if part.name not in ("tokenizer_2", "text_encoder_2"):
            (tmp_path / part.name).symlink_to(part)
    with pytest.raises(PriorError, match="no tokenizer_2/, text_encoder_2/ inside"):
        open_prior(tmp_path, FLOAT32, CPU)
