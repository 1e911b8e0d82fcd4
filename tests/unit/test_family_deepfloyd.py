"""DeepFloyd IF stage I on a tiny random pipeline, against diffusers' own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import IFPipeline

from sds3d.errors import PriorError
from sds3d.interfaces import Told
from sds3d.mathx.cfg import cfg
from sds3d.mathx.ode import ddim_step
from sds3d.priors import PriorConfig, open_prior
from sds3d.priors.families.deepfloyd import TEXT_TOKENS
from sds3d.priors.network import NetworkPrior
from tests.tiny.checks import PROMPT, check_bundles, check_half, check_student, picture, randn
from tests.tiny.deepfloyd import WIDTH, make_deepfloyd

CPU = torch.device("cpu")
FLOAT32 = PriorConfig(dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_deepfloyd(tmp_path_factory.mktemp("if"), variance="fixed_small")


@pytest.fixture(scope="module")
def prior(folder: Path) -> NetworkPrior:
    return open_prior(folder, FLOAT32, CPU)


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    pipe = IFPipeline.from_pretrained(folder, safety_checker=None, watermarker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ancestral(prior: NetworkPrior, scale: float, steps: int) -> torch.Tensor:
    """DDPM's own sampler: ancestral steps at every (1000 / steps)-th trained time."""
    noise = torch.Generator().manual_seed(3)
    x = torch.randn(1, *prior.shape, generator=noise)
    text, null = (Told(text=prior.encode_text([words])) for words in (PROMPT, ""))
    for k in reversed(range(steps)):
        t = torch.tensor([(k * (1000 // steps) + 1) / 1000])
        s = (t - 1 / steps).clamp(min=0.0)
        eps = cfg(*prior.eps(x, t, null, text), scale)
        fresh = torch.randn(x.shape, generator=noise) if k else torch.zeros_like(x)
        x = ddim_step(x, eps, prior.schedule, t, s, eta=1.0, noise=fresh)
    return x


@pytest.mark.parametrize("size", [None, 24])
def test_sampling_reproduces_the_pipeline(folder: Path, pipe: Any, size: int | None) -> None:
    """With its own ancestral sampler, at the trained size and at another."""
    prior = open_prior(folder, replace(FLOAT32, image_px=size), CPU)
    assert prior.shape == (3, size or 16, size or 16)
    settings = {"num_inference_steps": 5, "guidance_scale": 4.0, "clean_caption": False, "output_type": "pt"}
    generator = torch.Generator().manual_seed(3)
    theirs = pipe(PROMPT, generator=generator, height=size, width=size, **settings).images
    torch.testing.assert_close(ancestral(prior, 4.0, 5), theirs, rtol=0, atol=1e-4)


def test_the_learned_variance_is_dropped(tmp_path: Path) -> None:
    prior = open_prior(make_deepfloyd(tmp_path), FLOAT32, CPU)
    x, t = randn(1, *prior.shape), torch.tensor([0.5])
    text = prior.encode_text([PROMPT])
    with torch.no_grad():
        raw = prior.denoiser.module(x, 499, text).sample
    (eps,) = prior.eps(x, t, Told(text=text))
    assert raw.shape[1] == 6
    torch.testing.assert_close(eps, raw[:, :3], rtol=1e-4, atol=1e-5)


def test_text_is_that_of_the_pipeline(prior: NetworkPrior, pipe: Any) -> None:
    tokens, null = pipe.encode_prompt(f" {PROMPT.upper()} ")
    assert tokens.shape == (1, TEXT_TOKENS, WIDTH)
    torch.testing.assert_close(prior.encode_text([PROMPT, ""]), torch.cat([tokens, null]))
    torch.testing.assert_close(prior.encode_text([f" {PROMPT.upper()} "]), tokens)
    (message,) = prior.warnings(["red mug " * 38 + "blue car"])
    assert f"reads {TEXT_TOKENS}" in message
    assert "'blue car'" in message


def test_x_is_the_image(prior: NetworkPrior) -> None:
    """From -1 to 1, as the pipeline's x / 2 + 0.5 says; the gradient goes straight through."""
    assert prior.is_pixel
    rgb = picture(prior.image_px).requires_grad_()
    x = prior.encode(rgb)
    torch.testing.assert_close(x / 2 + 0.5, rgb)
    torch.testing.assert_close(prior.decode(x), rgb.detach())
    x.sum().backward()
    torch.testing.assert_close(rgb.grad, torch.full_like(rgb, 2.0))
    assert prior.encode(picture(40)).shape == (1, *prior.shape)


def test_bundles_in_one_call_equal_single_calls(prior: NetworkPrior) -> None:
    check_bundles(prior)


def test_bfloat16(folder: Path, prior: NetworkPrior) -> None:
    check_half(open_prior(folder, PriorConfig(dtype="bfloat16"), CPU), prior)


def test_a_student_starts_as_the_network(prior: NetworkPrior) -> None:
    """Its attention layers lie between the blocks, under other names than elsewhere."""
    check_student(prior)


def test_later_stages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PriorError, match="reads 6 channels, expected 3; only stage I"):
        open_prior(make_deepfloyd(tmp_path, channels=6), FLOAT32, CPU)
