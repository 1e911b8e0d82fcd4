"""benchmarks/step.py at toy sizes: it runs, its parts add up, its files can be read."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
TOY = ["--random-weights", "--toy", "--render", "64", "--batch", "2", "--steps", "3", "prior.dtype=float32"]


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("step", FOLDER / "step.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "step", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SPLIT_STEPS", 2)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("prior", "scene"), [("sd21", "gaussians"), ("pixel", "voxel")])
def test_a_toy_step_is_split(
    step: ModuleType, prior: str, scene: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "step.json"
    found = step.main([*TOY, "--prior", prior, "--scene", scene, "--json", str(out)])
    assert json.loads(out.read_text(encoding="utf-8")) == found
    split = found["split_ms"]
    assert set(step.PARTS) <= set(split)
    assert all(ms >= 0 for ms in split.values())
    assert split["prior"] > 0
    assert split["encode backward"] > 0
    assert split["encode forward"] > 0
    assert found["rows_per_step"] == 4  # two views, with and without the prompt
    assert found["ratio"] == pytest.approx(
        found["seconds_per_step"] / found["bare_prior_seconds_per_step"], rel=1.0
    )
    assert found["peak_gib"] > 0
    assert found["device"]
    assert found["torch"] == torch.__version__
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"| {prior} (random, toy), float32")
    assert lines[-1].count("|") == step.HEAD.splitlines()[0].count("|")


def test_clocks_do_not_count_a_moment_twice(step: ModuleType) -> None:
    split = step.Split()
    inner = split.wrap("inner", lambda: sum(range(1000)))
    split.wrap("outer", lambda: [inner() for _ in range(3)])()
    split.charge()
    assert set(split.seconds) == {"rest", "inner", "outer"}
    assert split.open == ["rest"]


def test_an_unknown_architecture_is_refused(step: ModuleType) -> None:
    with pytest.raises(SystemExit, match="needs --prior sd15 or sd21"):
        step.main(["--random-weights", "--prior", "sd99"])
