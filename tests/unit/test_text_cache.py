"""Embeddings on disk: the same numbers without the encoder, which is let go; and all that can be wrong with them."""

import gc
import os
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sds3d.paths import cache_dir
from sds3d.priors import PriorConfig, load_prior, open_prior
from sds3d.priors.config import LoraConfig
from sds3d.priors.families import LoadOptions
from sds3d.priors.flow_view import FlowView
from sds3d.priors.lazy import LazyEncoder
from sds3d.priors.network import NetworkPrior
from sds3d.priors.text import PromptingConfig, TextBank
from sds3d.priors.text_cache import CachedText, TextStore, model_key
from tests.tiny.deepfloyd import make_deepfloyd
from tests.tiny.flux import make_flux
from tests.tiny.mvdream import make_mvdream
from tests.tiny.pixart import make_pixart
from tests.tiny.sana import make_sana
from tests.tiny.sd3 import make_sd3
from tests.tiny.sdxl import make_sdxl
from tests.tiny.stable_diffusion import make_stable_diffusion

CPU = torch.device("cpu")
FAMILIES = (
    *(make_stable_diffusion, make_sdxl, make_sd3, make_flux),
    *(make_deepfloyd, make_pixart, make_sana, make_mvdream),
)
PROMPTS = ["a red mug", "", "a blue car", "a red mug"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stable_diffusion(tmp_path_factory.mktemp("text") / "tiny")


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, for encoders of any size."""
    monkeypatch.setenv("SDS3D_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("sds3d.priors.text_cache.WORTH_BYTES", 0)
    return tmp_path / "cache" / "text"


def opened(folder: Path, **settings: object) -> NetworkPrior:
    return open_prior(folder, PriorConfig(name=str(folder), dtype="float32", **settings), CPU)


def encoders(prior: NetworkPrior) -> list[LazyEncoder]:
    found = list(prior.text.modules())
    assert found
    assert all(isinstance(module, LazyEncoder) for module in found)
    return found


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_what_is_cached_needs_no_encoder(make, tmp_path: Path, store: Path) -> None:
    folder = make(tmp_path / "model")
    first = opened(folder)
    assert not any(
        encoder.is_loaded for encoder in encoders(first)
    )  # loading the prior alone reads no encoder
    said = first.encode_text(PROMPTS)
    assert all(encoder.is_loaded for encoder in encoders(first))
    assert len(list(store.iterdir())) == 3  # each prompt once
    second = opened(folder)
    assert torch.equal(second.encode_text(PROMPTS), said)
    assert torch.equal(second.encode_text(["a blue car"]), said[2:3])
    assert not any(encoder.is_loaded for encoder in encoders(second))
    assert torch.equal(opened(folder, text_cache=False).encode_text(PROMPTS[:1]), said[:1])
    assert opened(folder).warnings(PROMPTS) == []


def test_encoders_are_let_go_after_the_prompts_of_a_run(folder: Path) -> None:
    prior = opened(folder, text_cache=False)
    (encoder,) = encoders(prior)
    prior.encode_text(["a red mug"])
    network = weakref.ref(encoder.network)
    weights = weakref.ref(next(encoder.network.parameters()))
    bank = TextBank(prior, "a red mug", "ugly", PromptingConfig())
    gc.collect()
    assert network() is None
    assert weights() is None
    assert not encoder.is_loaded
    # Whoever asks later still gets an answer, and the same one.
    assert torch.equal(prior.encode_text(["a red mug"])[0], bank.plain)
    assert prior.warnings(["a red mug"]) == []


def test_a_wrapped_prior_lets_go_too(folder: Path) -> None:
    prior = opened(folder, text_cache=False)
    TextBank(FlowView(prior), "a red mug", "", PromptingConfig())
    assert not encoders(prior)[0].is_loaded


def test_a_network_handed_over_loaded_is_kept(folder: Path) -> None:
    """Only what can be read again is let go."""
    prior = opened(folder, text_cache=False)
    prior.text.encoder = nn.Linear(2, 2)
    prior.release_text()
    assert next(iter(prior.text.modules())).weight.shape == (2, 2)


@pytest.mark.parametrize("damage", ["cut", "shape", "nan", "key", "text"])
def test_damaged_entries_are_made_anew_and_told(folder: Path, store: Path, damage: str) -> None:
    said = opened(folder).encode_text(["a red mug"])
    (entry,) = store.iterdir()
    whole = load_file(entry)["text"].clone()
    if damage == "cut":
        entry.write_bytes(entry.read_bytes()[:-7])
    elif damage == "text":
        entry.write_text("not a tensor")
    else:
        bad = {"shape": whole[:-1], "nan": whole * float("nan"), "key": whole}[damage]
        save_file({"other" if damage == "key" else "text": bad.contiguous()}, entry)
    prior = opened(folder)
    assert torch.equal(prior.encode_text(["a red mug"]), said)
    (message,) = prior.warnings(["a red mug"])
    assert "damaged text embedding" in message
    assert str(entry) in message
    assert torch.equal(load_file(entry)["text"], whole)
    again = opened(folder)
    again.encode_text(["a red mug"])
    assert again.warnings(["a red mug"]) == []


def test_a_disk_that_refuses_stops_nothing(folder: Path, store: Path) -> None:
    store.parent.mkdir(parents=True)
    store.write_text("a file where the folder should be")
    prior = opened(folder)
    assert prior.encode_text(PROMPTS).isfinite().all()
    (message,) = prior.warnings(PROMPTS[:1])
    assert "embeddings of prompts are not kept" in message


def test_least_recently_used_entries_go_first(tmp_path: Path) -> None:
    text = torch.zeros(4, 8)
    store = TextStore(tmp_path, limit_bytes=10**9)
    for index, key in enumerate("abcd"):
        store.put(key, text)
        os.utime(tmp_path / f"{key}.safetensors", ns=(index, index))
    size = (tmp_path / "a.safetensors").stat().st_size
    assert store.get("a", (4, 8)) is not None  # used just now
    store.limit_bytes = 3 * size
    store.put("e", text)
    assert {path.stem for path in tmp_path.iterdir()} == {"a", "d", "e"}
    store.limit_bytes = 1
    store.put("f", text)
    assert {path.stem for path in tmp_path.iterdir()} == {"f"}  # never what was just made
    assert store.notices == []


def test_keys_tell_apart_what_differs(folder: Path, tmp_path: Path) -> None:
    def key(where: Path = folder, **settings: object) -> str:
        config = PriorConfig(name="any", **settings)
        return model_key(where, LoadOptions(config=config, device=CPU, dtype=torch.float32))

    style = tmp_path / "word.safetensors"
    style.write_bytes(b"one")
    lora = LoraConfig(path=str(style))
    keys = [
        key(),
        key(textual_inversions=(str(style),)),
        key(loras=(lora,)),
        key(loras=(replace(lora, scale=0.5),)),
        key(make_stable_diffusion(tmp_path / "same again")),
    ]
    style.write_bytes(b"two")
    keys.append(key(loras=(lora,)))
    assert len(set(keys)) == len(keys)
    assert key(image_px=64) == key(as_flow=True) == key(text_cache=False) == keys[0]
    half = LoadOptions(config=PriorConfig(name="any"), device=CPU, dtype=torch.float16)
    assert model_key(folder, half) != keys[0]


def test_a_retrained_encoder_in_the_same_folder_is_noticed(tmp_path: Path) -> None:
    folder = make_stable_diffusion(tmp_path / "model")
    said = opened(folder).encode_text(["a red mug"])
    weights = folder / "text_encoder" / "model.safetensors"
    save_file({name: value + 0.1 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    assert (opened(folder).encode_text(["a red mug"]) - said).abs().max() > 1e-3


def test_snapshots_of_the_hub_are_known_by_repository_and_commit(folder: Path, tmp_path: Path) -> None:
    options = LoadOptions(config=PriorConfig(), device=CPU, dtype=torch.float32)
    keys = []
    for place, commit in (("one", "a" * 40), ("two", "a" * 40), ("one", "b" * 40)):
        snapshot = tmp_path / place / "models--owner--name" / "snapshots" / commit
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        snapshot.symlink_to(folder)
        keys.append(model_key(snapshot, options))
    assert keys[0] == keys[1] != keys[2]


def test_small_encoders_are_not_worth_it(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("SDS3D_CACHE_DIR", str(store.parent))
    prior = load_prior(PriorConfig(), CPU)
    assert not isinstance(prior.text, CachedText)
    prior.encode_text(["a red mug"])
    assert not store.exists()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir("text").name == "text"
    monkeypatch.delenv("SDS3D_CACHE_DIR")
    assert cache_dir("text") == tmp_path / "xdg" / "sds3d" / "text"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir("text") == Path.home() / ".cache" / "sds3d" / "text"


def test_a_lazy_encoder_answers_like_its_network() -> None:
    network = nn.Linear(3, 2)
    calls = []

    def load() -> nn.Module:
        calls.append(1)
        return network

    lazy = LazyEncoder("settings", load).eval().requires_grad_(False)
    assert (lazy.config, lazy.device, list(lazy.parameters()), calls) == ("settings", CPU, [], [])
    assert lazy.to("cpu").device == CPU
    x = torch.ones(1, 3)
    assert torch.equal(lazy(x), network(x))
    assert lazy.weight is network.weight
    assert calls == [1]
    lazy.release()
    assert not lazy.is_loaded
    with pytest.raises(AttributeError, match="nothing"):
        _ = lazy.nothing
    assert len(calls) == 2
