"""Signs of collapse, the verdict of a run, and beginning again with another seed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_run import FAST, ToyLoop, loops

from sds3d.cameras.orbit import turntable_cameras
from sds3d.errors import CollapseError
from sds3d.events.bus import Warned
from sds3d.health import Signs, colors_of, examine, front_likeness, verdict
from sds3d.interfaces import Shading
from sds3d.job import JobConfig, load_job
from sds3d.optimize import build_loop
from sds3d.priors import PriorConfig, load_prior
from sds3d.priors.text import PromptingConfig, TextBank
from sds3d.rng import Stream
from sds3d.run import generate, resume
from sds3d.toybox.colors import COLORS
from sds3d.toybox.views import Views
from sds3d.toybox.world import compose, render_layers, sample_toy

__all__ = ["loops"]  # a fixture
GOOD = Signs(coverage=0.2, full_chroma=0.1, speckle=0.05, front_likeness=-0.5)
LONG = replace(FAST, steps=60)
LOUD = replace(GOOD, full_chroma=0.9)


@pytest.mark.parametrize(
    ("signs", "word"),
    [
        (replace(GOOD, coverage=0.001), "empty"),
        (replace(GOOD, coverage=0.99), "opaque"),
        (LOUD, "saturated"),
        (replace(GOOD, speckle=0.4), "saturated"),
        (replace(GOOD, front_likeness=0.4), "multi-face"),
        (replace(GOOD, finite=False), "not finite"),
    ],
)
def test_every_fault_has_a_line_with_advice(signs: Signs, word: str) -> None:
    (fault,) = signs.faults()
    assert fault.startswith(word)
    assert any(hint in fault for hint in ("penalties.", "seed", "optimizer.", "guidance.", "prompting."))


def test_a_good_scene_has_none() -> None:
    assert GOOD.faults() == replace(GOOD, front_likeness=None).faults() == []
    assert verdict([]) == "healthy"


def test_pure_colour_and_speckle_of_known_pictures() -> None:
    solid = torch.ones(1, 1, 8, 8)
    plain = torch.tensor([0.8, 0.3, 0.3])[None, :, None, None].expand(1, 3, 8, 8)
    assert colors_of(plain, solid) == (0.0, 0.0)
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2  # red beside cyan
    loud = torch.stack([board, 1 - board, 1 - board])[None].float()
    pure, speckle = colors_of(loud, solid)
    assert pure == 1.0
    assert speckle == pytest.approx(2.0 + 1.0)  # red - green goes from 1 to -1, the other from 0.5 to -0.5
    assert colors_of(loud, solid * 0.0) == (0.0, 0.0)
    grey = torch.where(solid > 0, 0.5, 0.5) + 0.4 * (board.float() - 0.5)
    assert colors_of(grey.expand(1, 3, 8, 8), solid) == (0.0, 0.0)  # light and dark are no colours


@torch.no_grad()
def test_the_prior_tells_a_front_from_a_back() -> None:
    """Toys as they are, and toys with a front on every side."""
    prior = load_prior(PriorConfig(), torch.device("cpu"))
    cameras, shading = turntable_cameras(8, 64), Shading(background=torch.ones(8, 3))
    for kind in ("car", "duck"):
        rng = np.random.default_rng(1)
        toy, azimuth = sample_toy(rng, kind), cameras.azimuth_deg.double().numpy()
        bank = TextBank(prior, f"a red {kind}", "", PromptingConfig())
        found = []
        for seen_from in (azimuth, 0.0 * azimuth):
            level = np.ones(8)
            views = Views(seen_from, 15.0 * level, 3.3 * level, 40.0 * level)
            layers = render_layers([toy] * 8, views, 64, np.random.default_rng(2))
            paint = np.repeat(np.array([COLORS["red"]]), 8, 0)
            rgb = torch.from_numpy(compose(layers, paint, paint, np.ones((8, 3)))).permute(0, 3, 1, 2).float()
            stream = Stream(0, "test")
            found.append(front_likeness(prior, bank, prior.encode(rgb), cameras, shading, stream))
        assert found[0] < -0.1
        assert found[1] > 0.1


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def test_every_run_ends_with_a_verdict(
    tmp_path: Path, loops: list[ToyLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(LONG, tmp_path / "good")
    assert manifest(tmp_path / "good")["verdict"] == "healthy"
    generate(FAST, tmp_path / "short")  # 20 steps show nothing that could be judged
    assert manifest(tmp_path / "short")["verdict"] == "not examined"
    monkeypatch.setattr(ToyLoop, "signs", LOUD)
    told: list[Any] = []
    result = generate(LONG, tmp_path / "loud", listeners=[told.append])
    assert result.status == "done"  # on_collapse: report
    assert manifest(tmp_path / "loud")["verdict"].startswith("saturated: 90%")
    assert manifest(tmp_path / "loud")["health"]["full_chroma"] == 0.9
    said = [event.message for event in told if isinstance(event, Warned) and "saturated" in event.message]
    assert [text.split(" steps")[0] for text in said] == [
        "after 30 of 60",
        "after 45 of 60",
        "after 60 of 60",
    ]


def test_stop_ends_the_run_half_way(
    tmp_path: Path, loops: list[ToyLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToyLoop, "signs", LOUD)
    with pytest.raises(CollapseError, match="saturated"):
        generate(replace(LONG, on_collapse="stop"), tmp_path / "run")
    assert (manifest(tmp_path / "run")["status"], manifest(tmp_path / "run")["steps_done"]) == ("failed", 30)


def collapse_of_seeds(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> None:
    """Scenes of these seeds look loud."""
    monkeypatch.setattr(ToyLoop, "signs", property(lambda loop: LOUD if loop.job.seed in bad else GOOD))


def test_reseed_begins_again_and_ends_as_a_run_with_that_seed(
    tmp_path: Path, loops: list[ToyLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    collapse_of_seeds(monkeypatch, {3, 4})
    job = replace(LONG, seed=3, on_collapse="reseed")
    result = generate(job, tmp_path / "run")
    plain = generate(replace(job, seed=5), tmp_path / "plain")
    assert result.files["stl"].read_bytes() == plain.files["stl"].read_bytes()
    facts = manifest(tmp_path / "run")
    assert (facts["seed"], facts["status"], facts["verdict"]) == (5, "done", "healthy")
    assert [attempt["seed"] for attempt in facts["attempts"]] == [3, 4]
    assert sorted(path.name for path in (tmp_path / "run" / "attempts").iterdir()) == ["seed-3", "seed-4"]
    assert [loop.job.seed for loop in loops] == [3, 4, 5, 5]
    assert resume(tmp_path / "run").status == "done"


def test_reseeding_ends_with_the_last_seed(
    tmp_path: Path, loops: list[ToyLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    collapse_of_seeds(monkeypatch, set(range(9)))
    with pytest.raises(CollapseError, match="saturated"):
        generate(replace(LONG, on_collapse="reseed", max_reseeds=1), tmp_path / "run")
    assert [loop.job.seed for loop in loops] == [0, 1]
    assert manifest(tmp_path / "run")["status"] == "failed"


def test_reseeding_goes_on_after_a_kill(
    tmp_path: Path, loops: list[ToyLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    collapse_of_seeds(monkeypatch, {0})
    job: JobConfig = replace(LONG, on_collapse="reseed")
    whole = generate(job, tmp_path / "whole")

    def die(event: object) -> None:
        if len(loops) == 4 and getattr(event, "step", 0) == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(job, tmp_path / "run", listeners=[die])
    assert manifest(tmp_path / "run")["seed"] == 1
    again = resume(tmp_path / "run")
    assert loops[-1].steps_taken[0] == 15
    assert again.files["stl"].read_bytes() == whole.files["stl"].read_bytes()


def test_looking_changes_nothing() -> None:
    job = load_job("fast").config
    loop = build_loop(replace(job, prompt="a red mug", steps=60), torch.device("cpu"))
    before = loop.state_dict()
    first = examine(loop)
    assert examine(loop) == first
    assert all(torch.equal(value, before[name]) for name, value in loop.state_dict().items())
    assert loop.parts.scene.training
