"""LoRAs and textual inversions: our loader against diffusers' own, on tiny random pipelines."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

from sds3d.errors import PriorError
from sds3d.interfaces import Told
from sds3d.priors import PriorConfig, open_prior
from sds3d.priors.config import LoraConfig
from sds3d.priors.network import NetworkPrior
from sds3d.priors.vocabulary import spelled_out
from tests.tiny.adapters import make_lora, make_words
from tests.tiny.checks import PROMPT, check_student, randn, sample
from tests.tiny.sdxl import WIDTHS, make_sdxl
from tests.tiny.stable_diffusion import WIDTH, make_stable_diffusion
from tests.tiny.texts import clip_tokenizer

CPU = torch.device("cpu")
FLOAT32 = PriorConfig(dtype="float32")
TIMES = [1.0, 0.75, 0.5, 0.25, 0.0]
CLOSE = {"rtol": 1e-5, "atol": 1e-4}


def open_with(folder: Path, **settings: Any) -> NetworkPrior:
    return open_prior(folder, replace(FLOAT32, **settings), CPU)


def pipeline_of(folder: Path, kind: Any = StableDiffusionPipeline) -> Any:
    more = {"safety_checker": None} if kind is StableDiffusionPipeline else {"add_watermarker": False}
    pipe = kind.from_pretrained(folder, **more)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )
    return pipe


def theirs(pipe: Any, x: torch.Tensor, prompt: str = PROMPT) -> torch.Tensor:
    return pipe(prompt, num_inference_steps=4, guidance_scale=4.0, latents=x, output_type="latent").images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stable_diffusion(tmp_path_factory.mktemp("sd"), prediction="v_prediction")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def loras(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One of UNet and text encoder, one of the UNet alone in another trainer's layout."""
    pipe, where = pipeline_of(folder), tmp_path_factory.mktemp("loras")
    both = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    return [
        make_lora(where / "a.safetensors", both),
        make_lora(where / "b.safetensors", {"unet": pipe.unet}, layout="kohya", seed=300),
    ]


def styled(pipe: Any, paths: list[Path], scales: list[float]) -> Any:
    names = [path.stem for path in paths]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft remarks on every second adapter
        for name, path in zip(names, paths, strict=True):
            pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
    pipe.set_adapters(names, scales)
    return pipe


def test_loras_with_scales_reproduce_the_pipeline(folder: Path, loras: list[Path]) -> None:
    configs = tuple(LoraConfig(path=str(p), scale=s) for p, s in zip(loras, (0.8, -0.5), strict=True))
    prior = open_with(folder, loras=configs)
    x = randn(1, *prior.shape)
    ours = sample(prior, x, TIMES, 4.0)
    torch.testing.assert_close(ours, theirs(styled(pipeline_of(folder), loras, [0.8, -0.5]), x), **CLOSE)
    for other in ([0.8, 0.5], [0.0, -0.5], [0.8, 0.0]):
        assert (ours - theirs(styled(pipeline_of(folder), loras, other), x)).abs().max() > 1e-2, other


def test_the_text_encoder_is_styled_again_when_it_is_read_again(folder: Path, loras: list[Path]) -> None:
    bare, prior = open_with(folder), open_with(folder, loras=(LoraConfig(path=str(loras[0])),))
    first = prior.encode_text([PROMPT])
    assert (first - bare.encode_text([PROMPT])).abs().max() > 1e-2
    prior.release_text()
    assert torch.equal(prior.encode_text([PROMPT]), first)


def test_a_lora_of_scale_zero_is_the_bare_prior(folder: Path, loras: list[Path]) -> None:
    bare = open_with(folder)
    prior = open_with(folder, loras=tuple(LoraConfig(path=str(path), scale=0.0) for path in loras))
    assert [name for name, _ in prior.denoiser.module.named_parameters()] == [
        name for name, _ in bare.denoiser.module.named_parameters()
    ]
    x, t = randn(1, *bare.shape), torch.tensor([0.4])
    (ours,), (plain,) = (p.eps(x, t, Told(text=p.encode_text([PROMPT]))) for p in (prior, bare))
    assert torch.equal(ours, plain)
    assert not any(p.requires_grad for p in prior.denoiser.module.parameters())


def test_loading_a_style_draws_no_global_random_number(folder: Path, loras: list[Path]) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    open_with(folder, loras=(LoraConfig(path=str(loras[0])),)).encode_text([PROMPT])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_styled_prior_carries_a_student(folder: Path, loras: list[Path]) -> None:
    check_student(open_with(folder, loras=(LoraConfig(path=str(loras[0])),)))


def test_a_lora_of_two_encoders_reproduces_the_pipeline(sdxl: Path, tmp_path: Path) -> None:
    pipe = pipeline_of(sdxl, StableDiffusionXLPipeline)
    names = ("unet", "text_encoder", "text_encoder_2")
    path = make_lora(tmp_path / "xl.safetensors", {name: getattr(pipe, name) for name in names})
    prior = open_with(sdxl, loras=(LoraConfig(path=str(path), scale=0.7),))
    x = randn(1, *prior.shape)
    before = theirs(pipe, x)
    ours = sample(prior, x, TIMES, 4.0)
    torch.testing.assert_close(ours, theirs(styled(pipe, [path], [0.7]), x), **CLOSE)
    assert (ours - before).abs().max() > 1e-2


