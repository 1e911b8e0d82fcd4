"""ControlNets: features against diffusers' own pipelines, and the pictures that a scene's render gives them."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    UNet2DConditionModel,
)

from sds3d.cameras.light import ShadingConfig, ShadingLaw
from sds3d.cameras.orbit import orbit_cameras
from sds3d.config.ramp import Ramp
from sds3d.errors import ConfigError, PriorError
from sds3d.guidance import SDS
from sds3d.guidance.noise import FreshNoise
from sds3d.guidance.terms import Term
from sds3d.guidance.time import UniformTime
from sds3d.guide import Guide
from sds3d.interfaces import Cameras, Condition, Render, Shading, Told
from sds3d.mathx.cfg import cfg
from sds3d.mathx.ode import ddim_step
from sds3d.moment import Moment
from sds3d.priors import PriorConfig, load_prior, open_prior
from sds3d.priors.config import ControlConfig, ControlKind
from sds3d.priors.control_pictures import CHANNELS, control_pictures, known_materials
from sds3d.priors.network import NetworkPrior
from sds3d.priors.text import PromptingConfig, TextBank
from sds3d.rng import Stream, Streams
from sds3d.scenes import MeshScene
from tests.tiny.adapters import make_controlnet
from tests.tiny.checks import PROMPT, check_student, picture, randn
from tests.tiny.sdxl import make_sdxl
from tests.tiny.stable_diffusion import make_stable_diffusion

CPU = torch.device("cpu")
FLOAT32 = PriorConfig(dtype="float32")
TIMES = [1.0, 0.75, 0.5, 0.25, 0.0]
FOLDERS = {"sd": make_stable_diffusion, "sdxl": make_sdxl}
PIPELINES = {"sd": StableDiffusionControlNetPipeline, "sdxl": StableDiffusionXLControlNetPipeline}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models with two control networks each, two for light, and one that reads six channels."""
    where = tmp_path_factory.mktemp("control")
    for name, make in FOLDERS.items():
        make(where / name)
        unet = UNet2DConditionModel.from_pretrained(where / name / "unet")
        make_controlnet(where / f"{name}_a", unet)
        make_controlnet(where / f"{name}_b", unet, seed=8)
        if name == "sd":
            for kind, channels in (("six", 6), ("light", 3), ("dreammat", 22)):
                make_controlnet(where / f"sd_{kind}", unet, channels=channels)
    return where


def opened(files: Path, *controls: tuple[str, str, float], name: str = "sd", **settings: Any) -> NetworkPrior:
    configs = tuple(ControlConfig(path=str(files / p), kind=k, scale=s) for p, k, s in controls)
    return open_prior(files / name, replace(FLOAT32, controls=configs, **settings), CPU)


def cameras_at(*azimuths: float, size_px: int = 32) -> Cameras:
    azimuth = torch.tensor(azimuths)
    ones = torch.ones_like(azimuth)
    return orbit_cameras(azimuth, 0.0 * ones, 3.0 * ones, 40.0 * ones, size_px)


def ball(cameras: Cameras, radius: float = 0.8) -> Render:
    """A ball at the origin: depth and normals in closed form."""
    size = cameras.width_px
    grid = torch.arange(size) + 0.5
    focal, centre = cameras.intrinsics[0, 0, 0], cameras.intrinsics[0, 0, 2]
    x, y = torch.meshgrid((grid - centre) / focal, (grid - centre) / focal, indexing="xy")
    ray = torch.stack([x, y, torch.ones_like(x)])
    origin = torch.tensor([0.0, 0.0, float(cameras.radius[0])])[:, None, None]
    a, b, c = ray.square().sum(0), (ray * origin).sum(0), origin.square().sum() - radius**2
    root = b.square() - a * c
    alpha = (root > 0).float()
    depth = torch.where(root > 0, (b - root.clamp_min(0.0).sqrt()) / a, torch.zeros_like(a))
    normal = (ray * depth - origin) / radius * alpha
    count = len(cameras)
    world = torch.einsum("bij,jhw->bihw", cameras.c2w[:, :3, :3], normal)
    alpha, depth = (v.expand(count, 1, -1, -1) for v in (alpha, depth))
    return Render(rgb=alpha.expand(-1, 3, -1, -1).clone(), alpha=alpha, depth=depth, normal=world)


