"""Precision, slices, the tiny encoder, compilation: what makes a full-size prior fast must not change what it says."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from sds3d.errors import PriorError
from sds3d.interfaces import Told
from sds3d.mathx.predict import eps_from_v
from sds3d.priors import PriorConfig
from sds3d.priors.blank import ARCHITECTURES, blank_prior, shrunk
from sds3d.priors.codec import VaeCodec
from sds3d.priors.flow_view import FlowView
from sds3d.priors.network import NetworkPrior, Rows
from sds3d.priors.notices import notices
from sds3d.priors.speed import CompiledDenoiser, legacy_attention, pick_dtype, supports
from sds3d.priors.vae_path import TinyEncoder, VaePath, encode_error, load_tiny, probe_images
from sds3d.rng import Stream

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FLOAT32 = PriorConfig(dtype="float32")
STREAM = Stream(5, "speed")


def toy(name: str = "sd21", **settings) -> NetworkPrior:
    return blank_prior(name, replace(FLOAT32, **settings), CPU, toy=True)


@pytest.fixture(scope="module")
def plain() -> NetworkPrior:
    return toy()


def rgb_of(count: int, px: int = 64) -> torch.Tensor:
    return STREAM.fork("rgb").uniform(count, 3, px, px)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Pretends that there is a CUDA device of some generation."""

    def pretend(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Testla")

    return pretend


class TestPrecision:
    def test_auto_is_bfloat16_where_the_device_has_it(self, gpu: Callable[[int, int], None]) -> None:
        assert pick_dtype("auto", CPU) == (torch.bfloat16, [])
        gpu(9, 0)
        assert pick_dtype("auto", CUDA) == (torch.bfloat16, [])
        gpu(7, 5)
        dtype, (told,) = pick_dtype("auto", CUDA)
        assert dtype == torch.float16
        assert "Testla has no bfloat16" in told

    def test_a_precision_that_the_device_lacks_is_refused(self, gpu: Callable[[int, int], None]) -> None:
        gpu(7, 5)
        with pytest.raises(
            PriorError, match=r"bfloat16, which Testla cannot compute in; use auto or float16"
        ):
            pick_dtype("bfloat16", CUDA)
        gpu(5, 0)
        assert pick_dtype("auto", CUDA)[0] == torch.float32
        with pytest.raises(PriorError, match=r"float16, which Testla.*float32"):
            pick_dtype("float16", CUDA)

    def test_a_cpu_without_half_convolutions_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*args: object, **options: object) -> None:
            raise RuntimeError("not implemented for 'Half'")

        monkeypatch.setattr(torch.nn.functional, "conv2d", broken)
        assert not supports(torch.float16, CPU)
        with pytest.raises(PriorError, match="this CPU cannot compute"):
            pick_dtype("float16", CPU)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_the_schedule_is_applied_in_float32(self, dtype: str) -> None:
        prior = toy(dtype=dtype)
        x, t = STREAM.normal(1, *prior.shape), torch.tensor([0.3])
        text = prior.encode_text(["a red mug"])
        (eps,) = prior.eps(x, t, Told(text=text))
        assert eps.dtype == torch.float32
        raw = prior.denoiser(Rows(x=x.to(prior.dtype), t=t, text=text.to(prior.dtype))).float()
        expected = eps_from_v(x, raw, prior.schedule.alpha(t), prior.schedule.sigma(t))
        torch.testing.assert_close(eps, expected, rtol=0, atol=1e-6)
        rounded = eps.to(prior.dtype).float()
        assert (rounded - eps).abs().max() > 0  # the algebra's own digits are there


