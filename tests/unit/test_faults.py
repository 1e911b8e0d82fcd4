"""Faults put in on purpose: numbers that are not finite, torn files, jumping clocks, two processes on one run."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_run import FAST, ToyLoop, loops

from sds3d import checkpoint
from sds3d.errors import CheckpointError, InputError, NonFiniteError
from sds3d.events.bus import Warned
from sds3d.optimize import Loop
from sds3d.paths import LOCK_NAME, locked
from sds3d.recovery import CALM, DOUBTFUL, SLOWEST, Recovery
from sds3d.run import Stop, export, generate, resume
from tests.toys import CANVAS_TARGET, canvas_loop

__all__ = ["loops"]  # a fixture


def put_nan(loop: Loop, place: str, steps: range) -> None:
    """From now on, NaN where `place` says, in the steps of this range."""
    parts = loop.parts

    def spoil(values: Tensor) -> Tensor:
        return values * float("nan") if loop.index in steps else values

    if place == "render":
        render = parts.scene.render
        parts.scene.render = lambda *a, **k: replace(  # type: ignore[method-assign]
            view := render(*a, **k), rgb=spoil(view.rgb)
        )
    else:
        eps = parts.prior.eps
        parts.prior.eps = lambda *a: tuple(spoil(e) for e in eps(*a))  # type: ignore[method-assign]


@pytest.mark.parametrize("hold", [1, 3])
@pytest.mark.parametrize("place", ["render", "prior"])
def test_nan_is_seen_in_its_own_step_and_undone(place: str, hold: int) -> None:
    loop, told = canvas_loop(steps=200, hold=hold), []
    put_nan(loop, place, range(31, 32))
    loop.run(31, told.append)
    before, held = loop.parts.scene.image.detach().clone(), dict(loop.parts.guide.held)
    loop.run(32, told.append)
    bad = hold == 1 or place == "render"  # a held target asks the prior at its first step only
    assert torch.equal(before, loop.parts.scene.image) == bad
    assert int(loop.parts.optimizer.nonfinite) == bad
    assert loop.parts.optimizer.lr_scale == (0.5 if bad else 1.0)
    messages = [event.message for event in told if isinstance(event, Warned)]
    assert [m for m in messages if m.startswith("step 32: gradients are not finite")] == messages[: int(bad)]
    assert bool(loop.parts.guide.held) == (hold > 1 and not bad and bool(held))
    loop.run(200, told.append)
    assert loop.parts.optimizer.lr_scale == 1.0  # 50 good steps later
    assert (loop.parts.scene.image.detach() - CANVAS_TARGET).abs().max() < 0.2


def test_a_spoiled_state_is_rolled_back_to_the_last_good_one() -> None:
    loop, told = canvas_loop(steps=120), []
    loop.run(40, told.append)
    loop.recovery.remember(loop.state_dict())
    good = loop.parts.scene.image.detach().clone()
    loop.run(45, told.append)
    with torch.no_grad():
        loop.parts.scene.image[0, 0, 0] = float("inf")  # from here on every gradient is NaN
    loop.run(45 + DOUBTFUL, told.append)
    assert torch.equal(loop.parts.scene.image, good)
    assert loop.index == 45 + DOUBTFUL
    assert any("back to the last good state" in e.message for e in told if isinstance(e, Warned))
    loop.run(120, told.append)
    assert torch.isfinite(loop.parts.scene.image).all()
    assert int(loop.parts.optimizer.nonfinite) == DOUBTFUL  # the count survives the rollback


def test_the_doubted_state_is_not_remembered_and_the_rate_has_a_floor() -> None:
    recovery = Recovery()
    recovery.remember({"good": torch.zeros(1)})
    assert [recovery.after(False) for _ in range(2 * DOUBTFUL)] == 2 * (
        ["undo"] * (DOUBTFUL - 1) + ["roll back"]
    )
    recovery.remember({"bad": torch.zeros(1)})
    assert recovery.remembered is not None
    assert list(recovery.remembered) == ["good"]
    for _ in range(20):
        recovery.after(False)
    assert recovery.lr_scale == SLOWEST
    for _ in range(6 * CALM):
        assert recovery.after(True) == "go on"
    assert recovery.lr_scale == 1.0


def test_the_lowered_rate_travels_in_the_checkpoint() -> None:
    whole, half = canvas_loop(steps=40), canvas_loop(steps=40)
    for loop in (whole, half):
        put_nan(loop, "prior", range(10, 11))
    half.run(20, lambda event: None)
    again = canvas_loop(steps=40)
    again.load_state_dict(half.state_dict())
    assert again.parts.optimizer.lr_scale == 0.5
    again.run(40, lambda event: None)
    whole.run(40, lambda event: None)
    assert torch.equal(whole.parts.scene.image, again.parts.scene.image)


def test_nan_for_good_ends_the_run_with_an_asset_all_the_same(
    tmp_path: Path, loops: list[ToyLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToyLoop, "fail_at", 12)
    with pytest.raises(NonFiniteError):
        generate(FAST, tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["status"], manifest["files"]) == ("failed", {"stl": "asset.stl"})
    assert (tmp_path / "run" / "asset.stl").is_file()


def stopped_at(step: int, folder: Path) -> None:
    """A run that was asked to stop after this step."""
    stop = Stop()
    ask = [lambda event: stop.ask() if getattr(event, "step", 0) == step else None]
    generate(FAST, folder, listeners=ask, stop=stop)


def tear(path: Path) -> None:
    """As a disk leaves a file whose end was never written."""
    path.write_bytes(path.read_bytes()[:-100])


def test_a_torn_checkpoint_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, loops: list[ToyLoop]
) -> None:
    whole = generate(FAST, tmp_path / "whole")
    stop = Stop()
    generate(
        FAST,
        tmp_path / "run",
        listeners=[lambda e: stop.ask() if getattr(e, "step", 0) == 13 else None],
        stop=stop,
    )
    first, last = checkpoint.listed(tmp_path / "run" / "checkpoints")
    tear(last)
    told: list[Any] = []
    result = resume(tmp_path / "run", listeners=[told.append])
    assert loops[-1].steps_taken[0] == 10  # step-000010 is `first`
    messages = [event.message for event in told if isinstance(event, Warned)]
    assert any(last.name in m and "damaged" in m and first.name in m for m in messages)
    assert result.files["stl"].read_bytes() == whole.files["stl"].read_bytes()


def test_only_torn_checkpoints_are_an_error_that_deletes_nothing(
    tmp_path: Path, loops: list[ToyLoop]
) -> None:
    stopped_at(7, tmp_path / "run")
    for path in checkpoint.listed(tmp_path / "run" / "checkpoints"):
        tear(path)
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    for action in (resume, export):
        with pytest.raises(CheckpointError, match="damaged"):
            action(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before


def test_clocks_that_jump_change_nothing(
    tmp_path: Path, loops: list[ToyLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generate(FAST, tmp_path / "whole")
    now = {"time": 2e9, "calls": 0}

    def jumping() -> float:
        now["calls"] += 1
        now["time"] += 86_400.0 if now["calls"] % 2 else -172_800.0
        return now["time"]

    monkeypatch.setattr(time, "time", jumping)
    jumped = generate(FAST, tmp_path / "run")
    assert jumped.files["stl"].read_bytes() == whole.files["stl"].read_bytes()
    assert 0.0 <= jumped.seconds < 60.0


def test_a_second_process_on_one_run_folder_is_refused(tmp_path: Path, loops: list[ToyLoop]) -> None:
    stop = Stop()
    stop.ask()
    folder = generate(FAST, tmp_path / "run", stop=stop).folder
    script = (
        "import sys, pathlib\nfrom sds3d.paths import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n  print('in', flush=True)\n  sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        before = (folder / "manifest.json").read_bytes()
        with pytest.raises(InputError, match=f"process {other.pid} is working on this run"):
            resume(folder)
        assert (folder / "manifest.json").read_bytes() == before
        other.kill()  # a dead process holds nothing
    assert resume(folder).status == "done"


def test_a_lock_is_left_clean(tmp_path: Path) -> None:
    with locked(tmp_path):
        assert (tmp_path / LOCK_NAME).read_text() == f"{os.getpid()}\n"
        with pytest.raises(InputError, match="is working on this run"), locked(tmp_path):
            raise AssertionError("two were let in")
    assert not list(tmp_path.iterdir())
