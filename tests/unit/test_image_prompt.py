"""IP-Adapter: our attention and embedding against diffusers' own, scales per view, and the rule that asks for it."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModelWithProjection
from transformers.models.clip import CLIPImageProcessorPil

from sds3d.cameras.orbit import orbit_cameras
from sds3d.config.dump import dump
from sds3d.config.option import Chosen
from sds3d.errors import ConfigError, PriorError
from sds3d.guidance.isd import ISD
from sds3d.interfaces import Cameras, Condition, Draw, Shading, Told
from sds3d.job import JobConfig, load_job
from sds3d.mathx.cfg import cfg
from sds3d.mathx.ode import ddim_step
from sds3d.priors import PriorConfig, load_prior, open_prior, prior_offers
from sds3d.priors.conditions import PromptImage
from sds3d.priors.config import ControlConfig, ImagePromptConfig, LoraConfig
from sds3d.priors.image_prompt import read_picture
from sds3d.priors.network import NetworkPrior
from sds3d.priors.text import PromptingConfig, TextBank
from sds3d.rng import Stream
from tests.tiny.adapters import PROJECTION, VISION_PX, make_image_encoder, make_ip_adapter, make_picture
from tests.tiny.checks import PROMPT, check_bundles, check_student, randn
from tests.tiny.sdxl import make_sdxl
from tests.tiny.stable_diffusion import make_stable_diffusion

CPU = torch.device("cpu")
FLOAT32 = PriorConfig(dtype="float32")
TIMES = [1.0, 0.75, 0.5, 0.25, 0.0]
FOLDERS = {"sd": make_stable_diffusion, "sdxl": make_sdxl}
PIPELINES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, an image encoder, adapters of both kinds for both models, and a picture."""
    where = tmp_path_factory.mktemp("image_prompt")
    make_image_encoder(where / "encoder")
    make_picture(where / "picture.png")
    for name, make in FOLDERS.items():
        make(where / name)
        unet = UNet2DConditionModel.from_pretrained(where / name / "unet")
        make_ip_adapter(where / f"{name}.safetensors", unet)
        make_ip_adapter(where / f"{name}_plus.safetensors", unet, plus=True)
    return where


def asked(files: Path, adapter: str = "sd", **settings: Any) -> ImagePromptConfig:
    return ImagePromptConfig(
        image=str(files / "picture.png"),
        adapter=str(files / f"{adapter}.safetensors"),
        image_encoder=str(files / "encoder"),
        **settings,
    )


def opened(files: Path, name: str = "sd", adapter: str | None = None, **settings: Any) -> NetworkPrior:
    prompt = asked(files, adapter or name, **settings)
    return open_prior(files / name, replace(FLOAT32, image_prompt=prompt), CPU)


def cameras_at(*azimuths: float) -> Cameras:
    azimuth = torch.tensor(azimuths)
    ones = torch.ones_like(azimuth)
    return orbit_cameras(azimuth, 0.0 * ones, 3.0 * ones, 40.0 * ones, 32)


def condition(prior: NetworkPrior, cameras: Cameras) -> Condition:
    bank = TextBank(prior, PROMPT, "", PromptingConfig(view_dependent=False))
    return bank.for_views(cameras, Shading())


def pipeline_of(files: Path, name: str, adapter: str, scale: float) -> Any:
    pipe = PIPELINES[name].from_pretrained(
        files / name,
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(files / "encoder"),
        feature_extractor=CLIPImageProcessorPil(size=VISION_PX, crop_size=VISION_PX),
        **({"safety_checker": None} if name == "sd" else {"add_watermarker": False}),
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(
        str(files), subfolder="", weight_name=f"{adapter}.safetensors", image_encoder_folder=None
    )
    pipe.set_ip_adapter_scale(scale)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )
    return pipe


@pytest.mark.parametrize("adapter", ["sd", "sd_plus", "sdxl", "sdxl_plus"])
def test_sampling_reproduces_the_pipeline(files: Path, adapter: str) -> None:
    name = adapter.removesuffix("_plus")
    prior = opened(files, name, adapter, scale=0.7)
    cond = condition(prior, cameras_at(0.0))
    x = start = randn(1, *prior.shape)
    for now, then in itertools.pairwise(TIMES):
        t, s = (torch.full((1,), time) for time in (now, then))
        eps = cfg(*prior.eps(x, t, cond.as_base(), cond.as_image()), 4.0)
        x = ddim_step(x, eps, prior.schedule, t, s)
    pipe = pipeline_of(files, name, adapter, 0.7)

    def theirs() -> torch.Tensor:
        picture = Image.open(files / "picture.png")
        return pipe(
            PROMPT,
            num_inference_steps=4,
            guidance_scale=4.0,
            latents=start,
            output_type="latent",
            ip_adapter_image=picture,
        ).images

    torch.testing.assert_close(x, theirs(), rtol=1e-5, atol=1e-4)
    pipe.set_ip_adapter_scale(0.6)
    assert (x - theirs()).abs().max() > 1e-3