LAYOUTS = {
    "one vector": {"<toy>": (WIDTH,)},
    "three vectors": {"<toy>": (3, WIDTH)},
    "nameless": {"emb_params": (2, WIDTH)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_learned_words_reproduce_the_pipeline(folder: Path, tmp_path: Path, layout: str) -> None:
    path = make_words(tmp_path / "zorp.safetensors", LAYOUTS[layout])
    word = "zorp" if layout == "nameless" else "<toy>"
    prior = open_with(folder, textual_inversions=(str(path),))
    pipe = pipeline_of(folder)
    (vectors,) = load_file(path).values()
    plain = pipe.text_encoder(pipe.tokenizer("x", return_tensors="pt").input_ids)[0]
    pipe.load_textual_inversion({word: vectors}, token=word)
    torch.testing.assert_close(
        pipe.text_encoder(pipe.tokenizer("x", return_tensors="pt").input_ids)[0], plain
    )
    for prompt in (f"a red {word} mug", f"{word}, front view", "a red mug"):
        expected = pipe.encode_prompt(prompt, CPU, 1, False)[0]
        torch.testing.assert_close(prior.encode_text([prompt]), expected)
    assert (prior.encode_text([word]) - prior.encode_text(["toy"])).abs().max() > 1e-2
    prior.release_text()
    torch.testing.assert_close(
        prior.encode_text([word]), pipe.encode_prompt(word, CPU, 1, False)[0], rtol=0, atol=1e-6
    )


def test_a_word_of_two_encoders_reproduces_the_pipeline(sdxl: Path, tmp_path: Path) -> None:
    path = make_words(tmp_path / "zorp.safetensors", {"clip_l": (2, WIDTHS[0]), "clip_g": (2, WIDTHS[1])})
    prior = open_with(sdxl, textual_inversions=(str(path),))
    pipe, tensors = pipeline_of(sdxl, StableDiffusionXLPipeline), load_file(path)
    for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
        pipe.load_textual_inversion(
            {"zorp": tensors[key]},
            token="zorp",
            text_encoder=getattr(pipe, f"text_encoder{suffix}"),
            tokenizer=getattr(pipe, f"tokenizer{suffix}"),
        )
    tokens, _, pooled, _ = pipe.encode_prompt("a red zorp", device=CPU, do_classifier_free_guidance=False)
    packed = prior.encode_text(["a red zorp"])
    torch.testing.assert_close(prior.text.packing.tokens_of(packed), tokens)
    torch.testing.assert_close(prior.text.packing.pooled_of(packed), pooled)


def test_long_words_count_all_their_tokens(folder: Path, tmp_path: Path) -> None:
    path = make_words(tmp_path / "long.safetensors", {"<long>": (20, WIDTH)})
    prior = open_with(folder, textual_inversions=(str(path),))
    (message,) = prior.warnings(["a <long>"])
    assert "23 tokens" in message


def test_spelling_out_leaves_other_words_alone() -> None:
    tokenizer = clip_tokenizer()
    tokenizer.add_tokens(["<cat>", "<cat>_1", "<cat>_2", "<dog>"])
    assert spelled_out(tokenizer, "a <cat> and a <dog>") == "a <cat> <cat>_1 <cat>_2 and a <dog>"
    assert spelled_out(tokenizer, "<cat>_1") == "<cat>_1"


def test_files_that_fit_nothing_are_refused(
    folder: Path, sdxl: Path, loras: list[Path], tmp_path: Path
) -> None:
    def lora(path: Path) -> dict[str, Any]:
        return {"loras": (LoraConfig(path=str(path)),)}

    def words(path: Path) -> dict[str, Any]:
        return {"textual_inversions": (str(path),)}

    other = make_words(tmp_path / "other.safetensors", {"transformer.a.lora_A.weight": (2, 4)})
    with pytest.raises(PriorError, match=r"prior\.loras\[0\]\.path: .*other.* holds no weight of this model"):
        open_with(folder, **lora(other))
    big = pipeline_of(sdxl, StableDiffusionXLPipeline).unet
    wrong = make_lora(tmp_path / "wrong.safetensors", {"unet": big})
    with pytest.raises(PriorError, match=r"prior\.loras\[0\].* does not fit the unet of this model"):
        open_with(folder, **lora(wrong))
    wide = make_words(tmp_path / "wide.safetensors", {"<wide>": (2, WIDTH + 1)})
    with pytest.raises(PriorError, match=r"textual_inversions\[0\].*17 numbers.*reads 16"):
        open_with(folder, **words(wide))
    known = make_words(tmp_path / "known.safetensors", {"mug</w>": (1, WIDTH)})
    with pytest.raises(PriorError, match="'mug</w>' is known already"):
        open_with(folder, **words(known))
    several = make_words(tmp_path / "several.safetensors", {"a": (4,), "b": (4,)})
    with pytest.raises(PriorError, match="is no textual inversion: got the entries a, b"):
        open_with(folder, **words(several))
    second = make_words(tmp_path / "second.safetensors", {"clip_g": (1, WIDTH)})
    with pytest.raises(PriorError, match="text encoder that this model does not have"):
        open_with(folder, **words(second))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"short")
    for settings in (lora(broken), words(broken)):
        with pytest.raises(PriorError, match=r"broken\.safetensors cannot be read"):
            open_with(folder, **settings)


def test_missing_and_pickled_files_are_refused_before_loading(folder: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "style.bin"
    pickled.write_bytes(b"")
    for path, words in ((pickled, r"expected a \.safetensors"), (tmp_path / "no.safetensors", "no file")):
        with pytest.raises(PriorError, match=rf"prior\.loras\[0\]\.path: .*{words}"):
            open_with(folder, loras=(LoraConfig(path=str(path)),))
        with pytest.raises(PriorError, match=rf"prior\.textual_inversions\[0\]: .*{words}"):
            open_with(folder, textual_inversions=(str(path),))