class TestEncoder:
    @pytest.mark.parametrize("slice_images", [1, 2, None])
    @pytest.mark.parametrize("checkpointing", ["on", "off"])
    def test_slices_and_checkpoints_change_nothing(
        self, plain: NetworkPrior, slice_images: int | None, checkpointing: str
    ) -> None:
        codec = plain.codec
        path = VaePath(codec.inner, codec.vae, slice_images=slice_images, checkpointing=checkpointing)
        found = []
        for encode in (codec.inner.encode, path.encode):
            image = (2 * rgb_of(3) - 1).requires_grad_()
            x = encode(image)
            x.square().sum().backward()
            found.append((x.detach(), image.grad))
        for ours, wanted in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)

    def test_checkpoints_keep_less_for_the_backward_pass(self, plain: NetworkPrior) -> None:
        kept = {}
        for mode in ("off", "on"):
            path = VaePath(plain.codec.inner, plain.codec.vae, slice_images=1, checkpointing=mode)
            numbers: list[int] = []

            def keep(tensor: torch.Tensor, numbers: list[int] = numbers) -> torch.Tensor:
                numbers.append(tensor.numel())
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                path.encode(rgb_of(2).requires_grad_())
            kept[mode] = sum(numbers)
        assert kept["on"] < 0.1 * kept["off"]

    def test_what_fits_decides_where_nothing_is_said(
        self, plain: NetworkPrior, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = VaePath(plain.codec.inner, plain.codec.vae, slice_images=None, checkpointing="auto")
        image = rgb_of(4)
        assert path.plan(image) == (4, False)
        one = 24 * 8 * 64 * 64 * 4  # 24 numbers per pixel and first channel
        monkeypatch.setattr("sds3d.priors.vae_path.device_memory", lambda device: 8 * one)
        assert path.plan(image) == (1, True)
        monkeypatch.setattr("sds3d.priors.vae_path.device_memory", lambda device: 16 * one)
        assert path.plan(image) == (2, False)

    def test_the_prior_is_not_in_the_graph_and_the_encoder_is(self, plain: NetworkPrior) -> None:
        rgb = rgb_of(1).requires_grad_()
        x = plain.encode(rgb)
        (eps,) = plain.eps(x, torch.tensor([0.5]), Told(text=plain.encode_text(["a"])))
        assert not eps.requires_grad
        x.sum().backward()
        assert rgb.grad.abs().sum() > 0
        assert all(p.grad is None for p in plain.codec.vae.parameters())

    def test_half_precision_that_overflows_goes_on_in_float32(self) -> None:
        prior = toy(vae_dtype="float16")
        assert notices(prior) == []
        assert prior.codec.vae.dtype == torch.float16
        prior.codec.vae.encoder.conv_in.weight.mul_(
            1e6
        )  # an image now overflows, as in the autoencoder of SDXL
        assert not torch.isfinite(prior.encode(rgb_of(2))).all()
        (told,) = notices(FlowView(prior))
        assert "not finite in float16: it runs in float32" in told
        assert prior.codec.vae.dtype == torch.float32
        prior.codec.vae.encoder.conv_in.weight.fill_(0.1)
        assert torch.isfinite(prior.encode(rgb_of(2))).all()
        assert notices(prior) == []

    def test_overflow_is_found_at_load(self, monkeypatch: pytest.MonkeyPatch) -> None:
        encode = AutoencoderKL.encode

        def overflowing(self: AutoencoderKL, x: torch.Tensor) -> object:
            said = encode(self, x)
            said.latent_dist.mean = said.latent_dist.mean * (1e9 if x.dtype == torch.float16 else 1.0)
            return said

        monkeypatch.setattr(AutoencoderKL, "encode", overflowing)
        prior = toy(vae_dtype="float16")
        assert prior.codec.vae.dtype == torch.float32
        assert any("runs in float32" in told for told in notices(prior))


class TestTinyEncoder:
    def test_its_error_is_measured_and_told(self) -> None:
        prior = toy(vae="tiny")
        (told,) = notices(prior)
        tiny, full = prior.codec.inner, prior.codec.inner.full
        images = 2 * probe_images(64, CPU) - 1
        a, b = tiny.encode(images), full.encode(images)
        error = float((a - b).norm() / b.norm())
        assert f"{error:.1%}" in told
        assert encode_error(full, full, 64, CPU) == 0.0

    def test_it_encodes_and_the_full_one_decodes(self) -> None:
        prior = toy(vae="tiny")
        tiny = prior.codec.inner
        assert isinstance(tiny, TinyEncoder)
        rgb = rgb_of(2).requires_grad_()
        x = prior.encode(rgb)
        assert x.shape[1:] == prior.shape
        torch.testing.assert_close(x, tiny.tiny.encode(2 * rgb - 1).latents)
        x.sum().backward()
        assert rgb.grad.abs().sum() > 0
        z = x.detach()
        torch.testing.assert_close(prior.decode(z), (tiny.full.decode(z) + 1) / 2)

    def test_a_folder_is_loaded_and_a_wrong_one_explained(self, tmp_path: Path, plain: NetworkPrior) -> None:
        torch.manual_seed(0)
        few = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
        AutoencoderTiny(**few).save_pretrained(tmp_path / "good")
        AutoencoderTiny(**few, latent_channels=16).save_pretrained(tmp_path / "wide")
        assert isinstance(toy(vae=str(tmp_path / "good")).codec.inner.tiny, AutoencoderTiny)
        with pytest.raises(PriorError, match=r"latents of \(16, 8, 8\), this prior denoises \(4, 8, 8\)"):
            toy(vae=str(tmp_path / "wide"))
        with pytest.raises(PriorError, match="expected full, tiny or the folder"):
            toy(vae="tinny")
        (tmp_path / "empty").mkdir()
        with pytest.raises(PriorError, match="cannot be loaded as an AutoencoderTiny"):
            toy(vae=str(tmp_path / "empty"))
        with pytest.raises(PriorError, match="no vae_tiny/"):
            load_tiny("tiny", None)
        with pytest.raises(PriorError, match="sees pixels"):
            toy("pixel", vae="tiny")


@dataclass(frozen=True, kw_only=True)
class ModuleOnX:
    """A denoiser that hears nothing but x."""

    module: nn.Module

    def __call__(self, rows: Rows) -> torch.Tensor:
        return self.module(rows.x)


class TestCompiling:
    def failing(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> NetworkPrior:
        def compiled(module: nn.Module, **options: object) -> nn.Module:
            assert options["dynamic"] is False

            class Broken(nn.Module):
                def forward(self, *args: object, **options: object) -> None:
                    raise error

            return Broken()

        monkeypatch.setattr(torch, "compile", compiled)
        return toy(compile="default")

    def test_a_failure_is_told_once_and_the_plain_network_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        prior = self.failing(monkeypatch, RuntimeError("no C++ compiler\nlong log"))
        x, t = STREAM.normal(1, *prior.shape), torch.tensor([0.5])
        told = Told(text=prior.encode_text(["a"]))
        first, second = prior.eps(x, t, told)[0], prior.eps(x, t, told)[0]
        torch.testing.assert_close(first, second)
        (message,) = notices(prior)
        assert message.endswith("runs uncompiled (RuntimeError: no C++ compiler)")

    def test_running_out_of_memory_is_no_failure_to_compile(self, monkeypatch: pytest.MonkeyPatch) -> None:
        prior = self.failing(monkeypatch, torch.OutOfMemoryError("full"))
        with pytest.raises(torch.OutOfMemoryError):
            prior.eps(STREAM.normal(1, *prior.shape), torch.ones(1), Told(text=prior.encode_text(["a"])))
        assert notices(prior) == []

    def test_students_are_never_compiled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        prior = self.failing(monkeypatch, RuntimeError("must not be asked"))
        assert isinstance(prior.fast, CompiledDenoiser)
        student = prior.student(rank=2, lr=1e-3, convolutions=False, stream=STREAM)
        x, t = STREAM.normal(1, *prior.shape), torch.tensor([0.5])
        student.eps(x, t, Told(text=prior.encode_text(["a"])))
        assert notices(prior) == []

    @pytest.mark.slow
    def test_the_compiled_network_says_the_same(self) -> None:
        told: list[str] = []
        torch.manual_seed(0)
        layers = [nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 3, padding=1)]
        plain = ModuleOnX(module=nn.Sequential(*layers).eval())
        fast = CompiledDenoiser(plain, "default", told.append)
        rows = Rows(x=STREAM.normal(2, 4, 8, 8), t=torch.tensor([0.3, 0.8]), text=torch.zeros(2, 1, 1))
        with torch.no_grad():
            torch.testing.assert_close(fast(rows), plain(rows), rtol=1e-4, atol=1e-5)
        assert told == []
        assert fast.module is plain.module


class TestArchitectures:
    @pytest.mark.parametrize(("name", "millions"), [("sd15", 859.5), ("sd21", 865.9), ("sdxl", 2567.5)])
    def test_parameter_counts_are_the_published_ones(self, name: str, millions: float) -> None:
        from diffusers import UNet2DConditionModel

        with torch.device("meta"):
            unet = UNet2DConditionModel(**ARCHITECTURES[name].unet)
            vae = AutoencoderKL(**ARCHITECTURES[name].vae)
        assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
        assert sum(p.numel() for p in vae.parameters()) / 1e6 == pytest.approx(83.65, abs=0.01)

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_toys_answer_and_attend_through_sdpa(self, name: str) -> None:
        prior = toy(name)
        assert legacy_attention(prior.denoiser.module) == []
        x = STREAM.normal(2, *prior.shape)
        eps = prior.eps(x, torch.tensor([0.2, 0.9]), *[Told(text=prior.encode_text(["a", "b"]))] * 2)
        assert [e.shape for e in eps] == [x.shape] * 2
        assert all(torch.isfinite(e).all() for e in eps)
        assert len(shrunk(ARCHITECTURES[name]).unet["block_out_channels"]) >= 3

    def test_legacy_attention_is_noticed(self) -> None:
        prior = toy("sd15")
        prior.denoiser.module.set_attn_processor(AttnProcessor())
        assert legacy_attention(prior.denoiser.module) == ["AttnProcessor"]

    def test_an_unknown_one_is_refused(self) -> None:
        with pytest.raises(PriorError, match="got 'sd99', expected one of sd15"):
            blank_prior("sd99", FLOAT32, CPU)

    def test_weights_lie_as_tensor_cores_read_them(self, plain: NetworkPrior) -> None:
        for module in (plain.denoiser.module, plain.codec.vae):
            weight = module.conv_in.weight if hasattr(module, "conv_in") else module.encoder.conv_in.weight
            assert weight.is_contiguous(memory_format=torch.channels_last)
        assert isinstance(plain.codec.inner, VaeCodec)


def allocated_peak(call: Callable[[], object]) -> int:
    """The most bytes that the CPU allocator held at once during a call, beyond those before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        call()
    held = peak = 0
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_a_step_holds_the_encoder_or_the_network_but_not_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prior's activations are gone when the backward pass through the encoder starts."""
    monkeypatch.setenv("SDS3D_THREADS", "1")
    prior = toy("sd15")
    rgb, text = rgb_of(4).requires_grad_(), prior.encode_text(["a"] * 4)
    bundles = [Told(text=text)] * 2
    t = torch.full((4,), 0.5)

    def encode() -> torch.Tensor:
        return prior.encode(rgb)

    def step(eps: Callable[..., tuple[torch.Tensor, ...]]) -> None:
        x = encode()
        null, said = eps(x.detach().requires_grad_(), t, *bundles)
        (x * (said - null)).sum().backward()

    def with_graph(x: torch.Tensor, t: torch.Tensor, *told: Told) -> tuple[torch.Tensor, ...]:
        return prior.eps_of(prior.denoiser, None, x, t, *told)

    def encode_alone() -> None:
        encode().sum().backward()

    step(prior.eps)  # first calls allocate what stays
    alone, frozen = allocated_peak(encode_alone), allocated_peak(lambda: step(prior.eps))
    kept = allocated_peak(lambda: step(with_graph))
    assert frozen < 1.3 * alone + 2e6
    assert kept > 1.5 * frozen
