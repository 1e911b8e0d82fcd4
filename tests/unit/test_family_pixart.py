"""PixArt-alpha and PixArt-Sigma on tiny random pipelines, against diffusers' own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline

from sds3d.errors import PriorError
from sds3d.interfaces import Told
from sds3d.priors import PriorConfig, open_prior
from sds3d.priors.families.pixart import TEXT_TOKENS
from sds3d.priors.network import NetworkPrior
from tests.tiny.checks import PROMPT, check_bundles, check_codec, check_half, check_student, randn, sample
from tests.tiny.pixart import WIDTH, make_pixart

CPU = torch.device("cpu")
SMALL = PriorConfig(dtype="float32", image_px=32)  # not the 256 of 128 latents: it takes too long here
CLOSE = {"rtol": 0, "atol": 1e-4}
TIMES = [0.801, 0.601, 0.401, 0.201, 0.001, 0.0]


def pipeline_of(kind: Any, folder: Path) -> Any:
    # The first folders of alpha name an older class for their transformer; it is handed over loaded.
    pipe = kind.from_pretrained(folder, transformer=open_prior(folder, SMALL, CPU).denoiser.module)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pixart(tmp_path_factory.mktemp("alpha"))


@pytest.fixture(scope="module")
def prior(folder: Path) -> NetworkPrior:
    return open_prior(folder, SMALL, CPU)


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    return pipeline_of(PixArtAlphaPipeline, folder)


def both(prior: NetworkPrior, pipe: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Our sample and the pipeline's."""
    x, size = randn(1, *prior.shape), prior.image_px
    settings = {"num_inference_steps": 5, "guidance_scale": 4.5, "output_type": "latent", **more}
    fixed = {"use_resolution_binning": False, "clean_caption": False, "height": size, "width": size}
    theirs = pipe(PROMPT, latents=x, **fixed, **settings).images
    assert pipe.scheduler.timesteps.tolist() == [800, 600, 400, 200, 0]
    return sample(prior, x, TIMES, 4.5), theirs


def test_sampling_reproduces_alpha_which_is_told_the_size(prior: NetworkPrior, pipe: Any) -> None:
    assert prior.denoiser.sized
    ours, theirs = both(prior, pipe)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert (ours - both(prior, pipe, negative_prompt="a blue car")[1]).abs().max() > 1e-3


def test_sampling_reproduces_sigma_which_is_not(tmp_path: Path) -> None:
    folder = make_pixart(tmp_path, sigma=True, sample_size=16)
    prior, pipe = open_prior(folder, SMALL, CPU), pipeline_of(PixArtSigmaPipeline, folder)
    assert not prior.denoiser.sized
    torch.testing.assert_close(*both(prior, pipe), **CLOSE)
    assert prior.text.packing.tokens == TEXT_TOKENS["PixArtSigmaPipeline"]
    check_codec(prior, pipe)


def test_the_size_matters_to_alpha(folder: Path, prior: NetworkPrior, pipe: Any) -> None:
    larger = open_prior(folder, PriorConfig(dtype="float32", image_px=48), CPU)
    assert larger.shape == (4, 24, 24)
    torch.testing.assert_close(*both(larger, pipe), **CLOSE)
    x, told = randn(1, *prior.shape), Told(text=prior.encode_text([PROMPT]))
    here, there = prior.eps(x, torch.tensor([0.5]), told)[0], larger.eps(x, torch.tensor([0.5]), told)[0]
    torch.testing.assert_close(here, there)  # told by x itself, not by the setting
    with torch.no_grad():
        unsized = {"resolution": torch.tensor([[64.0, 64.0]]), "aspect_ratio": torch.tensor([[1.0]])}
        raw = prior.denoiser.module(
            x,
            encoder_hidden_states=prior.text.packing.tokens_of(told.text),
            encoder_attention_mask=prior.text.packing.mask_of(told.text),
            timestep=torch.tensor([499]),
            added_cond_kwargs=unsized,
        ).sample
    assert raw.shape[1] == 8  # eps and a variance, which is dropped
    assert (raw[:, :4] - here).abs().max() > 1e-5
    with pytest.raises(PriorError, match="multiple of 4"):
        open_prior(folder, PriorConfig(image_px=42), CPU)


def test_the_trained_size_is_the_default(folder: Path) -> None:
    assert open_prior(folder, PriorConfig(), CPU).image_px == 256


def test_text_and_mask_are_those_of_the_pipeline(prior: NetworkPrior, pipe: Any) -> None:
    tokens, mask, null, null_mask = pipe.encode_prompt(PROMPT)
    said, packing = prior.encode_text([PROMPT.upper(), ""]), prior.text.packing
    assert tokens.shape == (1, TEXT_TOKENS["PixArtAlphaPipeline"], WIDTH)
    torch.testing.assert_close(packing.tokens_of(said), torch.cat([tokens, null]))
    assert packing.mask_of(said).tolist() == torch.cat([mask, null_mask]).bool().tolist()
    assert packing.mask_of(said).sum(1).tolist() == [mask.sum(), 1]
    (message,) = prior.warnings(["red mug " * 60])
    assert "reads 120" in message


def test_padding_is_not_seen(prior: NetworkPrior) -> None:
    x, t, text = randn(1, *prior.shape), torch.tensor([0.5]), prior.encode_text([PROMPT])
    shaken = text.clone()
    shaken[:, int(prior.text.packing.mask_of(text).sum()) : 120] += 1.0
    torch.testing.assert_close(prior.eps(x, t, Told(text=shaken))[0], prior.eps(x, t, Told(text=text))[0])


def test_encode_and_decode_are_those_of_the_pipeline(prior: NetworkPrior, pipe: Any) -> None:
    check_codec(prior, pipe)


def test_bundles_in_one_call_equal_single_calls(prior: NetworkPrior) -> None:
    check_bundles(prior)


def test_bfloat16(folder: Path, prior: NetworkPrior) -> None:
    check_half(open_prior(folder, PriorConfig(dtype="bfloat16", image_px=32), CPU), prior)


def test_student(prior: NetworkPrior) -> None:
    check_student(prior)
