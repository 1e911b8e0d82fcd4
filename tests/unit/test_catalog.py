"""The table of priors, what is said about them, and what is read from a folder's names alone."""

import json
import re
from pathlib import Path

import pytest
import torch

from sds3d.__main__ import main
from sds3d.config.load import config_names
from sds3d.errors import PriorError
from sds3d.mathx.schedule import FlowSchedule
from sds3d.priors import PriorConfig, known_priors, load_prior, needed_views, prior_offers
from sds3d.priors.catalog import PRIORS, sources
from sds3d.priors.families import FAMILIES
from sds3d.priors.flow_view import FlowView
from sds3d.priors.hub import describe_sources
from sds3d.priors.listing import rows, table
from tests.tiny.mvdream import make_mvdream
from tests.tiny.stable_diffusion import make_instaflow, make_stable_diffusion

CPU = torch.device("cpu")
ASKED = ("toybox", "sd15", "sd21", "sdxl", "if", "sd3", "flux", "pixart", "sana", "mvdream")
GONE = ("runwayml/", "stabilityai/stable-diffusion-2")
DOC = Path(__file__).parents[2] / "docs" / "priors.md"


@pytest.mark.parametrize("name", PRIORS)
def test_entries_are_complete(name: str) -> None:
    info = PRIORS[name]
    assert info.pipeline in FAMILIES
    assert info.preset in config_names()
    assert info.licence
    assert info.summary
    assert (info.folder is None) == bool(info.sources)
    assert 0 < info.size_gb < 100
    assert 0 < info.memory_gb < 100
    for source in info.sources:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", source.repository)
        assert source.revision == "main" or re.fullmatch("[0-9a-f]{40}", source.revision)
        assert not source.repository.startswith(GONE)


def test_all_names_are_there() -> None:
    assert set(ASKED) <= set(known_priors())


def test_sources_are_read_from_short_ids() -> None:
    first, second = sources("a/b", "c/d@" + "0" * 40)
    assert (first.repository, first.revision) == ("a/b", "main")
    assert (second.repository, second.revision) == ("c/d", "0" * 40)
    assert describe_sources((first, second)) == "a/b, c/d@0000000"


def test_the_listing_has_one_line_per_prior(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["priors"]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["name", "family", "size", "licence", "gated", "source", "cached", "summary"]
    assert [line.split()[0] for line in lines] == list(PRIORS)
    assert "yes" in next(line for line in lines if line.startswith("toybox"))
    assert "gated" in next(line for line in lines if line.startswith("sd3 "))
    assert len(table()) == len(PRIORS) + 1
    assert main(["priors", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == [row["name"] for row in rows()]


def test_one_prior_is_examined(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["priors", "--check", "toybox"]) == 0
    said = capsys.readouterr().out
    assert "104 words" in said
    assert said.endswith("ok\n")
    folder = make_stable_diffusion(tmp_path / "tiny")
    assert main(["priors", "--check", str(folder)]) == 0
    assert "predicts epsilon" in capsys.readouterr().out
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert main(["priors", "--check", str(folder)]) == 2
    said = capsys.readouterr()
    assert "unet/ (no safetensors)" in said.err
    assert "ok" not in said.out.splitlines()
    assert main(["priors", "--check", "toybx"]) == 2
    assert "did you mean toybox?" in capsys.readouterr().err


def test_a_prior_that_is_not_here_is_not_fetched_by_examining_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert main(["priors", "--check", "sd3"]) == 2
    assert "not on this disk; a run would fetch it from stabilityai/" in capsys.readouterr().err


def test_offers_come_from_the_record_of_the_family(tmp_path: Path) -> None:
    assert prior_offers(PriorConfig(name="sd15")) == {"student"}
    assert "flow" in prior_offers(PriorConfig(name="sd3"))
    assert "flow" in prior_offers(PriorConfig(name="sd15", as_flow=True))
    assert "flow" in prior_offers(PriorConfig(name=str(make_instaflow(tmp_path / "flow"))))
    assert "flow" not in prior_offers(PriorConfig(name=str(make_stable_diffusion(tmp_path / "sd"))))
    # What is not here yet is refused nothing; loading it shows what it is.
    assert "flow" in prior_offers(PriorConfig(name="someone/something"))
    assert prior_offers(PriorConfig(name="toybxo")) == prior_offers(PriorConfig(name="someone/something"))


def test_joint_views_come_from_the_record_of_the_family(tmp_path: Path) -> None:
    assert needed_views(PriorConfig()) == 1
    assert needed_views(PriorConfig(name="mvdream")) == 4
    assert needed_views(PriorConfig(name=str(make_mvdream(tmp_path / "views")))) == 4
    assert needed_views(PriorConfig(name="someone/something")) == 1


def test_as_flow_leaves_a_flow_as_it_is(tmp_path: Path) -> None:
    folder = make_instaflow(tmp_path / "flow")
    prior = load_prior(PriorConfig(name=str(folder), as_flow=True, dtype="float32"), CPU)
    assert isinstance(prior.schedule, FlowSchedule)
    assert not isinstance(prior, FlowView)


def test_a_wrong_name_is_told_before_anything_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sds3d.priors.open_prior", lambda *_: pytest.fail("loaded"))
    with pytest.raises(PriorError, match=r"did you mean sdxl\?"):
        load_prior(PriorConfig(name="sdxll"), CPU)


def test_the_page_has_one_row_per_prior_with_the_table_s_own_facts() -> None:
    text = DOC.read_text(encoding="utf-8")
    lines = {m[1]: m[0] for m in re.finditer(r"^\| `([\w-]+)` .*$", text, re.MULTILINE)}
    assert list(lines) == list(PRIORS)
    for name, info in PRIORS.items():
        row = lines[name]
        for source in info.sources:
            assert source.repository in row
        assert info.licence in row
        assert f"| {info.memory_gb:g} GB |" in row
        assert f"`{info.preset}`" in row
        assert ("gated" in row) == info.gated
