"""Workers: tasks as JSON lines, events on the way, deaths survived, one prior for many runs."""

import io
import json
import math
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from sds3d.config.load import resolve
from sds3d.errors import ConfigError, InputError
from sds3d.events.bus import PhaseStarted, PreviewReady, StepDone
from sds3d.job import JobConfig
from sds3d.priors import PriorConfig, load_prior
from sds3d.priors.shelf import keeping_priors
from sds3d.run import Stop
from sds3d.workers.child import answer, serve
from sds3d.workers.process import WorkerProcess
from sds3d.workers.task import Task, event_as_dict, layers_of

TASK = Task(
    kind="generate",
    folder="runs/ä b",
    config="fast",
    settings={"prompt": 'a "red" mug\n#', "camera.batch": 2},
    formats=("glb",),
)


def test_a_task_survives_its_line() -> None:
    line = TASK.to_json()
    assert "\n" not in line
    assert Task.from_json(line) == TASK


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"kind": "generate"}',
        '{"kind": "erase", "folder": "a"}',
        '{"kind": "resume", "folder": "a", "x": 1}',
    ],
)
def test_what_is_no_task_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="task"):
        Task.from_json(text)


def test_settings_become_layers_and_texts_stay_texts() -> None:
    wanted = {"prompt": "7: [x}", "seed": 3, "camera.elevation_deg": [0, 10], "scene": {"kind": "nerf"}}
    job = resolve(JobConfig, layers_of(wanted)).config
    assert (job.prompt, job.seed, job.scene.kind) == ("7: [x}", 3, "nerf")
    assert tuple(job.camera.elevation_deg) == (0, 10)


@pytest.mark.parametrize(
    "settings", [{"a b": 1}, {"seed=1\nprompt": 2}, {"seed": math.nan}, {"seed": {1, 2}}]
)
def test_settings_that_are_no_data_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="settings"):
        layers_of(settings)


def test_events_become_json_without_pictures_and_without_nan() -> None:
    step = event_as_dict(
        StepDone(step=1, steps=2, grad_norm=math.inf, log={"alpha_mean": math.nan, "b": 2.0})
    )
    assert step["event"] == "StepDone"
    assert step["grad_norm"] is None
    assert step["log"] == {"alpha_mean": None, "b": 2.0}
    shown = event_as_dict(PreviewReady(step=1, image=torch.zeros(3, 2, 2), path=Path("a.png")))
    assert shown == {"event": "PreviewReady", "step": 1, "path": "a.png"}
    assert json.loads(json.dumps(event_as_dict(PhaseStarted(name="x")))) == {
        "event": "PhaseStarted",
        "name": "x",
    }


def test_a_failed_task_is_an_outcome_with_the_users_message(tmp_path: Path) -> None:
    task = Task(kind="generate", folder=str(tmp_path / "a"), config="no-such-config")
    outcome = answer(task, lambda message: None, Stop())
    assert (outcome.status, outcome.exit_code) == ("failed", 2)
    assert outcome.error is not None
    assert "no-such-config" in outcome.error
    assert not (tmp_path / "a").exists()


def test_a_defect_is_an_outcome_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("here")

    monkeypatch.setattr("sds3d.workers.child.perform", broken)
    outcome = answer(TASK, lambda message: None, Stop())
    assert (outcome.status, outcome.exit_code, outcome.error) == (
        "failed",
        1,
        "internal error: ZeroDivisionError: here",
    )
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_lines_that_are_no_tasks_do_not_end_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    task = Task(kind="resume", folder=str(tmp_path))
    lines = io.StringIO(f'nonsense\n{{"task": {{}}}}\n{{"task": {task.to_json()}}}\n')
    out = io.StringIO()
    serve(lines, out)
    said = [json.loads(line) for line in out.getvalue().splitlines()]
    assert list(said[0]) == ["ready"]
    assert [list(line) for line in said[1:]] == [["outcome"]]
    assert "not a run folder" in said[1]["outcome"]["error"]
    assert capsys.readouterr().err.count("not understood") == 2


def test_priors_are_loaded_once_inside_the_block_only() -> None:
    device, config = torch.device("cpu"), PriorConfig()
    with keeping_priors():
        first = load_prior(config, device)
        assert load_prior(config, device) is first
        flow = load_prior(PriorConfig(as_flow=True), device)
        assert flow is not first
        assert load_prior(config, device) is not first
    assert load_prior(config, device) is not load_prior(config, device)


def test_a_process_answers_dies_and_comes_back(tmp_path: Path) -> None:
    worker = WorkerProcess(env={"OMP_NUM_THREADS": "1"})
    events: list[Any] = []
    try:
        lost = Task(kind="resume", folder=str(tmp_path / "none"))
        outcome = worker.run(lost, events.append)
        assert outcome.status == "failed"
        assert outcome.error is not None
        assert "not a run folder" in outcome.error
        first = worker.pid
        assert worker.run(lost, events.append).status == "failed"
        assert worker.pid == first

        run = Task(
            kind="generate",
            folder=str(tmp_path / "run"),
            config="fast",
            settings={
                "prompt": "a red mug",
                "steps": 4,
                "checkpoint.every_steps": 2,
                "preview.turntable_frames": 0,
            },
        )

        def kill(event: Any) -> None:
            events.append(event)
            if event["event"] == "CheckpointSaved":
                os.kill(first or 0, signal.SIGKILL)

        outcome = worker.run(run, kill)
        assert outcome.status == "died"
        assert outcome.error is not None
        assert "signal 9" in outcome.error
        stop = threading.Event()
        stop.set()  # asked before the first step: the run ends where it stands, and stays resumable
        again = Task(kind="resume", folder=run.folder)
        stopped = worker.run(again, events.append, stop)
        assert stopped.status in ("interrupted", "done")
        assert worker.pid != first
        assert worker.run(again, events.append).status == "done"
    finally:
        worker.close()
    assert worker.pid is None
