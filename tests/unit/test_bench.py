"""The guidance bench: counting, fairness, resuming, surviving a failing method."""

import json
from pathlib import Path

import pytest
import torch

from sds3d.bench.guidance import (
    BenchConfig,
    known_methods,
    methods_from,
    plan_steps,
    prompts_from,
    run_bench,
    seeds_from,
)
from sds3d.bench.passes import MutePrior, count_passes
from sds3d.config.load import override_layers
from sds3d.errors import ConfigError, InputError
from sds3d.job import load_job
from sds3d.optimize import build_guide

# Passes per view and step of rules whose number does not depend on t; the specification's table.
EXACT = {"sds": 2, "csd": 2, "asd": 3, "ssd": 2, "cds": 4, "rfds": 2, "rfds-rev": 3}


@pytest.mark.parametrize(("method", "passes"), EXACT.items())
def test_passes_are_those_of_the_specification(method: str, passes: int) -> None:
    job = load_job(f"toybox/{method}", override_layers(["prompt=a red mug"])).config
    guide = build_guide(job, torch.device("cpu"))
    assert count_passes(guide, job, samples=6) * job.camera.hold_steps == pytest.approx(passes)
    assert not isinstance(guide.terms[0].rule.prior, MutePrior)


def test_a_held_target_is_paid_once() -> None:
    job = load_job("default", override_layers(["prompt=a red mug"])).config
    expected = 2 * job.guidance.config.target_steps / job.camera.hold_steps
    assert count_passes(build_guide(job, torch.device("cpu")), job, samples=4) == pytest.approx(expected)


def test_steps_spend_the_budget() -> None:
    config = BenchConfig(methods=("sds", "cds"), budget=400)
    assert [plan_steps(method, config)[0] for method in config.methods] == [200, 100]


def test_known_methods_leave_out_editing_and_experiments() -> None:
    plain, every = known_methods(), known_methods(experimental=True)
    assert {"sds", "csd", "ism", "cfd"} <= set(plain)
    assert not {"dds", "pds"} & set(every)
    assert set(plain) < set(every)
    assert methods_from("sds, ism") == ("sds", "ism")


def test_words_become_settings(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# two\na red mug\n\na blue duck\n")
    assert prompts_from([str(file)]) == ("a red mug", "a blue duck")
    assert seeds_from("0, 3") == (0, 3)
    with pytest.raises(ConfigError, match="--seeds"):
        seeds_from("zero")
    with pytest.raises(ConfigError, match="cannot score"):
        BenchConfig(methods=("sds",), prompts=("happiness",))


def test_a_bench_survives_a_failing_method_and_resumes(tmp_path: Path) -> None:
    """A run folder that is damaged is a failure of its method alone."""
    out = tmp_path / "bench"
    tiny = ("export.cells_per_side=32", "export.texture_px=128", "export.max_faces=300", "camera.batch=1")
    config = BenchConfig(methods=("sds",), prompts=("a red mug",), seeds=(0,), budget=30, overrides=tiny)
    report = run_bench(config, out)
    row = report["methods"]["sds"]
    assert (row["runs"], row["steps"], row["passes_per_step"], row["failure"]) == (1, 15, 2.0, None)
    assert row["peak_mb"] > 100
    assert "| sds | 1 |" in (out / "bench.md").read_text()
    assert (out / "sheet.png").exists()

    score = out / "sds" / "a-red-mug-0" / "score.json"
    before = score.stat().st_mtime_ns
    broken = out / "csd" / "a-red-mug-0"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("{damaged")
    both = BenchConfig(methods=("sds", "csd"), prompts=("a red mug",), seeds=(0,), budget=30, overrides=tiny)
    report = run_bench(both, out)
    assert score.stat().st_mtime_ns == before
    assert report["methods"]["csd"]["runs"] == 0
    assert "damaged" in report["methods"]["csd"]["failure"]
    assert json.loads((out / "bench.json").read_text())["methods"]["sds"]["runs"] == 1
    with pytest.raises(InputError, match="other settings"):
        run_bench(BenchConfig(methods=("sds",), budget=31), out)
    with pytest.raises(ConfigError, match="unknown method"):
        run_bench(BenchConfig(methods=("sdss",)), tmp_path / "new")
    assert not (tmp_path / "new").exists()
