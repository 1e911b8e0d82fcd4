"""The diffusers-folder prior on small random models: loading, conversions, conditions, messages."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from sds3d.cameras.orbit import turntable_cameras
from sds3d.errors import PriorError
from sds3d.guidance import SDS
from sds3d.interfaces import Draw, Told
from sds3d.mathx.ode import ddim_step
from sds3d.mathx.predict import eps_from_v, eps_from_x0
from sds3d.priors import PriorConfig, known_priors, load_prior, open_prior
from sds3d.priors.camera_condition import condition_vector, with_coordinates
from sds3d.priors.network import NetworkPrior
from sds3d.rng import Stream
from sds3d.toybox.captions import VOCABULARY
from sds3d.toybox.model import build_model, save_model

CPU = torch.device("cpu")
FLOAT32 = PriorConfig(dtype="float32")


def reseed() -> None:
    torch.manual_seed(0)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def toybox_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder with the shipped architecture and random weights (output layer not zero)."""
    reseed()
    folder = tmp_path_factory.mktemp("prior") / "toybox"
    save_model(build_model(VOCABULARY), folder, torch.float32)
    return folder


@pytest.fixture(scope="module")
def prior(toybox_folder: Path) -> NetworkPrior:
    return open_prior(toybox_folder, FLOAT32, CPU)