@pytest.mark.parametrize("names", [("sd", "a"), ("sd", "a", "b"), ("sdxl", "a"), ("sdxl", "a", "b")])
def test_sampling_reproduces_the_pipeline(files: Path, names: tuple[str, ...]) -> None:
    model, *parts = names
    scales = [0.8, 0.5][: len(parts)]
    prior = opened(
        files, *((f"{model}_{p}", "depth", s) for p, s in zip(parts, scales, strict=True)), name=model
    )
    pictures = [picture(prior.image_px, seed=i) for i in range(len(parts))]
    text, null = (prior.encode_text([words]) for words in (PROMPT, ""))
    told = [Told(text=words, control=torch.cat(pictures, 1)) for words in (null, text)]
    x = start = randn(1, *prior.shape)
    for now, then in itertools.pairwise(TIMES):
        t, s = (torch.full((1,), time) for time in (now, then))
        x = ddim_step(x, cfg(*prior.eps(x, t, *told), 4.0), prior.schedule, t, s)
    more = {"safety_checker": None} if model == "sd" else {"add_watermarker": False}
    nets = [ControlNetModel.from_pretrained(files / f"{model}_{part}") for part in parts]
    pipe = PIPELINES[model].from_pretrained(files / model, controlnet=nets, **more)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )

    def theirs(*scales: float) -> torch.Tensor:
        return pipe(
            PROMPT,
            image=pictures,
            num_inference_steps=4,
            guidance_scale=4.0,
            latents=start,
            output_type="latent",
            controlnet_conditioning_scale=list(scales),
        ).images

    torch.testing.assert_close(x, theirs(*scales), rtol=1e-5, atol=1e-4)
    assert (x - theirs(*[0.6] * len(parts))).abs().max() > 1e-2


