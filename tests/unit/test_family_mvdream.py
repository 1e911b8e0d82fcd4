"""MVDream and ImageDream on tiny random folders, against attention written as loops and diffusers' own pipeline."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModel

from sds3d.cameras.orbit import orbit_cameras
from sds3d.config.load import override_layers
from sds3d.errors import ConfigError, PriorError
from sds3d.interfaces import Cameras, Shading, Told
from sds3d.job import JobConfig, load_job
from sds3d.mathx.cfg import cfg
from sds3d.mathx.ode import ddim_step
from sds3d.priors import PriorConfig, needed_views, open_prior
from sds3d.priors.config import ImagePromptConfig
from sds3d.priors.families import LoadOptions
from sds3d.priors.families.mvdream import build
from sds3d.priors.folder import PipelineFolder
from sds3d.priors.image_prompt import read_picture
from sds3d.priors.multiview import mvdream_pose
from sds3d.priors.network import NetworkPrior
from sds3d.priors.text import PromptingConfig, TextBank
from sds3d.rng import Stream
from tests.tiny.checks import check_codec, picture, randn
from tests.tiny.mvdream import IMAGE_WIDTH, make_mvdream
from tests.tiny.mvdream_reference import reference_pose, reference_unet

CPU = torch.device("cpu")
FLOAT32 = PriorConfig(dtype="float32")
PROMPT, NEGATIVE = "a red mug", "blue"


def cameras_of(*azimuth_deg: float, elevation: float = 20.0) -> Cameras:
    """Cameras at these azimuths, each at its own distance."""
    azimuth = torch.tensor(azimuth_deg)
    same = torch.ones_like(azimuth)
    return orbit_cameras(azimuth, elevation * same, 3.0 + 0.1 * torch.arange(len(azimuth)), 40.0 * same, 16)


def part_of(cameras: Cameras, order: list[int]) -> Cameras:
    return replace(cameras, **{k: v[order] for k, v in vars(cameras).items() if isinstance(v, Tensor)})


TWO_OBJECTS = cameras_of(10.0, 100.0, 190.0, 280.0, 50.0, 140.0, 230.0, 320.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mvdream(tmp_path_factory.mktemp("mvdream") / "ours")


@pytest.fixture(scope="module")
def prior(folder: Path) -> NetworkPrior:
    return open_prior(folder, FLOAT32, CPU)


def pipeline_of(folder: Path, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    scheduler = DDIMScheduler.from_config(
        DDIMScheduler.load_config(folder / "scheduler"), timestep_spacing="trailing", set_alpha_to_one=True
    )
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae", low_cpu_mem_usage=False),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_pipeline(folder: Path, unet: UNet2DConditionModel, start: Tensor) -> Tensor:
    return pipeline_of(folder, unet)(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_images_per_prompt=len(start),
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=start.clone(),
        height=16,
        width=16,
        output_type="latent",
    ).images


def by_prior(prior: NetworkPrior, cameras: Cameras | None, start: Tensor) -> Tensor:
    count = len(start)
    text, null = (prior.encode_text([words]).expand(count, -1, -1) for words in (PROMPT, NEGATIVE))
    x = start.double()  # around the network: the first step divides by a small alpha
    for now in (1.0, 0.75, 0.5, 0.25):
        t = torch.full((count,), now, dtype=torch.float64)
        eps = cfg(*prior.eps(x, t, Told(text=null), Told(text=text, cameras=cameras)), 3.0)
        x = ddim_step(x, eps, prior.schedule, t, t - 0.25)
    return x.float()


def test_four_views_of_two_objects_sample_as_attention_over_joined_tokens(
    folder: Path, prior: NetworkPrior
) -> None:
    poses = reference_pose(TWO_OBJECTS.azimuth_deg, TWO_OBJECTS.elevation_deg)
    start = randn(8, *prior.shape, seed=1)
    expected = by_pipeline(folder, reference_unet(folder, poses, 4), start)
    torch.testing.assert_close(by_prior(prior, TWO_OBJECTS, start), expected, rtol=0, atol=1e-4)
    alone = by_pipeline(folder, reference_unet(folder, poses, 1), start)
    assert (alone - expected).abs().max() > 1e-2


def test_one_view_without_cameras_is_plain_stable_diffusion(tmp_path: Path) -> None:
    folder = make_mvdream(tmp_path / "single", views=1)
    single = open_prior(folder, FLOAT32, CPU)
    start = randn(2, *single.shape, seed=2)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)
    torch.testing.assert_close(
        by_prior(single, None, start), by_pipeline(folder, unet, start), rtol=0, atol=1e-4
    )


def test_latents_are_scaled_as_by_the_pipeline(folder: Path, prior: NetworkPrior) -> None:
    check_codec(prior, pipeline_of(folder, prior.denoiser.module))
    assert prior.shape == (4, 8, 8)
    assert prior.image_px == 16


def eps_of(prior: NetworkPrior, x: Tensor, cameras: Cameras, image: Tensor | None = None) -> Tensor:
    text = prior.encode_text([PROMPT]).expand(len(x), -1, -1)
    told = Told(text=text, cameras=cameras, image=image)
    return prior.eps(x, torch.full((len(x),), 0.5), told)[0]


@pytest.mark.parametrize("order", [[4, 5, 6, 7, 0, 1, 2, 3], [2, 0, 3, 1, 4, 5, 6, 7]])
def test_objects_and_the_views_of_an_object_may_be_reordered(prior: NetworkPrior, order: list[int]) -> None:
    x = randn(8, *prior.shape)
    eps, moved = eps_of(prior, x, TWO_OBJECTS), eps_of(prior, x[order], part_of(TWO_OBJECTS, order))
    torch.testing.assert_close(moved, eps[order], rtol=1e-4, atol=1e-5)


def test_views_see_each_other_and_objects_do_not(prior: NetworkPrior) -> None:
    x = randn(8, *prior.shape)
    other = x.clone()
    other[0] += 1.0
    change = (eps_of(prior, other, TWO_OBJECTS) - eps_of(prior, x, TWO_OBJECTS)).abs().amax((1, 2, 3))
    assert (change[:4] > 1e-4).all()
    assert change[4:].max() < 1e-5


def test_a_changed_camera_changes_the_output_and_distance_does_not(prior: NetworkPrior) -> None:
    x = randn(4, *prior.shape)
    seen = cameras_of(0.0, 90.0, 180.0, 270.0)
    eps = eps_of(prior, x, seen)
    assert (eps_of(prior, x, cameras_of(45.0, 135.0, 225.0, 315.0)) - eps).abs().max() > 1e-3
    assert (eps_of(prior, x, cameras_of(0.0, 90.0, 180.0, 270.0, elevation=0.0)) - eps).abs().max() > 1e-3
    far = seen.c2w.clone()
    far[:, :3, 3] *= 2.0
    torch.testing.assert_close(eps_of(prior, x, replace(seen, c2w=far)), eps, rtol=1e-4, atol=1e-5)


def test_poses_follow_mvdreams_axes() -> None:
    expected = reference_pose(TWO_OBJECTS.azimuth_deg, TWO_OBJECTS.elevation_deg)
    torch.testing.assert_close(mvdream_pose(TWO_OBJECTS.c2w), expected, rtol=0, atol=1e-5)
    (front,) = mvdream_pose(cameras_of(0.0, elevation=0.0).c2w).unflatten(1, (4, 4))
    # Stands on +x, looks along -x; the picture's right is +y, its up +z.
    known = [[0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    torch.testing.assert_close(front, torch.tensor(known), rtol=0, atol=1e-6)


def test_the_unconditional_prediction_is_told_the_camera_too(prior: NetworkPrior) -> None:
    x, t = randn(4, *prior.shape), torch.full((4,), 0.5)
    text = prior.encode_text(["", PROMPT])
    null, words = (each.expand(4, -1, -1) for each in text)
    cameras = cameras_of(0.0, 90.0, 180.0, 270.0)
    borrowed, _ = prior.eps(x, t, Told(text=null), Told(text=words, cameras=cameras))
    (own,) = prior.eps(x, t, Told(text=null, cameras=cameras))
    (unknown,) = prior.eps(x, t, Told(text=null))
    torch.testing.assert_close(borrowed, own, rtol=1e-4, atol=1e-5)
    assert (unknown - own).abs().max() > 1e-3


def test_views_that_are_no_whole_objects_are_refused(prior: NetworkPrior) -> None:
    with pytest.raises(PriorError, match="multiple of 4"):
        eps_of(prior, randn(6, *prior.shape), part_of(TWO_OBJECTS, [0, 1, 2, 3, 4, 5]))


def test_a_student_starts_as_its_prior_and_learns(prior: NetworkPrior) -> None:
    student = prior.student(rank=2, lr=1e-3, convolutions=False, stream=Stream(0, "student"))
    x, t = randn(4, *prior.shape), torch.full((4,), 0.5)
    told = Told(
        text=prior.encode_text([PROMPT]).expand(4, -1, -1), cameras=cameras_of(0.0, 90.0, 180.0, 270.0)
    )
    (own,), (theirs,) = student.eps(x, t, told), prior.eps(x, t, told)
    torch.testing.assert_close(own.detach(), theirs, rtol=1e-4, atol=1e-5)
    own.square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in prior.denoiser.module.parameters())


@pytest.mark.parametrize("image", [None, "local", "pixel"])
def test_the_hub_layout_is_the_same_network(tmp_path: Path, image: Any) -> None:
    ours, hub = (
        open_prior(make_mvdream(tmp_path / layout, layout, image=image), FLOAT32, CPU)
        for layout in ("ours", "hub")
    )
    x = randn(4, *ours.shape)
    cameras = cameras_of(0.0, 90.0, 180.0, 270.0)
    seen = None
    if image:
        layout = ours.denoiser.image
        assert layout == hub.denoiser.image
        seen = randn(4, layout.rows + 1, layout.width, seed=3)
    torch.testing.assert_close(
        eps_of(hub, x, cameras, seen), eps_of(ours, x, cameras, seen), rtol=0, atol=1e-5
    )
    if image:
        assert (eps_of(ours, x, cameras) - eps_of(ours, x, cameras, seen)).abs().max() > 1e-3


def test_a_wrappers_prefix_is_dropped(tmp_path: Path) -> None:
    folder = make_mvdream(tmp_path / "hub", "hub")
    plain = open_prior(folder, FLOAT32, CPU)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({f"unet.{name}": value for name, value in load_file(file).items()}, file)
    wrapped = open_prior(folder, FLOAT32, CPU)
    x = randn(4, *plain.shape)
    cameras = cameras_of(0.0, 90.0, 180.0, 270.0)
    assert torch.equal(eps_of(wrapped, x, cameras), eps_of(plain, x, cameras))


def picture_file(folder: Path) -> Path:
    """A picture whose size is that of the latent's image, so that only CLIP's eye resizes it."""
    pixels = (picture(16)[0].permute(1, 2, 0) * 255.0).round().byte().numpy()
    Image.fromarray(pixels).save(folder / "picture.png")
    return folder / "picture.png"


def options_with(image: Path) -> LoadOptions:
    prompt = ImagePromptConfig(image=str(image), scale=1.0)
    return LoadOptions(config=replace(FLOAT32, image_prompt=prompt), device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("image", ["local", "pixel"])
def test_image_prompts_reach_the_network_as_in_imagedream(tmp_path: Path, image: Any) -> None:
    path, file = make_mvdream(tmp_path / "imagedream", image=image), picture_file(tmp_path)
    parts = build(PipelineFolder(path), options_with(file))
    # In float64: one channel per group of the tiny network's norms makes the constant image of "no image" (latent
    # zero) a division by almost nothing.
    prior = NetworkPrior(parts, CPU, torch.float64)
    vision = CLIPVisionModel.from_pretrained(path / "image_encoder").eval()
    with torch.no_grad():
        states = vision(read_picture(file, 8)[None], output_hidden_states=True).hidden_states[-2]
    rgb = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None] / 255.0

    # One object: a bundle that is told there is no picture, then one with the picture.
    x, t = randn(4, *prior.shape).double(), torch.full((4,), 0.5)
    cameras = cameras_of(0.0, 90.0, 180.0, 270.0)
    text = prior.encode_text([PROMPT]).expand(4, -1, -1)
    assert parts.conditions.image is not None
    picture_told, none_told = parts.conditions.image.told(cameras)
    without, seen = prior.eps(
        x, t, Told(text=text, image=none_told), Told(text=text, cameras=cameras, image=picture_told)
    )
    (untold,) = prior.eps(x, t, Told(text=text, cameras=cameras))
    torch.testing.assert_close(untold, without, rtol=0, atol=1e-6)

    rows = 5 if image == "pixel" else 4
    poses = reference_pose(cameras.azimuth_deg, cameras.elevation_deg)
    poses = torch.cat([poses, torch.zeros(rows - 4, 16)]).double()
    states = states.double()
    states = torch.cat([torch.zeros_like(states).expand(rows, -1, -1), states.expand(rows, -1, -1)])
    unet = reference_unet(path, poses, rows, states)
    latents = [torch.zeros(1, *prior.shape), prior.encode(rgb)]
    tokens = parts.text.packing.tokens_of(text[:1]).expand(2 * rows, -1, -1).double()
    with torch.no_grad():
        groups = torch.cat([torch.cat([x, latent.double()])[:rows] for latent in latents])
        expected = unet(groups, 499, tokens).sample.unflatten(0, (2, rows))[:, :4]
    torch.testing.assert_close(torch.stack([without, seen]), expected, rtol=0, atol=1e-5)
    assert (without - seen).abs().max() > 1e-3


def test_mvdream_reads_no_image_prompt(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PriorError, match="reads no image prompt"):
        build(PipelineFolder(folder), options_with(picture_file(tmp_path)))


def test_an_image_encoder_of_another_model_is_noticed(tmp_path: Path) -> None:
    folder = make_mvdream(tmp_path / "imagedream", image="local")
    config = folder / "image_encoder" / "config.json"
    config.write_text(config.read_text().replace(f'"hidden_size": {IMAGE_WIDTH}', '"hidden_size": 32'))
    with pytest.raises(PriorError, match=r"reads 24 numbers per token, image_encoder/ gives 32"):
        open_prior(folder, FLOAT32, CPU)


def test_half_precision_stays_close(folder: Path, prior: NetworkPrior) -> None:
    half = open_prior(folder, PriorConfig(dtype="bfloat16"), CPU)
    x = randn(4, *prior.shape)
    cameras = cameras_of(0.0, 90.0, 180.0, 270.0)
    assert (eps_of(half, x, cameras) - eps_of(prior, x, cameras)).abs().max() < 0.1


def test_incomplete_folders_are_explained(tmp_path: Path) -> None:
    folder = make_mvdream(tmp_path / "ours", image="local")
    camera = folder / "camera_embed" / "model.safetensors"
    camera.rename(folder / "kept")
    with pytest.raises(PriorError, match=r"camera_embed: no \.safetensors"):
        open_prior(folder, FLOAT32, CPU)
    camera.parent.rmdir()
    with pytest.raises(PriorError, match="no camera_embed/"):
        open_prior(folder, FLOAT32, CPU)
    camera.parent.mkdir()
    camera.write_bytes(b"short")
    with pytest.raises(PriorError, match="cannot be loaded"):
        open_prior(folder, FLOAT32, CPU)

    hub = make_mvdream(tmp_path / "hub", "hub")
    config = json.loads((hub / "unet" / "config.json").read_text())
    for change, message in (
        ({"model_channels": 64}, "do not make a UNet"),
        ({"channel_mult": [1]}, "do not make"),
    ):
        (hub / "unet" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(PriorError, match=message):
            open_prior(hub, FLOAT32, CPU)


def job(config: str, *words: str) -> JobConfig:
    return load_job(config, override_layers(["prompt=a mug", "device=cpu", *words])).config


def test_a_run_without_joint_views_is_refused_before_anything_is_loaded(folder: Path) -> None:
    assert needed_views(PriorConfig(name=str(folder))) == 4
    assert needed_views(PriorConfig(name="mvdream-not-here")) == 1
    assert needed_views(PriorConfig(name="toybox")) == 1
    named = f"prior.name={folder}"
    with pytest.raises(ConfigError, match=r"camera\.views_per_object=4"):
        job("default", named).validate()
    with pytest.raises(ConfigError, match=r"time\.per_view: .* set it to false"):
        job("default", named, "camera.views_per_object=4").validate()
    with pytest.raises(ConfigError, match=r"time\.spread: .* set it to 0"):
        job("default", named, "camera.views_per_object=4", "time.kind=annealed", "time.spread=0.1").validate()
    job("default", named, "camera.views_per_object=4", "time.per_view=false").validate()


def test_the_preset_asks_for_joint_views_at_one_time(folder: Path) -> None:
    job("mvdream", f"prior.name={folder}").validate()
    with pytest.raises(ConfigError, match="expected a multiple of views_per_object = 4"):
        job("mvdream", "camera.batch=6")


def test_imagedream_is_shown_a_picture_by_a_run(tmp_path: Path) -> None:
    """From the settings alone; an adapter is refused, because the model reads pictures by itself."""
    path, file = make_mvdream(tmp_path / "imagedream", image="local"), picture_file(tmp_path)
    shown = replace(FLOAT32, image_prompt=ImagePromptConfig(image=str(file)))
    prior = open_prior(path, shown, CPU)
    assert prior.conditions.image is not None
    assert prior.conditions.camera_always
    adapted = replace(FLOAT32, image_prompt=ImagePromptConfig(image=str(file), adapter="a.safetensors"))
    with pytest.raises(PriorError, match=r"image_prompt\.adapter.*reads pictures by itself; remove it"):
        open_prior(path, adapted, CPU)


def test_the_empty_prompt_keeps_the_camera(folder: Path) -> None:
    """Also where a rule asks for it alone: there is no other bundle to take cameras from."""
    prior = open_prior(folder, FLOAT32, CPU)
    config = PromptingConfig()
    cameras = cameras_of(0.0, 90.0, 180.0, 270.0)
    cond = TextBank(prior, PROMPT, "", config).for_views(cameras, Shading())
    assert cond.as_null().cameras is cameras
    assert cond.as_base().cameras is cameras