@pytest.fixture(scope="module")
def latent_folder(toybox_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable-Diffusion-shaped folder: VAE, 4 latent channels, eps output, no sds3d file."""
    reseed()
    folder = tmp_path_factory.mktemp("prior") / "latent"
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )
    for name in ("tokenizer", "text_encoder"):
        (folder / name).symlink_to(toybox_folder / name)
    (folder / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    return folder


def test_encode_and_decode_are_inverse_and_differentiable(prior: NetworkPrior) -> None:
    rgb = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = prior.encode(rgb)
    assert x.shape[1:] == prior.shape
    torch.testing.assert_close(prior.decode(x), rgb.detach(), rtol=0, atol=1e-6)
    x.sum().backward()
    torch.testing.assert_close(rgb.grad, torch.full_like(rgb, 2.0))


def test_encode_resizes(prior: NetworkPrior) -> None:
    gray = torch.full((1, 3, 32, 32), 0.25)
    torch.testing.assert_close(prior.decode(prior.encode(gray)), torch.full((1, 3, 64, 64), 0.25))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_eps_converts_each_network_output(prior: NetworkPrior, prediction: str) -> None:
    x, t = randn(2, *prior.shape), torch.tensor([0.3, 0.9])
    text = prior.encode_text(["a red mug", "a blue car"])
    raw = prior.denoiser.module(
        with_coordinates(x), prior.schedule.index(t), text, class_labels=torch.zeros(2, 10), return_dict=False
    )[0]
    a, s = prior.schedule.alpha(t), prior.schedule.sigma(t)
    expected = {"epsilon": raw, "v_prediction": eps_from_v(x, raw, a, s), "sample": eps_from_x0(x, raw, a, s)}
    original, prior.prediction = prior.prediction, prediction
    try:
        (eps,) = prior.eps(x, t, Told(text=text))
    finally:
        prior.prediction = original
    torch.testing.assert_close(eps, expected[prediction].detach(), rtol=1e-4, atol=1e-4)


def test_bundles_in_one_call_equal_single_calls(prior: NetworkPrior, monkeypatch: pytest.MonkeyPatch) -> None:
    x, t = randn(3, *prior.shape), torch.tensor([0.3, 0.6, 0.9])
    text = prior.encode_text(["a red mug", "a blue car", "a green tree"])
    cameras = turntable_cameras(3, 64)
    bundles = [
        Told(text=text, cameras=cameras, background=torch.rand(3, 3)),
        Told(text=text.flip(0)),
        Told(text=text, background=torch.ones(3, 3)),
    ]
    monkeypatch.setenv("SDS3D_THREADS", "2")
    together = prior.eps(x, t, *bundles)
    monkeypatch.setenv("SDS3D_THREADS", "1")
    for bundle, eps in zip(bundles, together, strict=True):
        torch.testing.assert_close(prior.eps(x, t, bundle)[0], eps, rtol=1e-4, atol=1e-4)


def test_camera_and_background_reach_the_network(prior: NetworkPrior) -> None:
    x, t = randn(1, *prior.shape), torch.tensor([0.5])
    text = prior.encode_text(["a red mug"])
    front = turntable_cameras(1, 64)
    none, seen, ground = prior.eps(
        x,
        t,
        Told(text=text),
        Told(text=text, cameras=front),
        Told(text=text, background=torch.zeros(1, 3)),
    )
    assert (none - seen).abs().max() > 1e-4
    assert (none - ground).abs().max() > 1e-4


def test_coordinates_grow_to_the_right_and_downwards() -> None:
    x = with_coordinates(torch.zeros(1, 48, 4, 6))
    assert x.shape == (1, 50, 4, 6)
    assert (x[0, 48].diff(dim=1) > 0).all()
    assert (x[0, 49].diff(dim=0) > 0).all()
    assert x[0, 48, 0, 0] == -x[0, 48, 0, -1]


def test_condition_vector_layout() -> None:
    one, zero = torch.ones(1), torch.zeros(1)
    vector = condition_vector(
        torch.tensor([90.0]),
        torch.tensor([30.0]),
        torch.tensor([3.5]),
        torch.tensor([[1.0, 0.5, 0.0]]),
        one,
        one,
    )
    expected = torch.tensor([[1.0, 0.0, 0.5, 0.75**0.5, 1.0, 1.0, 1.0, 0.0, -1.0, 1.0]])
    torch.testing.assert_close(vector, expected, rtol=0, atol=1e-6)
    hidden = condition_vector(one, one, one, torch.ones(1, 3), zero, zero)
    assert hidden.abs().max() == 0.0


def test_no_gradient_reaches_prior_parameters(prior: NetworkPrior) -> None:
    rule = SDS(SDS.Config(), prior)
    x = randn(1, *prior.shape)
    text, null = (prior.encode_text([p]) for p in ("a red mug", ""))
    from sds3d.interfaces import Condition

    draw = Draw(
        t=torch.tensor([0.5]),
        noise=randn(1, *prior.shape, seed=1),
        schedule=prior.schedule,
        stream=Stream(0, "x"),
    )
    residual = rule.residual(x, draw, Condition(text=text, null=null))
    assert not residual.grad.requires_grad
    assert all(p.grad is None and not p.requires_grad for p in prior.denoiser.module.parameters())


def test_latent_model_loads_through_the_same_path(latent_folder: Path) -> None:
    latent = open_prior(latent_folder, FLOAT32, CPU)
    assert latent.shape == (4, 8, 8)
    assert latent.image_px == 16
    assert not latent.takes_camera
    rgb = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = latent.encode(rgb)
    assert x.shape == (1, 4, 8, 8)
    x.square().sum().backward()
    assert rgb.grad.abs().sum() > 0
    assert latent.decode(x.detach()).shape == (1, 3, 16, 16)


def test_sampling_agrees_with_the_diffusers_scheduler(latent_folder: Path) -> None:
    """Our eps and DDIM step reproduce diffusers' own loop with guidance on the same network."""
    latent = open_prior(latent_folder, FLOAT32, CPU)
    scheduler = DDIMScheduler.from_config(
        DDIMScheduler.load_config(latent_folder / "scheduler"),
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    scheduler.set_timesteps(5)
    text, null = (latent.encode_text([p]) for p in ("a red mug", ""))
    ours = theirs = randn(1, *latent.shape, seed=3)
    for index in scheduler.timesteps.tolist():
        t = torch.tensor([(index + 1) / 1000])
        eps_null, eps_text = latent.eps(ours, t, Told(text=null), Told(text=text))
        ours = ddim_step(ours, eps_null + 4.0 * (eps_text - eps_null), latent.schedule, t, t - 0.2)
        with torch.no_grad():
            both = latent.denoiser.module(
                theirs.repeat(2, 1, 1, 1), index, torch.cat([null, text])
            ).sample.chunk(2)
        theirs = scheduler.step(both[0] + 4.0 * (both[1] - both[0]), index, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_unknown_words_are_named_with_their_neighbours(prior: NetworkPrior) -> None:
    messages = prior.warnings(["a crimson mgu on a zeppelin"])
    assert len(messages) == 2
    assert "'mgu'" in messages[0]
    assert "mug" in messages[0]
    assert prior.warnings(["A red mug, front view!"]) == []
    (typo,) = prior.warnings(["a red teapott"])
    assert "teapot" in typo.split("closest known words")[1]


def test_missing_and_damaged_folders_are_explained(toybox_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PriorError, match=r"toybox.*no such folder"):
        load_prior(PriorConfig(name="toybxo"), CPU)
    with pytest.raises(PriorError, match=r"no model_index\.json"):
        open_prior(tmp_path, FLOAT32, CPU)
    broken = tmp_path / "broken"
    broken.mkdir()
    for part in toybox_folder.iterdir():
        (broken / part.name).symlink_to(part)
    (broken / "unet").unlink()
    with pytest.raises(PriorError, match="no unet/"):
        open_prior(broken, FLOAT32, CPU)
    (broken / "unet").mkdir()
    (broken / "unet" / "config.json").write_text((toybox_folder / "unet" / "config.json").read_text())
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"short")
    with pytest.raises(PriorError, match="cannot be loaded"):
        open_prior(broken, FLOAT32, CPU)


def test_a_foreign_tokenizer_is_noticed(toybox_folder: Path, tmp_path: Path) -> None:
    from sds3d.toybox.model import build_tokenizer

    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for part in toybox_folder.iterdir():
        if part.name != "tokenizer":
            (mixed / part.name).symlink_to(part)
    build_tokenizer(("one", "word")).save_pretrained(mixed / "tokenizer")
    with pytest.raises(PriorError, match="tokenizer has 6 words"):
        open_prior(mixed, FLOAT32, CPU)


def test_the_table_of_priors_names_the_shipped_one() -> None:
    assert "toybox" in known_priors()
