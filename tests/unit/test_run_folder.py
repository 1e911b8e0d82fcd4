"""A run folder is whole at every moment: names, refusals, resume equality, interruption, failures.

The loop and the exporter are small stand-ins with the real interfaces, so each test takes a moment.
"""

import gc
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toy_run import FAST, ToyLoop, loops

import sds3d.exporting as exporting
import sds3d.run as run_module
from sds3d import checkpoint
from sds3d.errors import CheckpointError, CollapseError, ConfigError, ExportError, InputError, NonFiniteError
from sds3d.events.bus import CheckpointSaved, Event, Finished, PreviewReady, StepDone, Warned
from sds3d.events.log import MetricsLog, Tally
from sds3d.events.preview import Preview, columns_of
from sds3d.events.turntable import write_contact_sheet, write_turntable
from sds3d.job import JobConfig, PreviewConfig
from sds3d.paths import claim_folder, claim_run_folder, safe_slug
from sds3d.run import Stop, export, generate, resume

__all__ = ["loops"]  # a fixture


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Asker:
    """A listener that asks for a stop when a step is done."""

    def __init__(self, stop: Stop, at: int, signal: int | None = 2) -> None:
        self.stop, self.at, self.signal = stop, at, signal

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepDone) and event.step == self.at:
            self.stop.ask(self.signal)


def test_a_run_leaves_a_complete_folder(tmp_path: Path, loops: list[ToyLoop]) -> None:
    events: list[Event] = []
    result = generate(FAST, tmp_path / "run", listeners=[events.append])
    facts = manifest(result.folder)
    assert (result.status, result.steps_done, result.signal) == ("done", 20, None)
    assert (facts["status"], facts["steps_done"], facts["prompt"], facts["seed"]) == (
        "done",
        20,
        "a red mug",
        0,
    )
    assert facts["files"] == {"stl": "asset.stl"}
    assert facts["mesh"] == {"faces": 12}
    assert facts["warnings"] == ["the prior does not know the word 'mug'"]
    assert facts["versions"]["torch"]
    assert [row["step"] for row in metrics(result.folder)] == list(range(1, 21))
    assert [path.name[5:11] for path in checkpoint.listed(result.folder / "checkpoints")] == [
        "000015",
        "000020",
    ]
    assert (result.folder / "config.yaml").read_text().startswith("schema: 1\n")
    with Image.open(result.folder / "preview.png") as picture:
        assert picture.size == (32, 32)
    assert isinstance(events[-1], Finished)
    assert [e.step for e in events if isinstance(e, CheckpointSaved)] == [5, 10, 15, 20]
    assert next(i for i, e in enumerate(events) if isinstance(e, PreviewReady)) < 6
    assert not list(result.folder.rglob(".*"))


@pytest.mark.parametrize("at", [1, 5, 10, 13])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, loops: list[ToyLoop], at: int) -> None:
    whole = generate(FAST, tmp_path / "whole")
    stop = Stop()
    first = generate(FAST, tmp_path / "parts", listeners=[Asker(stop, at)], stop=stop)
    assert (first.status, first.steps_done, first.signal) == ("interrupted", at, 2)
    assert manifest(first.folder)["status"] == "interrupted"
    assert (first.folder / "asset.stl").exists()
    second = resume(first.folder)
    assert second.status == "done"
    assert loops[-1].steps_taken == list(range(at, 20))
    assert torch.equal(loops[-1].x, loops[0].x)
    states = [
        checkpoint.load(checkpoint.listed(r.folder / "checkpoints")[-1]).tensors for r in (whole, second)
    ]
    assert torch.equal(states[0]["scene.x"], states[1]["scene.x"])
    assert (whole.folder / "asset.stl").read_bytes() == (second.folder / "asset.stl").read_bytes()
    assert [row["step"] for row in metrics(second.folder)] == list(range(1, 21))
    assert manifest(second.folder)["status"] == "done"


def test_stop_before_the_first_step_exports_nothing(tmp_path: Path, loops: list[ToyLoop]) -> None:
    stop = Stop()
    stop.ask(15)
    result = generate(FAST, tmp_path / "run", stop=stop)
    assert (result.status, result.steps_done, dict(result.files), result.signal) == ("interrupted", 0, {}, 15)
    assert resume(tmp_path / "run").status == "done"


