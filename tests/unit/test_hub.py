"""Where a prior's files come from: names, folders, the cache, a hub on loopback; and every way in which they do not."""

import errno
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from sds3d.errors import PriorError
from sds3d.priors import PriorConfig, load_prior, prior_offers
from sds3d.priors.catalog import PRIORS, Source
from sds3d.priors.download import Refusal, cached_folder, download
from sds3d.priors.hub import files_of, find_folder, origin_of, state_of
from sds3d.priors.weights import bytes_of, missing_files, variant_of
from tests.fake_hub import SHA, FakeHub, fake_hub
from tests.tiny.stable_diffusion import make_stable_diffusion

CPU = torch.device("cpu")
ID = "someone/tiny"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder as repositories have it: half-precision twins, pickles and code beside what we read."""
    folder = make_stable_diffusion(tmp_path_factory.mktemp("hub") / "tiny")
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        shutil.copy(folder / part / f"{stem}.safetensors", folder / part / f"{stem}.fp16.safetensors")
        (folder / part / f"{stem}.bin").write_bytes(b"pickle")
    (folder / "unet" / "surprise.py").write_text("raise SystemExit")
    (folder / "v1.ckpt").write_bytes(b"pickle")
    (folder / "v1.safetensors").write_bytes(b"everything again")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"unused")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def hub(pipeline: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    disable_progress_bars()
    with fake_hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        running.repositories[ID] = pipeline
        yield running
    enable_progress_bars()


def test_a_download_takes_what_is_read_and_nothing_else(hub: FakeHub, pipeline: Path) -> None:
    folder = find_folder(PriorConfig(name=ID))
    assert missing_files(folder) == []
    weights = [name for name in hub.sent if "." in name and not name.endswith((".json", ".txt", ".model"))]
    assert sorted(weights) == [
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",  # gradients go through it: not in half precision
    ]
    assert bytes_of(folder) < bytes_of(pipeline)
    assert origin_of(folder) == Source(repository=ID, revision=SHA)
    assert files_of(PriorConfig(name=ID)) == f"{ID}@{SHA}"  # stands in the run's manifest
    half = load_prior(
        PriorConfig(name=ID, dtype="float32"), CPU
    )  # reads the half-precision files all the same
    assert half.encode_text(["a red mug"]).isfinite().all()


def test_float32_takes_the_full_files(hub: FakeHub) -> None:
    folder = find_folder(PriorConfig(name=ID, dtype="float32"))
    assert not any("fp16" in name for name in hub.sent)
    assert variant_of(folder / "unet", half=True) is None


def test_a_second_run_asks_nobody(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = find_folder(PriorConfig(name=ID))
    hub.asked.clear()
    assert find_folder(PriorConfig(name=ID)) == first
    assert find_folder(PriorConfig(name=ID, revision=SHA)) == first
    assert hub.asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_folder(PriorConfig(name=ID)) == first
    assert prior_offers(PriorConfig(name=ID)) == {"student"}


def test_mirrors_are_tried_in_order(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = (Source(repository="gone/one"), Source(repository="shut/two"), Source(repository=ID))
    hub.repositories["shut/two"] = hub.repositories[ID]
    hub.faults["shut/two"] = "gated"
    monkeypatch.setitem(
        PRIORS, "sd15", PRIORS["sd15"].__class__(**{**vars(PRIORS["sd15"]), "sources": sources})
    )
    assert missing_files(find_folder(PriorConfig(name="sd15"))) == []
    assert list(dict.fromkeys(hub.asked)) == ["gone/one", "shut/two", ID]
    assert state_of(PRIORS["sd15"]) == "yes"


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (
            "gated",
            rf"someone/tiny is gated: accept its licence at http://127.*/{ID}, then log in with `hf auth login`",
        ),
        ("forbidden", "is gated: accept its licence"),
        ("busy", "answers 500 for someone/tiny; try again later"),
    ],
)
def test_refusals_say_what_to_do(hub: FakeHub, fault: str, expected: str) -> None:
    hub.faults[ID] = fault
    with pytest.raises(PriorError, match=expected) as caught:
        find_folder(PriorConfig(name=ID))
    assert "\n" not in str(caught.value)


def test_unknown_repository_and_revision(hub: FakeHub) -> None:
    with pytest.raises(PriorError, match=r"no such folder; as a hub id: no/thing is not on http.*HF_TOKEN"):
        find_folder(PriorConfig(name="no/thing"))
    with pytest.raises(PriorError, match=r"has no revision 'v9'; set prior.revision"):
        find_folder(PriorConfig(name=ID, revision="v9"))


def test_a_repository_that_is_no_pipeline(hub: FakeHub, pipeline: Path, tmp_path: Path) -> None:
    hub.repositories["not/diffusers"] = tmp_path / "repo"
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "config.json").write_text("{}")
    with pytest.raises(PriorError, match=r"has no model_index\.json: not a diffusers pipeline"):
        find_folder(PriorConfig(name="not/diffusers"))
    shutil.copytree(pipeline, tmp_path / "pickled")
    for weights in (tmp_path / "pickled" / "unet").glob("*.safetensors"):
        weights.unlink()
    hub.repositories["only/pickles"] = tmp_path / "pickled"
    with pytest.raises(PriorError, match=r"not complete: unet/ \((no|weights only)"):
        find_folder(PriorConfig(name="only/pickles"))
    assert not any(name.endswith((".bin", ".ckpt", ".py")) for name in hub.sent)


def test_a_machine_without_network_answers_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", closed)
    start = time.monotonic()
    with pytest.raises(
        PriorError, match=rf"no connection to {closed}.*not in the cache.*give its path"
    ) as caught:
        find_folder(PriorConfig(name="sd15"))
    assert time.monotonic() - start < 5.0
    assert str(caught.value).count("no connection") == 1  # mirrors are on the same hub


def test_a_hub_that_never_answers_is_given_up(
    cache: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sds3d.priors.download.ASK_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(PriorError, match="no connection"):
            find_folder(PriorConfig(name=ID))
    assert time.monotonic() - start < 5.0


def test_offline_mode_is_respected(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PriorError, match="HF_HUB_OFFLINE is set, and someone/tiny is not in the cache"):
        find_folder(PriorConfig(name=ID))
    assert hub.asked == []


def test_half_a_download_is_seen_told_and_finished(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = find_folder(PriorConfig(name=ID))
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").resolve().unlink()  # the link now dangles
    (folder / "tokenizer" / "vocab.json").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        PriorError, match=r"only partly in .*: tokenizer/ \(no vocabulary\), unet/ \(missing diffusion"
    ):
        find_folder(PriorConfig(name=ID))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.sent.clear()
    assert missing_files(find_folder(PriorConfig(name=ID))) == []
    # The vocabulary was still there, only its link was not.
    sent = [name for name in hub.sent if not name.endswith("index.json")]
    assert sent == ["unet/diffusion_pytorch_model.fp16.safetensors"]


def test_a_disk_too_small_is_told_before_the_download(hub: FakeHub) -> None:
    hub.declared["unet/diffusion_pytorch_model.fp16.safetensors"] = 10**18
    with pytest.raises(PriorError, match=r"needs 1000000000\.\d GB in .*cache.*HF_HOME"):
        find_folder(PriorConfig(name=ID))
    assert not any(name.endswith(".safetensors") for name in hub.sent)


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "cannot be written; set HF_HOME")]
)
def test_a_disk_that_refuses(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, number: int, expected: str
) -> None:
    def refuse(*args: object, **options: object) -> str:
        raise OSError(number, "refused")

    monkeypatch.setattr("sds3d.priors.download.snapshot_download", refuse)
    with pytest.raises(Refusal, match=expected) as caught:
        download(Source(repository=ID), half=True)
    assert caught.value.final


def test_a_pinned_revision_is_not_replaced_by_another(hub: FakeHub) -> None:
    find_folder(PriorConfig(name=ID))
    other = "f" * 40
    assert cached_folder(Source(repository=ID, revision=other)) is None
    with pytest.raises(PriorError, match="has no revision"):
        find_folder(PriorConfig(name=ID, revision=other))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("toybxo", r"did you mean toybox\? not one of .*no such folder"),
        ("SDXL", r"did you mean sdxl\?"),
        ("./nowhere", "no such folder"),
        ("a/b/c", "no such folder"),
        ("", "no such folder"),
    ],
)
def test_names_that_are_nothing(name: str, expected: str, cache: Path) -> None:
    with pytest.raises(PriorError, match=expected):
        find_folder(PriorConfig(name=name))


def test_a_single_file_and_a_revision_of_a_folder(pipeline: Path, cache: Path) -> None:
    with pytest.raises(PriorError, match="from_single_file"):
        find_folder(PriorConfig(name=str(pipeline / "v1.safetensors")))
    with pytest.raises(PriorError, match="only priors from a hub have revisions"):
        find_folder(PriorConfig(name=str(pipeline), revision="main"))
    assert find_folder(PriorConfig(name=str(pipeline))) == pipeline
    assert files_of(PriorConfig(name=str(pipeline))) == str(pipeline.resolve())
    assert files_of(PriorConfig(name="sd15")) == ""


def test_all_that_a_folder_lacks_is_named_at_once(pipeline: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(pipeline, folder)
    for name in ("unet", "vae", "text_encoder"):
        for weights in (folder / name).glob("*fp16*"):
            weights.unlink()
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole.write_bytes(whole.read_bytes()[:-100])
    (folder / "text_encoder" / "model.safetensors").rename(
        folder / "text_encoder" / "model-00001-of-00002.safetensors"
    )
    shutil.rmtree(folder / "scheduler")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(PriorError, match="is not complete") as caught:
        find_folder(PriorConfig(name=str(folder)))
    for expected in (
        "unet/ (diffusion_pytorch_model.safetensors is only partly there)",
        "text_encoder/ (missing model-00002-of-00002.safetensors)",
        "scheduler/ (no such folder)",
        "vae/ (weights only as pickle, safetensors needed)",
    ):
        assert expected in str(caught.value)
