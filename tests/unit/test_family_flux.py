"""FLUX.1 on a tiny random pipeline, against diffusers' own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

from sds3d.errors import PriorError
from sds3d.priors import PriorConfig, open_prior
from sds3d.priors.families import FAMILIES
from sds3d.priors.families.flux import DEV_TOKENS, SCHNELL_TOKENS, positions
from sds3d.priors.network import NetworkPrior
from tests.tiny.checks import PROMPT, check_bundles, check_codec, check_half, check_student, randn, sample
from tests.tiny.flux import make_flux

CPU = torch.device("cpu")
FLOAT32 = PriorConfig(dtype="float32")


def pipeline_of(folder: Path) -> Any:
    pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def prior(folder: Path) -> NetworkPrior:
    return open_prior(folder, FLOAT32, CPU)


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    return pipeline_of(folder)


def both(
    prior: NetworkPrior, pipe: Any, scale: float = 1.0, guidance: float = 3.5, **more: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Our sample and the pipeline's (unpacked by the pipeline), from t = 1 over the pipeline's own times."""
    x, side = randn(1, *prior.shape), prior.image_px
    settings: dict[str, Any] = {"num_inference_steps": 4, "height": side, "width": side, **more}
    if scale != 1.0:
        settings |= {"true_cfg_scale": scale, "negative_prompt": ""}
    packed = pipe._pack_latents(x, *x.shape)
    out = pipe(PROMPT, latents=packed, guidance_scale=guidance, output_type="latent", **settings).images
    theirs = pipe._unpack_latents(out, side, side, pipe.vae_scale_factor)
    return sample(prior, x, pipe.scheduler.sigmas.tolist(), scale), theirs


def test_sampling_reproduces_the_pipeline(prior: NetworkPrior, pipe: Any) -> None:
    ours, theirs = both(prior, pipe)
    assert pipe.scheduler.sigmas[0] == 1.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_true_guidance_reproduces_the_pipeline(prior: NetworkPrior, pipe: Any) -> None:
    ours, theirs = both(prior, pipe, scale=4.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (theirs - both(prior, pipe)[1]).abs().max() > 1e-3


def test_the_guidance_value_is_a_setting(folder: Path, prior: NetworkPrior, pipe: Any) -> None:
    told_7 = open_prior(folder, replace(FLOAT32, flux_guidance=7.0), CPU)
    ours, theirs = both(told_7, pipe, guidance=7.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (ours - both(prior, pipe)[0]).abs().max() > 1e-3


def test_schnell_has_no_guidance_and_fewer_tokens(tmp_path: Path) -> None:
    folder = make_flux(tmp_path, dev=False)
    prior, pipe = open_prior(folder, FLOAT32, CPU), pipeline_of(folder)
    assert prior.denoiser.guidance is None
    assert prior.text.packing.tokens == SCHNELL_TOKENS
    ours, theirs = both(prior, pipe, max_sequence_length=SCHNELL_TOKENS)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_image_px_sets_the_size(folder: Path, pipe: Any) -> None:
    prior = open_prior(folder, replace(FLOAT32, image_px=44), CPU)
    assert prior.shape == (4, 22, 22)
    torch.testing.assert_close(*both(prior, pipe), rtol=0, atol=1e-4)
    with pytest.raises(PriorError, match=r"multiple of 4, e\.g\. 40 or 44"):
        open_prior(folder, replace(FLOAT32, image_px=42), CPU)


def test_the_trained_size_of_the_real_model(tmp_path: Path) -> None:
    folder = make_flux(tmp_path)
    (folder / "sds3d_prior.json").unlink()
    assert open_prior(folder, FLOAT32, CPU).shape[1:] == (128, 128)


def test_patches_and_positions_are_those_of_the_pipeline(prior: NetworkPrior, pipe: Any) -> None:
    torch.testing.assert_close(
        positions(3, 5, CPU), pipe._prepare_latent_image_ids(1, 3, 5, CPU, torch.float32)
    )


def test_text_is_that_of_the_pipeline(prior: NetworkPrior, pipe: Any) -> None:
    tokens, pooled, _ = pipe.encode_prompt(PROMPT, None)
    said, packing = prior.encode_text([PROMPT]), prior.text.packing
    assert tokens.shape[1] == DEV_TOKENS
    torch.testing.assert_close(packing.tokens_of(said), tokens, rtol=0, atol=1e-4)
    torch.testing.assert_close(packing.pooled_of(said), pooled)
    assert len(prior.text.modules()) == 2


def test_only_words_that_t5_does_not_read_are_reported(prior: NetworkPrior) -> None:
    assert prior.warnings(["red mug " * 100]) == []
    (message,) = prior.warnings(["red mug " * 256 + "blue car"])
    assert f"reads {DEV_TOKENS}" in message
    assert "blue car" in message


def test_it_is_a_flow() -> None:
    assert FAMILIES["FluxPipeline"].offers == {"student", "flow"}


def test_encode_and_decode_are_those_of_the_pipeline(prior: NetworkPrior, pipe: Any) -> None:
    check_codec(prior, pipe)


def test_bundles_in_one_call_equal_single_calls(prior: NetworkPrior) -> None:
    check_bundles(prior)


def test_bfloat16(folder: Path, prior: NetworkPrior) -> None:
    check_half(open_prior(folder, PriorConfig(), CPU), prior)


def test_student(prior: NetworkPrior) -> None:
    check_student(prior)