def test_a_failed_run_keeps_its_checkpoint_and_says_why(
    tmp_path: Path, loops: list[ToyLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToyLoop, "fail_at", 8)
    with pytest.raises(NonFiniteError):
        generate(FAST, tmp_path / "run")
    facts = manifest(tmp_path / "run")
    assert (facts["status"], facts["error"]) == ("failed", "step 8: gradients are not finite")
    assert checkpoint.listed(tmp_path / "run" / "checkpoints")
    monkeypatch.setattr(ToyLoop, "fail_at", None)
    assert resume(tmp_path / "run").status == "done"
    assert manifest(tmp_path / "run")["error"] is None


def test_a_run_that_cannot_be_built_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(job: JobConfig, device: torch.device, source: object = None, start: object = None) -> None:
        raise InputError("no such prior")

    monkeypatch.setattr(run_module, "build_loop", build)
    with pytest.raises(InputError):
        generate(FAST, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_interrupted_run_without_a_surface_is_no_failure(
    tmp_path: Path, loops: list[ToyLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: Any) -> None:
        raise ExportError("the scene is empty")

    monkeypatch.setattr(exporting, "make_asset", nothing)
    stop = Stop()
    result = generate(FAST, tmp_path / "run", listeners=[Asker(stop, 3)], stop=stop)
    assert result.status == "interrupted"
    assert any("no asset yet: the scene is empty" in text for text in result.warnings)
    with pytest.raises(ExportError):
        resume(tmp_path / "run")
    assert manifest(tmp_path / "run")["status"] == "failed"


@pytest.mark.parametrize(("alpha", "word"), [(0.001, "empty"), (0.99, "fully opaque")])
def test_collapse_is_reported_or_stops_the_run(
    tmp_path: Path, loops: list[ToyLoop], monkeypatch: pytest.MonkeyPatch, alpha: float, word: str
) -> None:
    monkeypatch.setattr(ToyLoop, "alpha", alpha)
    events: list[Event] = []
    long = replace(FAST, steps=60)
    result = generate(long, tmp_path / "warn", listeners=[events.append])
    warned = [event for event in events if isinstance(event, Warned) and word in event.message]
    assert len(warned) == 1
    assert word in manifest(result.folder)["collapse"]
    with pytest.raises(CollapseError, match=word):
        generate(replace(long, on_collapse="stop"), tmp_path / "stop")
    assert manifest(tmp_path / "stop")["steps_done"] == 51


def test_a_scene_that_recovers_is_not_collapsed() -> None:
    messages: list[str] = []
    tally = Tally(messages.append, window_steps=10)
    for step in range(1, 40):
        tally(StepDone(step=step, steps=40, grad_norm=1.0, log={"alpha_mean": 0.001 if step < 9 else 0.3}))
    assert (messages, tally.collapse) == ([], None)


@pytest.mark.parametrize("name", ["manifest.json", "notes.txt"])
def test_a_folder_with_anything_in_it_is_refused_untouched(
    tmp_path: Path, loops: list[ToyLoop], name: str
) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        generate(FAST, tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "precious")]
    assert not loops


def test_out_that_is_a_file_is_refused(tmp_path: Path, loops: list[ToyLoop]) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot write here"):
            generate(FAST, out)


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path, loops: list[ToyLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes
    room = {"checkpoints": 1}

    def limited(self: Path, data: bytes) -> int:
        if self.parent.name == "checkpoints":
            room["checkpoints"] -= 1
            if room["checkpoints"] < 0:
                write(self, data[:10])
                raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", limited)
    with pytest.raises(InputError, match="No space left on device"):
        generate(FAST, tmp_path / "run")
    files = list((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in files] == ["step-000005.safetensors"]
    assert checkpoint.load(files[0]).step == 5
    monkeypatch.setattr(Path, "write_bytes", write)
    assert resume(tmp_path / "run").status == "done"


def test_resume_refuses_what_does_not_fit(tmp_path: Path, loops: list[ToyLoop]) -> None:
    stop = Stop()
    folder = generate(FAST, tmp_path / "run", listeners=[Asker(stop, 7)], stop=stop).folder
    config = folder / "config.yaml"
    before = config.read_text()
    config.write_text(before.replace("seed: 0", "seed: 1"))
    with pytest.raises(CheckpointError, match="belongs to other settings"):
        resume(folder)
    config.write_text(before.replace("seed: 0", "sed: 0"))
    with pytest.raises(ConfigError, match="Did you mean seed"):
        resume(folder)
    config.write_text(before.replace("every_s: 1000000.0", "every_s: 9.0"))
    assert resume(folder).status == "done"


@pytest.mark.parametrize("content", [None, "{", "[]", "\x00"])
def test_resume_of_something_else(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        resume(tmp_path)


def test_resume_of_a_finished_run_changes_nothing(tmp_path: Path, loops: list[ToyLoop]) -> None:
    folder = generate(FAST, tmp_path / "run").folder
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    result = resume(folder)
    assert (result.status, result.steps_done, dict(result.files)) == (
        "done",
        20,
        {"stl": folder / "asset.stl"},
    )
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert len(loops) == 1


def test_export_needs_a_checkpoint(tmp_path: Path, loops: list[ToyLoop]) -> None:
    stop = Stop()
    stop.ask()
    folder = generate(FAST, tmp_path / "run", stop=stop).folder
    with pytest.raises(InputError, match="holds no checkpoint"):
        export(folder)


def test_metrics_drop_steps_that_are_done_again_and_broken_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "x"')
    log = MetricsLog(path, after_step=2)
    log(StepDone(step=3, steps=9, grad_norm=float("nan"), log={"a": 1.5}))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["grad_norm"] is None
    assert rows[-1]["a"] == 1.5


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": None},
        {"prompt": ""},
        {"prompt": " \n\t"},
        {"preview": PreviewConfig(turntable_px=33)},
        {"camera": replace(FAST.camera, elevation_deg=(30.0, 10.0))},
        {"penalties": replace(FAST.penalties, scale=type(FAST.penalties.scale).constant(1.0))},
    ],
)
def test_contradictions_are_found_before_anything_is_made(
    tmp_path: Path, loops: list[ToyLoop], changes: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError):
        generate(replace(FAST, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not loops


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="device: got cuda"):
        generate(replace(FAST, device="cuda"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=100))
def test_any_prompt_is_a_safe_name(prompt: str) -> None:
    slug = safe_slug(prompt)
    assert re.fullmatch(r"[a-z0-9](-?[a-z0-9])*-?", slug)
    assert len(slug) <= 49


@pytest.mark.parametrize(
    "prompt",
    [
        "../../etc/passwd",
        "CON",
        "nul",
        "com1",
        ".",
        "..",
        "/",
        "a\x00b",
        "é" * 5000,
        "x" * 5000,
        "赤いマグ",
        "🫖",
        "-rf *",
    ],
)
def test_hard_prompts_make_a_folder_inside_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = claim_run_folder("my/odd config.yaml", prompt)
    assert folder.is_dir()
    assert folder.resolve().parent == tmp_path / "outputs" / "odd-config"


def test_run_folders_of_one_second_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = set()
    for _ in range(3):
        folder = claim_run_folder("default", "a mug")
        (folder / "x").write_text("")
        folders.add(folder)
    assert len(folders) == 3


def test_claiming_an_empty_folder_leaves_no_trace(tmp_path: Path) -> None:
    claim_folder(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())


def test_preview_comes_first_and_then_by_the_clock(tmp_path: Path) -> None:
    now, steps = {"s": 0.0}, []
    preview = Preview(
        tmp_path / "preview.png",
        lambda size, count, azimuth: torch.zeros(count, 3, size, size),
        lambda event: steps.append(event.step),
        every_s=5.0,
        size_px=32,
        clock=lambda: now["s"],
    )
    for step in range(1, 13):
        preview.refresh(step, last=step == 12)
        now["s"] += 1.0
    assert steps == [1, 6, 11, 12]


def test_preview_turns_tiles_and_gives_way_to_the_run(tmp_path: Path) -> None:
    now, asked, steps = {"s": 0.0}, [], []

    def view(size: int, count: int, azimuth: float) -> torch.Tensor:
        asked.append((size, count, azimuth))
        now["s"] += 1.0  # a slow scene
        return torch.zeros(count, 3, size, size)

    preview = Preview(
        tmp_path / "preview.png",
        view,
        lambda event: steps.append((event.step, tuple(event.image.shape))),
        every_s=0.5,
        size_px=64,
        views=12,
        turn_deg=200.0,
        clock=lambda: now["s"],
    )
    for step in range(1, 9):
        preview.refresh(step)
        now["s"] += 1.0
    assert asked == [(16, 12, 0.0), (16, 12, 200.0), (16, 12, 40.0), (16, 12, 240.0)]
    # Pictures take a third of the time.
    assert steps == [(step, (3, 48, 64)) for step in (1, 3, 5, 7)]


@pytest.mark.parametrize(("views", "columns"), [(1, 1), (2, 2), (4, 2), (7, 7), (8, 4), (12, 4), (36, 6)])
def test_preview_columns_divide_the_views(views: int, columns: int) -> None:
    assert columns_of(views) == columns


def test_video_writer_leaves_nothing_open(tmp_path: Path) -> None:
    write_turntable(tmp_path / "t.mp4", (torch.zeros(3, 16, 16) for _ in range(2)), size_px=16)
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == ["t.mp4"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the reader forgets its pipes
@pytest.mark.parametrize("size", [32, 98])
def test_turntable_keeps_its_size(tmp_path: Path, size: int) -> None:
    import imageio_ffmpeg

    path = tmp_path / "t.mp4"
    write_turntable(path, (torch.full((3, size, size), i / 5) for i in range(5)), size_px=size)
    reader = imageio_ffmpeg.read_frames(str(path))
    facts = next(reader)
    frames = list(reader)
    assert facts["size"] == (size, size)
    assert len(frames) == 5
    assert frames[0][0] < 20 < 190 < frames[4][0]
    with pytest.raises(ValueError, match="even size"):
        write_turntable(path, [], size_px=33)


def test_contact_sheet_fills_rows_from_the_left(tmp_path: Path) -> None:
    images = torch.stack([torch.full((3, 8, 8), i / 10) for i in range(4)])
    write_contact_sheet(tmp_path / "sheet.png", images)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (24, 16)
        assert [sheet.getpixel((x, 4))[0] for x in (4, 12, 20)] == [0, 26, 51]
        assert sheet.getpixel((4, 12))[0] == 77
        assert sheet.getpixel((20, 12)) == (255, 255, 255)
