"""SANA on a tiny random pipeline, against diffusers' own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaPipeline

from sds3d.errors import PriorError
from sds3d.interfaces import Told
from sds3d.mathx.schedule import FlowSchedule
from sds3d.priors import PriorConfig, open_prior
from sds3d.priors.families import FAMILIES
from sds3d.priors.families.sana import TEXT_TOKENS, instruction
from sds3d.priors.network import NetworkPrior
from tests.tiny.checks import PROMPT, check_bundles, check_half, check_student, picture, randn, sample
from tests.tiny.sana import make_sana

CPU = torch.device("cpu")
FLOAT32 = PriorConfig(dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sana(tmp_path_factory.mktemp("sana"))


@pytest.fixture(scope="module")
def prior(folder: Path) -> NetworkPrior:
    return open_prior(folder, FLOAT32, CPU)


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    pipe = SanaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def both(prior: NetworkPrior, pipe: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Our sample and the pipeline's, from t = 1 over the pipeline's own (shifted) times."""
    x, size = randn(1, *prior.shape), prior.image_px
    settings = {"num_inference_steps": 5, "guidance_scale": 4.5, "output_type": "latent", **more}
    fixed = {"use_resolution_binning": False, "height": size, "width": size}
    theirs = pipe(PROMPT, latents=x, **fixed, **settings).images
    return sample(prior, x, pipe.scheduler.sigmas.tolist(), 4.5), theirs


def test_sampling_reproduces_the_pipeline(prior: NetworkPrior, pipe: Any) -> None:
    ours, theirs = both(prior, pipe)
    assert pipe.scheduler.sigmas[0] == 1.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    plain = both(prior, pipe, complex_human_instruction=None)[1]
    assert (ours - plain).abs().max() > 1e-3


def test_image_px_sets_the_size(folder: Path, pipe: Any) -> None:
    prior = open_prior(folder, PriorConfig(dtype="float32", image_px=64), CPU)
    assert prior.shape == (4, 16, 16)
    torch.testing.assert_close(*both(prior, pipe), rtol=0, atol=1e-4)
    with pytest.raises(PriorError, match="multiple of 4"):
        open_prior(folder, PriorConfig(image_px=42), CPU)


def test_text_and_mask_are_those_of_the_pipeline(prior: NetworkPrior, pipe: Any) -> None:
    """The prompt with the instruction before it, the empty one without."""
    tokens, mask, null, null_mask = pipe.encode_prompt(
        PROMPT, complex_human_instruction=instruction().split("\n")
    )
    said, packing = prior.encode_text([f" {PROMPT.upper()}", ""]), prior.text.packing
    assert tokens.shape[1] == TEXT_TOKENS
    torch.testing.assert_close(packing.tokens_of(said), torch.cat([tokens, null]), rtol=1e-4, atol=1e-5)
    assert packing.mask_of(said).tolist() == torch.cat([mask, null_mask]).bool().tolist()
    assert instruction().endswith("User Prompt: ")


def test_long_prompts_are_reported(prior: NetworkPrior) -> None:
    whole = "red" + " mug" * 298  # one more than the 298 tokens: "red" joins the instruction's last blank
    assert prior.warnings([whole]) == []
    (message,) = prior.warnings([whole + " blue car"])
    assert "has 300 tokens and the prior reads 298" in message
    assert "'blue car'" in message
    kept, cut = prior.encode_text([whole, whole + " blue car"])
    torch.testing.assert_close(kept, cut)


def test_encode_and_decode_are_those_of_the_pipeline(prior: NetworkPrior, pipe: Any) -> None:
    rgb = picture(prior.image_px).requires_grad_()
    x = prior.encode(rgb)
    assert x.shape == (1, *prior.shape)
    with torch.no_grad():
        latent = pipe.vae.encode(pipe.image_processor.preprocess(rgb.detach())).latent
        torch.testing.assert_close(x.detach(), latent * pipe.vae.config.scaling_factor)
        back = pipe.image_processor.postprocess(pipe.vae.decode(latent).sample, output_type="pt")
    torch.testing.assert_close(prior.decode(x.detach()).clamp(0.0, 1.0), back)
    x.square().sum().backward()
    assert rgb.grad is not None
    assert rgb.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in prior.codec.vae.parameters())
    assert prior.encode(picture(40)).shape == (1, *prior.shape)


def test_bundles_in_one_call_equal_single_calls(prior: NetworkPrior) -> None:
    check_bundles(prior)


def test_bfloat16(folder: Path, prior: NetworkPrior) -> None:
    check_half(open_prior(folder, PriorConfig(dtype="bfloat16"), CPU), prior)


def test_student(prior: NetworkPrior) -> None:
    check_student(prior)


def test_it_is_a_flow_by_the_sampler_of_the_published_folders(prior: NetworkPrior, tmp_path: Path) -> None:
    assert FAMILIES["SanaPipeline"].offers == {"student", "flow"}
    folder = make_sana(tmp_path, published=True)
    published = open_prior(folder, FLOAT32, CPU)
    assert published.schedule == FlowSchedule(trained=True)
    x, t, told = randn(1, *prior.shape), torch.tensor([0.5]), Told(text=prior.encode_text([PROMPT]))
    torch.testing.assert_close(published.eps(x, t, told), prior.eps(x, t, told))
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"prediction_type": "epsilon", "use_flow_sigmas": False}))
    with pytest.raises(PriorError, match="'epsilon' contradicts SanaPipeline"):
        open_prior(folder, FLOAT32, CPU)