def test_the_picture_is_read_as_clip_reads_it(files: Path, tmp_path: Path) -> None:
    processor = CLIPImageProcessorPil(size=VISION_PX, crop_size=VISION_PX)
    for size in ((60, 50), (50, 61), (30, 200), (24, 24), (7, 9)):
        path = tmp_path / "sized.png"
        Image.open(files / "picture.png").resize(size).save(path)
        expected = processor(Image.open(path), return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(read_picture(path, VISION_PX), expected, rtol=0, atol=1e-5)


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    def saved(colour: tuple[int, ...]) -> Path:
        path = tmp_path / f"{len(colour)}.png"
        Image.fromarray(np.full((40, 40, len(colour)), colour, dtype=np.uint8)).save(path)
        return path

    clear, white = (read_picture(saved(colour), 24) for colour in ((9, 8, 7, 0), (255, 255, 255)))
    assert torch.equal(clear, white)


def test_scale_zero_and_untold_rows_are_the_bare_prior(files: Path) -> None:
    bare, prior = open_prior(files / "sd", FLOAT32, CPU), opened(files, scale=0.0)
    x, t, text = randn(2, *bare.shape), torch.tensor([0.3, 0.9]), bare.encode_text([PROMPT, "a blue car"])
    (plain,) = bare.eps(x, t, Told(text=text))
    cond = condition(prior, cameras_at(0.0, 90.0))
    told = Told(text=text, image=cond.image)
    assert torch.equal(prior.eps(x, t, told)[0], plain)
    strong = opened(files, scale=1.0)
    assert torch.equal(strong.eps(x, t, Told(text=text))[0], plain)
    seen, untold = strong.eps(
        x, t, replace(told, image=condition(strong, cameras_at(0.0, 90.0)).image), Told(text=text)
    )
    torch.testing.assert_close(untold, plain, rtol=0, atol=1e-5)  # another batch size, so not bit by bit
    assert (seen - plain).abs().max() > 1e-2
    check_bundles(strong)


def test_the_scale_follows_the_azimuth(files: Path) -> None:
    """Full at the front, back_scale behind, each view of a call with its own."""
    prior = opened(files, scale=0.8, back_scale=0.0)
    fixed = opened(files, scale=0.4)
    bare = open_prior(files / "sd", FLOAT32, CPU)
    x, t, text = randn(1, *bare.shape), torch.tensor([0.5]), bare.encode_text([PROMPT])
    views = condition(prior, cameras_at(0.0, 90.0, 180.0, -90.0))
    many = (v.expand(4, *v.shape[1:]) for v in (x, t, text))
    x4, t4, text4 = many
    (eps,) = prior.eps(x4, t4, Told(text=text4, image=views.image))
    (half,) = fixed.eps(x, t, Told(text=text, image=condition(fixed, cameras_at(17.0)).image))
    (none,) = bare.eps(x, t, Told(text=text))
    torch.testing.assert_close(eps[1:2], half, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(eps[3:4], half, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(eps[2:3], none, rtol=1e-5, atol=1e-6)
    assert (eps[:1] - none).abs().max() > 2 * (eps[2:3] - none).abs().max() + 1e-3


def test_the_law_of_scales() -> None:
    rows = torch.ones(1, 3)
    image = PromptImage(embedding=rows, nothing=0.0 * rows, scale=0.8, back_scale=0.2, azimuth_deg=30.0)
    angles = torch.arange(-360.0, 361.0, 1.0)
    scales = image.scales(angles)
    assert scales.max() == pytest.approx(0.8)
    assert scales.min() == pytest.approx(0.2)
    torch.testing.assert_close(image.scales(torch.tensor([30.0, 390.0])), torch.tensor([0.8, 0.8]))
    torch.testing.assert_close(image.scales(torch.tensor([210.0, 120.0])), torch.tensor([0.2, 0.5]))
    assert scales.diff().abs().max() < 0.01
    seen, nothing = image.told(cameras_at(30.0, 210.0))
    torch.testing.assert_close(seen[:, -1, 0], torch.tensor([0.8, 0.2]))
    torch.testing.assert_close(seen[:, 0], torch.ones(2, 3))
    assert nothing[:, 0].abs().max() == 0.0
    assert torch.equal(nothing[:, -1], seen[:, -1])


def test_every_bundle_beside_the_image_is_told_of_no_picture(files: Path) -> None:
    prior = opened(files)
    cond = condition(prior, cameras_at(0.0))
    assert cond.as_image().image is cond.image
    for told in (cond.as_text(), cond.as_null(), cond.as_base()):
        assert told.image is cond.no_image
    bare = condition(open_prior(files / "sd", FLOAT32, CPU), cameras_at(0.0))
    assert bare.as_text().image is None


def test_the_rule_that_asks_for_a_picture_runs(files: Path) -> None:
    prior = opened(files)
    cond, x = condition(prior, cameras_at(0.0, 90.0)), randn(2, *prior.shape)
    draw = Draw(
        t=torch.tensor([0.3, 0.7]),
        noise=randn(2, *prior.shape, seed=1),
        schedule=prior.schedule,
        stream=Stream(0, "x"),
    )
    grad = ISD(ISD.Config(), prior).residual(x, draw, cond).grad
    assert torch.isfinite(grad).all()
    assert not grad.requires_grad
    text_only = replace(cond, image=cond.no_image)
    assert (ISD(ISD.Config(), prior).residual(x, draw, text_only).grad - grad).abs().max() > 1e-3


def test_nothing_in_the_prior_learns_but_a_student_may(files: Path) -> None:
    prior = opened(files)
    module = prior.denoiser.module
    assert not any(p.requires_grad for p in module.parameters())
    check_student(prior)
    cond = condition(prior, cameras_at(0.0))
    student = prior.student(rank=2, lr=1e-3, convolutions=False, stream=Stream(0, "student"))
    (eps,) = student.eps(randn(1, *prior.shape), torch.tensor([0.6]), cond.as_image())
    eps.square().sum().backward()
    assert all(p.grad is None for p in module.parameters())


def test_half_precision_says_about_the_same(files: Path) -> None:
    prompt = asked(files)
    half = open_prior(files / "sd", PriorConfig(dtype="bfloat16", image_prompt=prompt), CPU)
    exact, x, t = opened(files), randn(1, 4, 16, 16), torch.tensor([0.5])
    rough, fine = (p.eps(x, t, condition(p, cameras_at(0.0)).as_image())[0] for p in (half, exact))
    assert (rough - fine).norm() < 0.05 * fine.norm()


def test_a_flow_view_tells_the_picture_too(files: Path) -> None:
    config = replace(FLOAT32, name=str(files / "sd"), image_prompt=asked(files), as_flow=True)
    assert prior_offers(config) >= {"flow", "image prompt"}
    assert "image prompt" not in prior_offers(FLOAT32)
    flow = load_prior(config, CPU)
    assert condition(flow, cameras_at(0.0)).image is not None


def test_what_does_not_fit_is_refused(files: Path, tmp_path: Path) -> None:
    def refuse(match: str, **changed: Any) -> None:
        config = replace(FLOAT32, image_prompt=replace(asked(files), **changed))
        with pytest.raises(PriorError, match=match):
            open_prior(files / "sd", config, CPU)

    refuse("image_prompt.image: no file", image=str(tmp_path / "no.png"))
    refuse("image_prompt.adapter: no file", adapter=str(tmp_path / "no.safetensors"))
    refuse(r"image_prompt.adapter: .*expected a \.safetensors", adapter=str(tmp_path / "x.bin"))
    refuse("image_prompt.image_encoder: no config.json", image_encoder=str(tmp_path))
    refuse("image_prompt.adapter: .*made for another UNet", adapter=str(files / "sdxl.safetensors"))
    text = tmp_path / "text.png"
    text.write_text("no picture")
    refuse("image_prompt.image: .*cannot be read as a picture", image=str(text))
    tensors = load_file(files / "sd.safetensors")
    for name, change, match in (
        ("half", {k: v for k, v in tensors.items() if "image_proj" in k}, "is no IP-Adapter"),
        (
            "face",
            {k.replace("proj.proj.", "proj.proj.0."): v for k, v in tensors.items()},
            "needs a face recogniser",
        ),
        (
            "wide",
            tensors | {"image_proj.proj.weight": randn(64, PROJECTION + 1)},
            f"gives {PROJECTION} numbers, the adapter .* reads {PROJECTION + 1}",
        ),
    ):
        save_file(change, tmp_path / f"{name}.safetensors")
        refuse(match, adapter=str(tmp_path / f"{name}.safetensors"))


def test_a_run_whose_rule_looks_at_no_picture_is_refused(files: Path) -> None:
    prior = replace(FLOAT32, name=str(files / "sd"), image_prompt=asked(files))
    job = JobConfig(prompt=PROMPT, prior=prior)
    with pytest.raises(ConfigError, match=r"prior\.image_prompt: guidance\.kind 'sds' looks at no picture"):
        job.validate()
    asking = replace(job, guidance=Chosen("isd", ISD.Config()))
    asking.validate()
    with pytest.raises(ConfigError, match=r"guidance\.kind 'isd' needs a picture.*set prior\.image_prompt"):
        replace(asking, prior=FLOAT32).validate()


def test_settings_read_back_from_yaml(files: Path) -> None:
    prior = PriorConfig(
        loras=(LoraConfig(path="a.safetensors", scale=0.5), LoraConfig(path="b.safetensors")),
        textual_inversions=("c.safetensors",),
        image_prompt=asked(files, back_scale=0.1, azimuth_deg=20.0),
        controls=(ControlConfig(path="d", kind="depth"), ControlConfig(path="e", kind="light", scale=0.4)),
    )
    job = JobConfig(prompt=PROMPT, prior=prior)
    path = files / "job.yaml"
    path.write_text(dump(job))
    assert load_job(str(path)).config.prior == prior
    path.write_text("prior: {controls: [{path: d, kind: edges}]}")
    with pytest.raises(ConfigError, match=r"prior\.controls\[0\]\.kind: got 'edges', expected one of depth"):
        load_job(str(path))