def test_scale_zero_and_no_picture_are_the_bare_prior(files: Path) -> None:
    bare, prior = opened(files), opened(files, ("sd_a", "depth", 0.0), ("sd_b", "normal", 0.0))
    x, t, text = randn(2, *bare.shape), torch.tensor([0.3, 0.9]), bare.encode_text([PROMPT, "a blue car"])
    (plain,) = bare.eps(x, t, Told(text=text))
    control = torch.rand(2, 6, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(prior.eps(x, t, Told(text=text, control=control))[0], plain)
    strong = opened(files, ("sd_a", "depth", 1.0))
    assert torch.equal(strong.eps(x, t, Told(text=text))[0], plain)
    assert (strong.eps(x, t, Told(text=text, control=control[:, :3]))[0] - plain).abs().max() > 1e-2


def test_rows_together_are_rows_alone(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = opened(files, ("sd_a", "depth", 1.0))
    x, t, control = randn(2, *prior.shape), torch.tensor([0.3, 0.9]), picture(32).repeat(2, 1, 1, 1)
    control[1] = control[1].flip(-1)
    told = [Told(text=prior.encode_text([words] * 2), control=control) for words in (PROMPT, "")]
    monkeypatch.setenv("SDS3D_THREADS", "2")
    together = prior.eps(x, t, *told)
    for bundle, eps in zip(told, together, strict=True):
        torch.testing.assert_close(prior.eps(x, t, bundle)[0], eps, rtol=1e-4, atol=1e-5)
        one = replace(bundle, text=bundle.text[1:], control=control[1:])
        torch.testing.assert_close(prior.eps(x[1:], t[1:], one)[0], eps[1:], rtol=1e-4, atol=1e-5)


def test_pictures_are_resized_and_networks_stay_frozen(files: Path) -> None:
    prior = opened(files, ("sd_a", "depth", 1.0))
    x, t = randn(1, *prior.shape), torch.tensor([0.6])
    text, large = prior.encode_text([PROMPT]), picture(64).requires_grad_()
    (eps,) = prior.eps(x, t, Told(text=text, control=large))
    assert not eps.requires_grad
    (small,) = prior.eps(x, t, Told(text=text, control=picture(32)))
    assert (eps - small).abs().max() < 0.3 * (eps - prior.eps(x, t, Told(text=text))[0]).abs().max()
    check_student(prior)
    student = prior.student(rank=2, lr=1e-3, convolutions=False, stream=Stream(0, "student"))
    student.eps(x, t, Told(text=text, control=large))[0].square().sum().backward()
    assert large.grad is None
    networks = [control.network for control in prior.denoiser.further.controls]
    assert all(p.grad is None and not p.requires_grad for net in networks for p in net.parameters())


def test_half_precision_says_about_the_same(files: Path) -> None:
    controls = (ControlConfig(path=str(files / "sd_a"), kind="depth"),)
    half = open_prior(files / "sd", PriorConfig(dtype="bfloat16", controls=controls), CPU)
    exact = opened(files, ("sd_a", "depth", 1.0))
    x, t = randn(1, *exact.shape), torch.tensor([0.5])
    rough, fine = (
        p.eps(x, t, Told(text=p.encode_text([PROMPT]), control=picture(40)))[0] for p in (half, exact)
    )
    assert (rough - fine).norm() < 0.05 * fine.norm()


def test_depth_is_near_bright_over_the_object() -> None:
    cameras = cameras_at(0.0, 70.0, size_px=33)
    view = ball(cameras)
    shown = control_pictures(view, cameras, ["depth"])
    assert shown.shape == (2, 3, 33, 33)
    inside = view.alpha[:, 0] > 0
    assert shown[:, 0][~inside].abs().max() == 0.0
    torch.testing.assert_close(shown[:, 0, 16, 16], torch.ones(2))
    assert shown[:, 0][inside].min() == pytest.approx(0.0, abs=1e-6)
    middle = shown[0, 0, 16]
    assert (middle[16:][inside[0, 16, 16:]].diff() <= 0).all()
    near = 1.0 / view.depth[0, 0]
    low = near[inside[0]].min()
    expected = (near[16, 10] - low) / (near[16, 16] - low)
    torch.testing.assert_close(shown[0, 1, 16, 10], expected)


def test_depth_of_nothing_and_of_a_wall() -> None:
    cameras = cameras_at(0.0, 90.0)
    view = ball(cameras)
    empty = replace(view, alpha=0.0 * view.alpha, depth=0.0 * view.depth)
    assert control_pictures(empty, cameras, ["depth"]).abs().max() == 0.0
    wall = replace(view, alpha=torch.ones_like(view.alpha), depth=torch.full_like(view.depth, 2.0))
    assert torch.equal(control_pictures(wall, cameras, ["depth"]), torch.ones(2, 3, 32, 32))
    far = replace(view, depth=2.0 * view.depth)
    torch.testing.assert_close(
        control_pictures(far, cameras, ["depth"]), control_pictures(view, cameras, ["depth"])
    )


def test_normals_are_red_to_the_left_green_up_blue_to_the_camera() -> None:
    cameras = cameras_at(0.0, 135.0, size_px=33)
    view = ball(cameras)
    shown = control_pictures(view, cameras, ["normal"])
    torch.testing.assert_close(
        shown[0], shown[1], rtol=0, atol=1e-5
    )  # in the camera's frame, a ball is a ball
    torch.testing.assert_close(shown[0, :, 16, 16], torch.tensor([0.5, 0.5, 1.0]), rtol=0, atol=1e-5)
    assert torch.equal(shown[0, :, 0, 0], torch.tensor([0.5, 0.5, 1.0]))
    red, green, blue = shown[0]
    edge = int(view.alpha[0, 0, 16].argmax()) + 1
    assert red[16, edge] > 0.85
    assert red[16, 32 - edge] < 0.15
    assert green[edge, 16] > 0.85
    assert green[32 - edge, 16] < 0.15
    assert blue[16, edge] < 0.9
    length = (2.0 * shown[0][:, view.alpha[0, 0] > 0] - 1.0).norm(dim=0)
    torch.testing.assert_close(length, torch.ones_like(length), rtol=1e-5, atol=1e-4)


def test_light_is_the_scenes_own_or_refused() -> None:
    """Seven materials serve both kinds: three in grey, six in colour behind depth and normals."""
    cameras = cameras_at(0.0)
    view = ball(cameras)
    shown = known_materials(["depth", "dreammat", "light"])
    assert len(shown) == 7
    light = torch.rand(1, 21, 32, 32, generator=torch.Generator().manual_seed(0))
    lit = replace(view, light=light)
    grey = control_pictures(lit, cameras, ["dreammat", "light", "depth"])
    assert grey.shape == (1, 22 + 3 + 3, 32, 32)
    by_material = {material: light[:, 3 * i : 3 * i + 3] for i, material in enumerate(shown)}
    torch.testing.assert_close(grey[:, 22], by_material[0.0, 1.0].mean(1))
    torch.testing.assert_close(grey[:, 23], by_material[0.5, 0.5].mean(1))
    torch.testing.assert_close(grey[:, 24], by_material[1.0, 0.0].mean(1))
    assert torch.equal(grey[:, 0], grey[:, 25])
    assert torch.equal(grey[:, 1:4], control_pictures(view, cameras, ["normal"]))
    assert torch.equal(grey[:, 4:7], by_material[0.0, 0.0])
    assert torch.equal(grey[:, 19:22], by_material[1.0, 1.0])
    for dark in (view, replace(view, light=light[:, :6])):
        with pytest.raises(ConfigError, match="kind light needs the scene under a known light"):
            control_pictures(dark, cameras, ["light"])
    with pytest.raises(ConfigError, match="kind normal needs the scene's normals"):
        control_pictures(replace(view, normal=None), cameras, ["normal"])


class Recorded(SDS):
    """SDS that keeps what it was told."""

    seen: Condition | None = None

    def residual(self, x: torch.Tensor, draw: Any, cond: Condition) -> Any:
        self.seen = cond
        return super().residual(x, draw, cond)


def recording_guide(prior: NetworkPrior) -> tuple[Guide, Recorded]:
    """A guide with one rule that keeps what it was told."""
    rule = Recorded(SDS.Config(), prior)
    guide = Guide(
        prior=prior,
        terms=(Term(rule=rule),),
        bank=TextBank(prior, PROMPT, "", PromptingConfig(view_dependent=False)),
        time=UniformTime(UniformTime.Config()),
        noise=FreshNoise(FreshNoise.Config()),
        streams=Streams(0),
    )
    return guide, rule


@pytest.mark.parametrize("kind", ["light", "dreammat"])
def test_a_mesh_under_an_environment_tells_the_network_how_it_is_lit(files: Path, kind: ControlKind) -> None:
    """The same light for the picture and for the network: turned light, other pictures, other answers."""
    prior = opened(files, (f"sd_{kind}", kind, 1.0))
    guide, rule = recording_guide(prior)
    config = ShadingConfig(lit=Ramp.constant(1.0), textureless_frac=0.0, light="environment")
    law = ShadingLaw(config, known_materials=known_materials([kind]))
    scene = MeshScene.waiting(MeshScene.Config(), Stream(0, "control"))
    cameras = cameras_at(0.0, 90.0)
    shading = law.sample(Moment(0, 10), cameras, Stream(0, "shading"))
    told, answers = [], []
    x, t = randn(2, *prior.shape), torch.tensor([0.5, 0.5])
    for turn in (0.0, 0.0, 140.0):
        assert shading.turn_deg is not None
        turned = replace(shading, turn_deg=shading.turn_deg + turn)
        view = scene.render(cameras, turned, Stream(0, "render"))
        guide(view, cameras, turned, Moment(0, 10), Moment(0, 10)).loss.backward()
        assert rule.seen is not None
        assert rule.seen.control is not None
        told.append(rule.seen.control)
        answers.append(prior.eps(x, t, Told(text=rule.seen.text, control=told[-1]))[0])
    assert told[0].shape[1] == CHANNELS[kind]
    assert torch.equal(told[0], told[1])
    assert (told[2] - told[0]).abs().max() > 0.05
    assert (answers[2] - answers[0]).abs().max() > 1e-4
    assert scene.texture.encoding.table.grad is not None
    assert not told[0].requires_grad


@pytest.mark.parametrize("normals", [True, False])
def test_the_guide_shows_the_scenes_geometry_without_gradient(files: Path, normals: bool) -> None:
    prior = opened(files, ("sd_a", "normal", 1.0), ("sd_b", "depth", 1.0))
    guide, rule = recording_guide(prior)
    cameras = cameras_at(0.0, 90.0)
    whole = ball(cameras)
    view = replace(whole, normal=whole.normal if normals else None)
    leaves = [v.clone().requires_grad_() for v in (view.rgb, view.alpha, view.depth)]
    view = replace(view, rgb=leaves[0], alpha=leaves[1], depth=leaves[2])
    guide(view, cameras, Shading(), Moment(0, 10), Moment(0, 10)).loss.backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is None
    assert leaves[2].grad is None
    assert rule.seen is not None
    assert rule.seen.control is not None
    expected = control_pictures(whole, cameras, ["normal", "depth"])
    assert not rule.seen.control.requires_grad
    assert torch.equal(rule.seen.as_null().control, rule.seen.control)
    torch.testing.assert_close(rule.seen.control[:, 3:], expected[:, 3:])
    # Normals from the depth of a coarse image are near those of the ball, but at its rim.
    away = (rule.seen.control[:, :3] - expected[:, :3]).abs().mean(1)
    assert away[whole.alpha[:, 0] > 0].median() < 0.02
    assert away[whole.alpha[:, 0] == 0].max() == 0.0


def test_what_does_not_fit_is_refused(files: Path, tmp_path: Path) -> None:
    for name, kind, match in (
        ("nowhere", "depth", r"controls\[0\]\.path: no config\.json in .*nowhere"),
        ("sdxl_a", "depth", r"controls\[0\]\.path: .*made for another UNet \(cross_attention_dim: got 40"),
        ("sd_six", "depth", "reads pictures of 6 channels, kind depth has 3"),
        ("sd_light", "dreammat", "reads pictures of 3 channels, kind dreammat has 22"),
        ("sd", "depth", r"no config\.json"),
    ):
        with pytest.raises(PriorError, match=match):
            opened(files, (name, kind, 1.0))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((files / "sd_a" / "config.json").read_text())
    with pytest.raises(PriorError, match="cannot be loaded as a ControlNetModel"):
        opened(files, (str(broken), "depth", 1.0))
    light = opened(files, ("sd_light", "light", 1.0), ("sd_a", "depth", 1.0))
    with pytest.raises(
        PriorError, match=r"pictures of 3 channels in all, the control networks expect 3 \+ 3"
    ):
        light.eps(
            randn(1, *light.shape),
            torch.tensor([0.5]),
            Told(text=light.encode_text([""]), control=picture(32)),
        )


def test_families_that_cannot_say_so_before_loading(files: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtSigmaPipeline"}')
    controls = (ControlConfig(path=str(files / "sd_a"), kind="depth"),)
    for settings in ({"controls": controls}, {"textual_inversions": ("a.safetensors",)}):
        config = replace(FLOAT32, name=str(tmp_path), **settings)
        with pytest.raises(PriorError, match=rf"prior\.{next(iter(settings))}: .*PixArt.* cannot be given"):
            load_prior(config, CPU)
