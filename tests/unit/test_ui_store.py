"""The server side of the interface, without a browser and without gradio: root, store, recipes, queue, desk, HTML."""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_run import FAST, ToyLoop, loops  # noqa: F401

from sds3d.cli import main
from sds3d.config.load import config_names
from sds3d.config.option import Chosen, config_class
from sds3d.errors import ConfigError, InputError, Sds3dError
from sds3d.job import JobConfig
from sds3d.run import Stop, generate, resume
from sds3d.ui import html
from sds3d.ui.desk import WAITING_FILE, Desk
from sds3d.ui.forms import Field, entered, sections
from sds3d.ui.jobs import JobQueue
from sds3d.ui.recipe import Recipe, described_configs, word_warnings
from sds3d.ui.roots import Root
from sds3d.ui.store import RunStore
from sds3d.workers.child import perform
from sds3d.workers.task import Outcome, Task, event_as_dict

DUCK = Recipe(settings={"prompt": "a yellow duck", "seed": 3, "steps": 20})
NASTY = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"


class HeldWorker:
    """Waits in every task until it is let go; writes down what it was given."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.go, self.status = threading.Semaphore(0), "done"
        self.closed = False

    def run(
        self, task: Task, on_event: Callable[[Mapping[str, Any]], None], stop: threading.Event | None = None
    ) -> Outcome:
        self.tasks.append(task)
        on_event({"event": "StepDone", "step": 10, "steps": 20, "grad_norm": 2.0, "seconds": 0.5})
        while not self.go.acquire(timeout=0.01):
            if stop is not None and stop.is_set():
                return Outcome(status="interrupted", folder=task.folder)
        if self.status == "raise":
            raise RuntimeError("broken pipe")
        return Outcome(
            status=self.status, folder=task.folder, error=None if self.status == "done" else "no room"
        )

    def close(self) -> None:
        self.closed = True


class HereWorker:
    """Performs tasks in this process, as a worker process would."""

    def run(
        self, task: Task, on_event: Callable[[Mapping[str, Any]], None], stop: threading.Event | None = None
    ) -> Outcome:
        try:
            result = perform(task, lambda event: on_event(event_as_dict(event)), Stop())
        except Sds3dError as error:
            return Outcome(status="failed", folder=task.folder, error=str(error))
        return Outcome(status="done", folder=str(result.folder))

    def close(self) -> None:
        return


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.005)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path / "root")


@pytest.fixture
def held(root: Root) -> Any:
    worker = HeldWorker()
    desk = Desk(root, JobQueue(lambda: worker, max_waiting=3))
    yield desk, worker
    desk.queue.close()


def test_nothing_here_needs_gradio() -> None:
    code = (
        "import sys, sds3d.ui.desk, sds3d.ui.html, sds3d.ui.forms, sds3d.ui.looks, sds3d.ui.serve;"
        "sys.exit('gradio' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The root


@pytest.mark.parametrize(
    "run_id", ["", ".", "..", "../x", "a/../../x", "/etc", "a\0b", ".hidden", "x" * 600, "~/x"]
)
def test_only_ids_below_the_root_name_runs(root: Root, run_id: str) -> None:
    with pytest.raises(InputError, match="no such run"):
        RunStore(root).record(run_id)


def test_links_do_not_lead_out(root: Root, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "manifest.json").write_text('{"prompt": "secret"}')
    (root.path / "link").symlink_to(outside)
    store = RunStore(root)
    assert store.runs() == []
    with pytest.raises(InputError):
        store.record("link")
    with pytest.raises(InputError):
        store.delete("link")
    assert (outside / "manifest.json").exists()


def test_a_manifest_cannot_point_outside(root: Root, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    folder = root.path / "run"
    folder.mkdir()
    files = {"glb": "../../secret.txt", "obj": str(tmp_path / "secret.txt"), "stl": "manifest.json"}
    stages = [{"folder": "../.."}, {"folder": str(tmp_path)}, 7]
    (folder / "manifest.json").write_text(json.dumps({"files": files, "stages": stages, "steps": "many"}))
    store = RunStore(root)
    record = store.record("run")
    assert (set(record.files), record.steps, record.current) == ({"stl"}, 0, folder)
    for name in ("glb", "obj", "../../secret.txt", "config"):
        with pytest.raises(InputError, match="holds no file"):
            store.file("run", name)


def text_settings(cls: Any, path: str = "", depth: int = 0) -> set[str]:
    """Names of all free-text settings that are not marked as paths."""
    found: set[str] = set()
    hints = get_type_hints(cls)
    for spec in fields(cls):
        if not spec.init:
            continue
        hint = hints[spec.name]
        members = [hint, *get_args(hint)]
        for member in (m for m in members if is_dataclass(m) and m is not Chosen):
            found |= text_settings(member, f"{path}{spec.name}.", depth)
        if hint is Chosen and depth < 2:
            for entry in spec.metadata["kinds"]().values():
                found |= text_settings(config_class(entry), f"{path}{spec.name}.", depth + 1)
        if str in members and get_origin(hint) is not Literal and not spec.metadata.get("path"):
            found.add(f"{path}{spec.name}")
    return found


def test_every_text_setting_is_a_path_or_known_to_be_none() -> None:
    words = {name.rpartition(".")[2] for name in text_settings(JobConfig)}
    known = {"prompt", "negative_prompt", "plus", "minus", "negative", "source_prompt"}  # words for the prior
    known |= {"formats", "splat_formats", "name", "revision"}  # checked by their own config or by the root
    assert words <= known, (
        "a new text setting: mark it with option(path=True), or add it here if it names no file"
    )


@pytest.mark.parametrize(
    "bad",
    [
        {"edit.run": "/etc"},
        {"edit.run": "../../etc"},
        {"start.run": "/"},
        {"start.mesh": "/etc/passwd"},
        {"prior.name": "/etc"},
        {"prior.name": "../priors/toybox"},
        {"prior.name": "someone/model"},
        {"prior.revision": "../../x"},
        {"prior.vae": "/tmp"},
        {"prior.loras": [{"path": "/etc/passwd"}]},
        {"prior.textual_inversions": ["relative.safetensors"]},
        {"prior.image_prompt": {"image": "~/picture.png"}},
        {"prior.controls": [{"path": "/srv/net", "kind": "depth"}]},
        {"guidance.kind": "reward", "guidance.reward": {"kind": "clip", "folder": "/etc"}},
        {"export.name": "../../asset"},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_settings_that_lead_outside_are_refused(root: Root, bad: dict[str, Any]) -> None:
    recipe = DUCK.with_all(bad)
    with pytest.raises((ConfigError, InputError)):
        recipe.jobs(root)
    with pytest.raises((ConfigError, InputError)):
        Recipe.from_yaml(recipe.to_yaml()).jobs(root)


def test_runs_inside_may_be_named_by_their_id(root: Root) -> None:
    (root.path / "default" / "before").mkdir(parents=True)
    job = DUCK.with_all({"start.run": "default/before"}).jobs(root)[0]
    assert job.start.run == str(root.path / "default" / "before")


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../default", "default.yaml", "no-such", "", "outputs/x.yaml"]
)
def test_configs_are_names_only(root: Root, name: str) -> None:
    with pytest.raises(ConfigError, match="unknown config"):
        replace(DUCK, config=name).jobs(root)
    with pytest.raises(ConfigError, match="unknown config"):
        Recipe.from_yaml(f"extends: {json.dumps(name)}")


# Recipes


def test_a_recipe_survives_yaml() -> None:
    recipe = DUCK.with_all(
        {
            "guidance.kind": "ism",
            "guidance.cfg_scale": 4.5,
            "time.low": {"from": 0.6, "to": 0.2},
            "camera.batch": 2,
        }
    )
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert next(iter(recipe.settings)) == "guidance.kind"  # before what it would drop


@given(text=st.text(max_size=200), negative=st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_prompt_survives_yaml_and_html(text: str, negative: str) -> None:
    recipe = Recipe(settings={"prompt": text, "negative_prompt": negative})
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    shown = html.notice(text) + html.log([text]) + html.run_link(text, "open", text)
    assert "<script" not in shown.lower() or "<script" not in text.lower()


@pytest.mark.parametrize(
    "text", ["- a\n- b", "a: [1", "prompt: !!python/object:os.system x", "x" * 70_000, "a: &b [*b]"]
)
def test_yaml_that_is_no_config_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Recipe.from_yaml(text)


def test_the_command_makes_the_same_run(root: Root, loops: list[ToyLoop]) -> None:  # noqa: F811
    recipe = DUCK.with_all(
        {
            "device": "cpu",
            "guidance.cfg_scale": 7.5,
            "camera.elevation_deg": [-5, 30],
            "preview.turntable_frames": 0,
        }
    )
    words = shlex.split(recipe.command())
    assert words[0] == "sds3d"
    assert main([*words[1:], "--out", str(root.path / "cli")]) == 0
    assert replace(loops[-1].job, device="auto") == replace(recipe.jobs(root)[0], device="auto")


def test_settings_come_back_from_a_run(root: Root, loops: list[ToyLoop]) -> None:  # noqa: F811
    recipe = DUCK.with_all({"guidance.kind": "ism", "penalties.opacity": 3.0, "device": "cpu"})
    generate(recipe.jobs(root)[0], root.path / "one", config_name="default")
    found = Recipe.of_run(RunStore(root).record("one"))
    assert found.jobs(root)[0] == recipe.jobs(root)[0]
    assert not any(key.startswith("optimizer") for key in found.settings)  # only what differs from the preset


def test_presets_are_described_and_valid(root: Root) -> None:
    names = [name for name, text in described_configs() if text]
    assert {"default", "fast", "quality", "gaussians", "toybox/ism"} <= set(names) <= set(config_names())
    for name in ("default", "fast", "quality", "toybox/quality", "gaussians"):
        assert replace(DUCK, config=name).jobs(root)


def test_unknown_words_are_told(root: Root) -> None:
    lines = word_warnings(DUCK.with_all({"prompt": "a yelow dragon"}), root)
    assert ["'yelow'" in lines[0], "'dragon'" in lines[1], len(lines)] == [True, True, 2]
    assert word_warnings(DUCK, root) == []


def test_every_setting_of_the_drawer_round_trips(root: Root) -> None:
    job = DUCK.jobs(root)[0]
    found = sections(job)
    entries = [entry for part in found.values() for entry in part]
    assert len(entries) > 80
    assert sum(bool(entry.help) for entry in entries) > 70
    same = DUCK.with_all({e.key: entered(e, e.value) for e in entries if not e.key.startswith("preview.")})
    assert same.jobs(root)[0] == job


def test_the_drawer_refuses_what_is_no_yaml() -> None:
    entry = Field(key="time.low", kind="yaml", value="0.2")
    assert entered(entry, "{from: 0.5, to: 0.1}") == {"from": 0.5, "to": 0.1}
    with pytest.raises(ConfigError, match=r"time\.low"):
        entered(entry, "{from: ")


# The queue


def test_jobs_wait_in_order_and_tell_their_position(held: tuple[Desk, HeldWorker]) -> None:
    desk, worker = held
    ids = [desk.submit(DUCK.with_all({"seed": seed})) for seed in range(3)]
    until(lambda: len(worker.tasks) == 1)
    assert len(set(ids)) == 3
    assert [desk.status(run)["status"] for run in ids] == ["running", "waiting", "waiting"]
    assert [desk.ahead(run) for run in ids] == [0, 1, 2]
    assert (desk.status(ids[0])["step"], desk.status(ids[0])["seconds_left"]) == (10, 5.0)
    worker.go.release()
    until(lambda: len(worker.tasks) == 2)
    assert [desk.ahead(run) for run in ids] == [0, 0, 1]
    assert worker.tasks[0].settings["preview.every_s"] <= 1.0


def test_a_full_queue_says_so_and_leaves_nothing(held: tuple[Desk, HeldWorker], root: Root) -> None:
    desk, worker = held
    desk.submit(DUCK)
    until(lambda: len(worker.tasks) == 1)
    for _ in range(3):
        desk.submit(DUCK)
    before = sorted(root.path.rglob("*"))
    with pytest.raises(InputError, match="queue is full"):
        desk.submit(DUCK)
    assert sorted(root.path.rglob("*")) == before


def test_stop_ends_a_running_job_and_takes_out_a_waiting_one(
    held: tuple[Desk, HeldWorker], root: Root
) -> None:
    desk, worker = held
    first, second = desk.submit(DUCK), desk.submit(DUCK)
    until(lambda: len(worker.tasks) == 1)
    assert desk.stop(second)
    assert desk.view(second).status == "cancelled"
    assert not (root.path / second).exists()
    assert desk.stop(first)
    until(lambda: desk.view(first).status == "interrupted")
    assert not desk.stop(first)
    assert len(worker.tasks) == 1


@pytest.mark.parametrize(
    ("end", "status", "words"), [("failed", "failed", "no room"), ("raise", "died", "broken pipe")]
)
def test_a_job_that_fails_does_not_end_the_queue(
    held: tuple[Desk, HeldWorker], end: str, status: str, words: str
) -> None:
    desk, worker = held
    worker.status = end
    run = desk.submit(DUCK)
    worker.go.release()
    until(lambda: desk.view(run).status == status)
    assert words in desk.status(run)["error"]
    assert words in html.progress(desk.view(run))
    worker.status = "done"
    again = desk.submit(DUCK)
    worker.go.release()
    until(lambda: desk.view(again).status == "done")


def test_one_job_per_run(held: tuple[Desk, HeldWorker], root: Root, loops: list[ToyLoop]) -> None:  # noqa: F811
    generate(FAST, root.path / "one")
    desk, worker = held
    desk.export("one", ["glb", "obj"], {"export.max_faces": 500})
    until(lambda: len(worker.tasks) == 1)
    with pytest.raises(InputError, match="running already"):
        desk.export("one", ["stl"])
    with pytest.raises(InputError, match="stop it first"):
        desk.delete("one")
    assert worker.tasks[0] == Task(
        kind="export",
        folder=str(root.path / "one"),
        settings={"export.max_faces": 500},
        formats=("glb", "obj"),
    )


@pytest.mark.parametrize(
    ("formats", "wanted"),
    [
        (["exe"], {}),
        (["glb"], {"export.max_faces": 1}),
        ([], {"export.texture_px": 300}),
        ([], {"prompt": "x"}),
    ],
)
def test_wrong_exports_are_refused(
    held: tuple[Desk, HeldWorker],
    root: Root,
    loops: list[ToyLoop],  # noqa: F811
    formats: list[str],
    wanted: dict[str, Any],
) -> None:
    generate(FAST, root.path / "one")
    with pytest.raises(ConfigError):
        held[0].export("one", formats, wanted)


def test_what_waited_is_taken_up_after_a_restart(root: Root) -> None:
    worker = HeldWorker()
    desk = Desk(root, JobQueue(lambda: worker))
    ids = [desk.submit(DUCK.with_all({"seed": seed})) for seed in range(3)]
    until(lambda: len(worker.tasks) == 1)
    desk.close()
    assert worker.closed
    assert len(worker.tasks) == 1
    rows = json.loads((root.path / WAITING_FILE).read_text())
    rows.append({"run": "../../etc", "task": rows[0]["task"]})
    rows.append({"run": ids[0], "task": {**rows[0]["task"], "folder": "/etc"}})
    (root.path / WAITING_FILE).write_text(json.dumps(rows))
    next_worker = HeldWorker()
    later = Desk(root, JobQueue(lambda: next_worker))
    for _ in range(2):
        next_worker.go.release()
    until(lambda: len(next_worker.tasks) == 2 and not later.queue.active())
    later.close()
    assert [later.root.id_of(Path(task.folder)) for task in next_worker.tasks] == ids[1:]


# Whole runs through the desk


def test_runs_of_the_command_line_and_of_the_page_are_the_same(
    root: Root,
    loops: list[ToyLoop],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(root, JobQueue(HereWorker))
    stop = Stop()
    listener: Any = lambda event: stop.ask() if getattr(event, "step", 0) >= 7 else None  # noqa: E731
    assert generate(FAST, root.path / "cli", listeners=[listener], stop=stop).status == "interrupted"
    view = desk.view("cli")
    assert (view.status, view.can_resume, view.record is not None and view.record.steps_done) == (
        "interrupted",
        True,
        7,
    )
    desk.resume("cli")
    until(lambda: desk.view("cli").status == "done")
    made = desk.submit(DUCK.with_all({"device": "cpu", "preview.turntable_frames": 0}))
    until(lambda: desk.view(made).status == "done")
    assert resume(root.path / made).status == "done"
    assert [record.id for record in desk.store.runs("yellow duck done")] == [made]
    assert desk.store.runs("nothing like it") == []
    found = desk.result(made)
    assert (found["files"], found["mesh"]) == ({"stl": "asset.stl"}, {"faces": 12})
    desk.delete("cli")
    assert not (root.path / "cli").exists()
    desk.close()


def test_a_run_that_nobody_runs_can_be_resumed(root: Root, loops: list[ToyLoop]) -> None:  # noqa: F811
    generate(FAST, root.path / "one")
    path = root.path / "one" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "status": "running"}))
    desk = Desk(root, JobQueue(HeldWorker))
    view = desk.view("one")
    assert (view.status, view.can_resume, view.can_stop) == ("unfinished", True, False)
    desk.close()


def test_metrics_are_thinned(root: Root, loops: list[ToyLoop]) -> None:  # noqa: F811
    generate(FAST, root.path / "one")
    rows = RunStore(root).metrics("one", limit=5)
    assert rows[-1]["step"] == 20
    assert len(rows) <= 8


def test_listing_survives_what_else_lies_there(root: Root, loops: list[ToyLoop]) -> None:  # noqa: F811
    generate(FAST, root.path / "a" / "one")
    for name, text in (("b/two", "{"), ("c", "[]"), ("d/e/f/g/h", "{}")):
        (root.path / name).mkdir(parents=True)
        (root.path / name / "manifest.json").write_text(text)
    (root.path / "a" / "one" / "stages").mkdir()
    (root.path / ".trash").mkdir()
    (root.path / ".trash" / "manifest.json").write_text("{}")
    assert [record.id for record in RunStore(root).runs()] == ["a/one"]


# HTML


def test_prompts_cannot_become_markup(held: tuple[Desk, HeldWorker], root: Root) -> None:
    desk, worker = held
    run = desk.submit(DUCK.with_all({"prompt": NASTY}))
    until(lambda: len(worker.tasks) == 1)
    folder = root.path / "x"
    folder.mkdir()
    facts = {"prompt": NASTY, "config": NASTY, "started": NASTY, "error": NASTY, "warnings": [NASTY]}
    facts |= {
        "mesh": {NASTY: NASTY},
        "files": {NASTY: "manifest.json", "glb": "manifest.json"},
        "status": NASTY,
    }
    (folder / "manifest.json").write_text(json.dumps(facts))
    record = desk.store.record("x")
    pieces = [
        html.progress(desk.view(run)),
        html.progress(desk.view("x")),
        html.queue_list(desk.queue.active(), ""),
        html.gallery([record], {}),
        html.statistics(record),
        html.downloads(record),
        html.comparison(record, record, [(NASTY, NASTY, NASTY)]),
        html.picture("data:,", 12, 0.0, NASTY),
        html.video(record),
        html.log([NASTY]),
        html.warnings_box([NASTY]),
    ]
    for piece in pieces:
        assert not re.search(r"<script|<img src=x|onerror=alert\(2\)>", piece), piece
        assert re.fullmatch(r"(?:[^<]|<[^<>]*>)*", piece, re.DOTALL), piece  # every < opens a tag that ends


def test_files_of_several_parts_belong_together(root: Root) -> None:
    folder = root.path / "one"
    folder.mkdir()
    for name in (
        "asset.obj",
        "asset.mtl",
        "asset_base_color.png",
        "asset.glb",
        "preview.png",
        "contact_sheet.png",
    ):
        (folder / name).write_bytes(b"x")
    (folder / "manifest.json").write_text(json.dumps({"files": {"obj": "asset.obj", "glb": "asset.glb"}}))
    store = RunStore(root)
    assert [p.name for p in store.companions("one", "obj")] == [
        "asset.mtl",
        "asset.obj",
        "asset_base_color.png",
    ]
    assert [p.name for p in store.companions("one", "glb")] == ["asset.glb"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_root_that_cannot_be_made_is_told() -> None:
    with pytest.raises(InputError, match="cannot be used"):
        Root(Path("/proc/none"))
