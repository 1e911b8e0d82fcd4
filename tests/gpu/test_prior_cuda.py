"""Priors and whole steps on a GPU: the CPU's numbers, no waiting for the device, memory, and the speed bars.

The bars take real architectures with random weights; they are `slow` and need about 20 GB.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sds3d.cameras.light import ShadingLaw
from sds3d.cameras.sample import CameraLaw
from sds3d.config.load import override_layers
from sds3d.interfaces import Told
from sds3d.job import load_job
from sds3d.optim import Optimizer
from sds3d.optimize import Loop, Parts, PenaltyConfig, build_guide
from sds3d.priors import PriorConfig
from sds3d.priors.blank import blank_prior
from sds3d.priors.network import NetworkPrior
from sds3d.priors.notices import notices
from sds3d.rng import Stream
from tests.toys import CanvasScene

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STREAM = Stream(11, "prior-cuda")
CUDA = torch.device("cuda")
STEP = Path(__file__).parents[2] / "benchmarks" / "step.py"


def twins(name: str, **settings: Any) -> tuple[NetworkPrior, NetworkPrior]:
    """The same toy model on the CPU in float32, and on the GPU."""
    cpu = blank_prior(name, PriorConfig(dtype="float32"), torch.device("cpu"), toy=True)
    cuda = blank_prior(name, replace(PriorConfig(dtype="float32"), **settings), CUDA, toy=True)
    copy(cpu.denoiser.module, cuda.denoiser.module)
    if not cpu.is_pixel:
        copy(cpu.codec.vae, cuda.codec.vae)
    return cpu, cuda


def copy(source: torch.nn.Module, target: torch.nn.Module) -> None:
    target.load_state_dict(source.state_dict())


@pytest.fixture
def exact() -> Iterator[None]:
    """Without TensorFloat-32, whose ten bits are a setting of the device, not of the model."""
    matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv


def eps_of(prior: NetworkPrior) -> torch.Tensor:
    x = STREAM.fork("x").normal(3, *prior.shape).to(prior.device)
    t = torch.tensor([0.1, 0.5, 0.95], device=prior.device)
    text = prior.encode_text(["a red mug", "a blue car", ""])
    return torch.cat(prior.eps(x, t, Told(text=text), Told(text=text.flip(0)))).cpu()


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "pixel"])
def test_eps_on_cuda_equals_the_cpu(name: str, exact: None) -> None:
    cpu, cuda = twins(name)
    torch.testing.assert_close(eps_of(cuda), eps_of(cpu), rtol=1e-3, atol=1e-3)


def test_encode_and_its_gradient_on_cuda_equal_the_cpu(exact: None) -> None:
    found = []
    cpu, cuda = twins("sd21", vae_dtype="float32", vae_slice=2, vae_checkpointing="on")
    for prior in (cpu, cuda):
        rgb = STREAM.fork("rgb").uniform(3, 3, 96, 96).to(prior.device).requires_grad_()
        x = prior.encode(rgb)
        x.square().sum().backward()
        found.append((x.detach().cpu(), rgb.grad.cpu()))
    for ours, wanted in zip(found[1], found[0], strict=True):
        assert (ours - wanted).norm() / wanted.norm() < 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_on_cuda_is_near_float32(dtype: str) -> None:
    cpu, cuda = twins("sd15")
    cuda.denoiser.module.to(getattr(torch, dtype))
    cuda.dtype = getattr(torch, dtype)
    wanted = eps_of(cpu)
    assert (eps_of(cuda) - wanted).norm() / wanted.norm() < 0.05


def test_auto_on_cuda_is_half_for_network_and_autoencoder() -> None:
    prior = blank_prior("sd21", PriorConfig(), CUDA, toy=True)
    assert prior.dtype in (torch.bfloat16, torch.float16)
    assert prior.codec.vae.dtype == prior.dtype
    assert torch.isfinite(prior.encode(torch.rand(2, 3, 64, 64, device=CUDA))).all()


@pytest.mark.parametrize("mode", ["default", "cudagraphs"])
@pytest.mark.filterwarnings("ignore")
def test_the_compiled_network_says_the_same(mode: str, exact: None) -> None:
    plain, fast = twins("sd15", compile=mode)
    wanted = eps_of(plain)
    for _ in range(3):  # the third call replays a graph
        found = eps_of(fast)
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)
    first, second = eps_of(fast), eps_of(fast)
    torch.testing.assert_close(first, second)  # a replay does not write into what was given out
    assert notices(fast) == []


def canvas_loop(monkeypatch: pytest.MonkeyPatch, *settings: str, scene: Any = None) -> Loop:
    layers = override_layers(["prompt=a red mug", "steps=40", "guidance.clip_x0=false", *settings])
    job = load_job("toybox/sds", layers).config
    prior = blank_prior("sd21", job.prior, CUDA, toy=True)
    monkeypatch.setattr("sds3d.priors.load_prior", lambda config, device: prior)
    guide = build_guide(job, CUDA)
    scene = (scene or CanvasScene(64)).to(CUDA)
    parts = Parts(
        scene=scene,
        guide=guide,
        camera=CameraLaw(job.camera),
        shading=ShadingLaw(job.shading),
        optimizer=Optimizer(scene.groups(), job.optimizer),
        penalties=PenaltyConfig(),
        streams=guide.streams,
    )
    return Loop(parts, job.steps, log_every=100)


@contextmanager
def waits(mode: str) -> Iterator[None]:
    """What torch does where the host would wait for the device: "error" or "default" (nothing)."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("prompting.perp_neg=true",),
        ("optimizer.max_grad_norm=1",),
        ("prior.vae_slice=1", "prior.vae_checkpointing=on"),
    ],
)
def test_a_step_never_waits(settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    loop = canvas_loop(monkeypatch, *settings)
    loop.run(3, lambda event: None)  # builds the optimiser's state, tunes convolutions
    with waits("error"):
        loop.run(8, lambda event: None)


def test_a_step_on_gaussians_waits_only_in_the_rasterizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """gsplat reads the number of tile hits back to allocate them: one wait per render, and it is in its hands."""
    from sds3d.ops import splat_cuda
    from sds3d.scenes.gaussians import GaussianScene

    scene = GaussianScene(GaussianScene.Config(adapt_every_steps=1000), STREAM)
    loop = canvas_loop(monkeypatch, "scene=gaussians", scene=scene)
    draw = splat_cuda._call

    def let(*args: Any) -> Any:
        with waits("default"):
            return draw(*args)

    monkeypatch.setattr(splat_cuda, "_call", let)
    loop.run(3, lambda event: None)
    with waits("error"):
        loop.run(8, lambda event: None)


def peak_of(call: Any) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_checkpoints_and_slices_lower_the_peak_of_encoding() -> None:
    peaks = []
    for how in ({"vae_checkpointing": "off"}, {"vae_checkpointing": "on", "vae_slice": 1}):
        prior = blank_prior("sd21", PriorConfig(image_px=256, **how), CUDA, toy=True)
        rgb = torch.rand(4, 3, 256, 256, device=CUDA, requires_grad=True)
        peaks.append(peak_of(lambda p=prior, image=rgb: p.encode(image).sum().backward()))
    assert peaks[1] < 0.5 * peaks[0]


def test_the_prior_keeps_nothing_for_the_backward_pass() -> None:
    prior = blank_prior("sd15", PriorConfig(), CUDA, toy=True)
    x, t = STREAM.normal(4, *prior.shape).to(CUDA), torch.full((4,), 0.5, device=CUDA)
    told = Told(text=prior.encode_text(["a"] * 4))
    before = torch.cuda.memory_allocated()
    eps = prior.eps(x, t, told, told)
    torch.cuda.synchronize()
    answers = sum(e.untyped_storage().nbytes() for e in eps)
    assert torch.cuda.memory_allocated() - before <= answers + 4 * 2**20


def bench(tmp_path: Path, *words: str) -> dict[str, Any]:
    out = tmp_path / "step.json"
    command = [sys.executable, str(STEP), "--random-weights", "--json", str(out), *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text(encoding="utf-8"))


SD21 = ("--prior", "sd21", "--render", "512", "--batch", "4", "--scene", "gaussians")
FOUR = "guidance.target_steps=4"


@pytest.mark.slow
class TestBars:
    """The bars for one H200-class GPU; on smaller ones the times fail, the ratios need not.

    Ratios are those of the default guidance (four predictions per step): with one, the encoder's operations alone are
    1.4 times the network's, see docs/speed.md.
    """

    def test_full_autoencoder(self, tmp_path: Path) -> None:
        assert bench(tmp_path, *SD21, "--steps", "60", FOUR)["ratio"] <= 1.6

    def test_tiny_autoencoder(self, tmp_path: Path) -> None:
        assert bench(tmp_path, *SD21, "--steps", "60", FOUR, "prior.vae=tiny")["ratio"] <= 1.15

    def test_pixels(self, tmp_path: Path) -> None:
        words = (
            "--prior",
            "pixel",
            "--render",
            "64",
            "--batch",
            "4",
            "--scene",
            "gaussians",
            "--steps",
            "60",
        )
        assert bench(tmp_path, *words)["ratio"] <= 1.15

    def test_1200_steps(self, tmp_path: Path) -> None:
        found = bench(tmp_path, *SD21, "--steps", "1200")
        assert 1200 * found["seconds_per_step"] <= 90

    def test_sdxl_fits_in_24_gb(self, tmp_path: Path) -> None:
        words = (
            "--prior",
            "sdxl",
            "--render",
            "1024",
            "--batch",
            "4",
            "--scene",
            "gaussians",
            "--steps",
            "12",
        )
        found = bench(tmp_path, *words, "prior.vae_slice=1", "prior.vae_checkpointing=on")
        assert found["peak_gib"] * 2**30 <= 24e9
