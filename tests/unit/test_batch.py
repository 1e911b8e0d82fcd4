"""Batches: faults with their lines before anything starts, stable names, a ledger that survives, files kept inside."""

import csv
import io
import json
import os
import threading
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from toy_batch import FAILS, assets, driven, toy_job, toy_run

from sds3d.batch.attempt import attempt, serve_order
from sds3d.batch.drive import Board, worth_another
from sds3d.batch.engine import Progress
from sds3d.batch.entries import read_batch, sweep_of
from sds3d.batch.files import root_folders
from sds3d.batch.ledger import Ledger
from sds3d.batch.local import LocalEngine, share
from sds3d.batch.order import Job, Order, Result
from sds3d.batch.plan import Rules, job_config, make_jobs
from sds3d.batch.report import as_csv, mark_best, write_report
from sds3d.batch.run import BatchConfig, plan_batch, run_batch, slurm_options
from sds3d.batch.score import score_of, scorer_of
from sds3d.batch.storage import RemoteStorage, SharedFolder, SupersededError, open_storage
from sds3d.batch.table import BatchTable
from sds3d.cli import main
from sds3d.config.option import Chosen, config_class, default_of
from sds3d.errors import ConfigError, InputError
from sds3d.job import JobConfig
from sds3d.paths import inside_root, locked, safe_slug
from sds3d.workers.process import WorkerProcess


def jobs_of(path: Path, text: str, **rules: Any) -> list[Job]:
    path.write_text(text, encoding="utf-8")
    roots = root_folders(path, path.parent / "out", [])
    return make_jobs(read_batch(path), Rules(**rules), path.parent.resolve(), roots)


def test_prompts_one_per_line_and_twice_the_same(tmp_path: Path) -> None:
    text = "\ufeff# toys\r\na red mug\r\n\r\n  赤い #1  \na red mug\nCON\n../../etc/passwd\n"
    jobs = jobs_of(tmp_path / "p.txt", text)
    assert [job.prompt for job in jobs] == ["a red mug", "赤い #1", "a red mug", "CON", "../../etc/passwd"]
    assert jobs[2].id == f"{jobs[0].id}-2"
    assert len({job.id for job in jobs}) == 5
    assert all(safe_slug(job.id, 80) == job.id for job in jobs)
    assert [job.origin.rpartition(":")[2] for job in jobs] == ["2", "4", "5", "6", "7"]


def test_names_stay_when_lines_move_and_change_with_settings(tmp_path: Path) -> None:
    first = jobs_of(tmp_path / "a.txt", "a red mug\na yellow duck\n")
    moved = jobs_of(tmp_path / "a.txt", "a blue car\na yellow duck\na red mug\n")
    assert first[0].id == moved[2].id
    other = jobs_of(tmp_path / "a.yaml", "- {prompt: a red mug, steps: 77}")
    assert other[0].id != first[0].id
    where = jobs_of(tmp_path / "a.yaml", "- {prompt: a red mug, device: cpu, checkpoint.every_steps: 7}")
    assert where[0].id == first[0].id


def test_sweeps_multiply_and_candidates_share_a_group(tmp_path: Path) -> None:
    text = "sweep: {guidance.cfg_scale: [7.5, 30], seed: [4, 5]}\njobs:\n"
    text += "- a red mug\n- {prompt: a dog, sweep: {steps: [9]}}"
    jobs = jobs_of(tmp_path / "a.yaml", text, best_of=3)
    assert len(jobs) == 2 * 4 * 3
    assert len({job.group for job in jobs}) == 8
    first = [job for job in jobs if job.group == jobs[0].group]
    assert [job.seed for job in first] == [4, 5, 6]
    assert [job.id for job in first] == [f"{first[0].group}-seed{seed}" for seed in (4, 5, 6)]
    assert jobs[0].varied == {"guidance.cfg_scale": 7.5, "seed": 4}
    config = job_config(jobs[-1])
    assert (config.prompt, config.steps, config.seed) == ("a dog", 9, 7)
    assert config.guidance.config.cfg_scale == 30


def test_a_job_holds_its_whole_config(tmp_path: Path) -> None:
    text = '- {prompt: "a: #mug\\u2028{", config: toybox/quality, stages: {coarse: {steps: 9}}}'
    job = jobs_of(tmp_path / "a.yaml", text)[0]
    names = [stage["name"] for stage in job.settings["stages"]]
    assert names == ["coarse", "geometry", "texture"]
    assert job.settings["stages"][0]["steps"] == 9
    assert job.steps == 9 + 300 + 300
    assert job_config(job).prompt == "a: #mug\u2028{"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {prompt: a, stepz: 3}", ":1: stepz: unknown field"),
        ("- a\n- {name: x}", ":2: prompt: required"),
        ("- a\n- [b]", ":2: jobs: got a list"),
        ("- {prompt: a, steps: 0}", ":1: steps: got 0"),
        ("- {prompt: a, guidance: dds}", ":1: guidance.kind 'dds' edits"),
        ("- {prompt: a, config: nope}", ":1: config: unknown config 'nope'"),
        ("- {prompt: ' '}", ":1: prompt: empty"),
        ('- {prompt: "a\\0b"}', "control characters"),
        ("jobz: [a]", "jobz: unknown here. Did you mean jobs?"),
        ("jobs: a", "expected a list"),
        ("sweep: {seed: 3}\njobs: [a]", "expected a list of values"),
        ("sweep: {prompt: [a]}\njobs: [a]", "prompts are jobs"),
        ("- {prompt: a, 'x y': 1}", "expected the name of a setting"),
        ("[]", "holds no job"),
        ("- *a", "not valid YAML"),
        ("- !!python/name:os.system a", "tag"),
    ],
)
def test_every_fault_has_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        jobs_of(tmp_path / "a.yaml", text)
    assert message in str(caught.value)
    assert "a.yaml" in str(caught.value)


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3 faults, and no job was started") as caught:
        jobs_of(tmp_path / "a.yaml", "- {prompt: a, stepz: 3}\n- a\n- {name: x}\n- {prompt: a, seed: -1}")
    assert [f"a.yaml:{line}:" in str(caught.value) for line in (1, 2, 3, 4)] == [True, False, True, True]


def test_too_many_jobs_are_refused_before_they_are_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at most 100000"):
        jobs_of(
            tmp_path / "a.yaml",
            f"sweep: {{seed: {list(range(400))}, steps: {list(range(1, 400))}}}\njobs: [a]",
        )


def test_sweep_words() -> None:
    found = sweep_of(["seed=0,1", "guidance.cfg_scale=[7.5, 30, 100]"])
    assert {key: [node.value for node in nodes] for key, nodes in found.items()} == {  # type: ignore[union-attr]
        "seed": [0, 1],
        "guidance.cfg_scale": [7.5, 30, 100],
    }
    for word in ("seed", "seed=", "a b=1", "seed=[", "prompt=a"):
        with pytest.raises(ConfigError):
            sweep_of([word])


# ------------------------------------------------------------------------------------------- files inside the roots


@pytest.mark.parametrize(
    "setting",
    [
        "edit.run: OUTSIDE",
        "start.run: OUTSIDE",
        "start.run: ../outside",
        "prior.name: OUTSIDE",
        "prior.name: ../outside",
        "prior.name: link",
        "prior: {vae: OUTSIDE/x}",
        "prior: {loras: [{path: OUTSIDE/a.safetensors}]}",
        "prior: {textual_inversions: [OUTSIDE/a.safetensors]}",
        "prior: {controls: [{path: OUTSIDE, kind: depth}]}",
        "prior: {image_prompt: {image: OUTSIDE/a.png}}",
        "shading: {environments: [OUTSIDE/a.hdr]}",
        "guidance: {kind: reward, reward: {kind: clip, folder: OUTSIDE}}",
        "config: OUTSIDE/a.yaml",
        "config: ../outside/a.yaml",
        "config: extends.yaml",
        "config: names.yaml",
        "prior.name: ~root",
    ],
)
def test_no_file_outside_the_roots(tmp_path: Path, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (outside / "a.yaml").write_text("steps: 7")
    (inside / "link").symlink_to(outside)
    (inside / "extends.yaml").write_text(f"extends: {outside}/a.yaml")
    (inside / "names.yaml").write_text(f"edit: {{run: {outside}}}")
    monkeypatch.chdir(inside)
    with pytest.raises(ConfigError, match=r"a\.yaml:1: |names\.yaml:1: ") as caught:
        jobs_of(inside / "a.yaml", f"- {{prompt: a, {setting.replace('OUTSIDE', str(outside))}}}")
    assert "outside the folders that may be used here" in str(caught.value)


def test_files_beside_the_batch_and_shipped_names_are_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    (tmp_path / "toybox").mkdir()
    (tmp_path / "mine.yaml").write_text("extends: fast\nsteps: 7")
    (tmp_path / "run").mkdir()
    text = "- {prompt: a, config: mine.yaml, prior.name: toybox, shading.environments: [neon], edit.run: run}"
    plain = jobs_of(tmp_path / "a.yaml", text)[0].settings
    assert (plain["steps"], plain["prior"]["name"], plain["prior"]["vae"]) == (7, "toybox", "full")
    assert plain["edit"]["run"] == str(tmp_path / "run")


def test_the_command_line_may_name_any_file(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "mine.yaml").write_text(f"extends: fast\nedit: {{run: {tmp_path / 'run'}}}")
    (tmp_path / "b" / "p.txt").write_text("a red mug")
    words = BatchConfig(
        file=tmp_path / "b" / "p.txt", out=tmp_path / "out", config=str(tmp_path / "mine.yaml")
    )
    assert plan_batch(words)[0].settings["edit"]["run"] == str(tmp_path / "run")


def test_every_setting_that_speaks_of_files_is_marked() -> None:
    """Fields of text whose help speaks of files or folders are those that are checked."""
    unmarked = []

    def walk(cls: Any, seen: set[Any]) -> None:
        if cls in seen or not is_dataclass(cls):
            return
        seen.add(cls)
        for spec in fields(cls):
            words = str(spec.metadata.get("help", "")).lower().split()
            speaks = any(
                word.strip(".,;:()") in ("file", "files", "folder", "folders", "path") for word in words
            )
            if speaks and "str" in str(spec.type) and not spec.metadata.get("path"):
                unmarked.append(f"{cls.__name__}.{spec.name}")
            for kind in spec.metadata.get("kinds", dict)().values():
                walk(config_class(kind), seen)
            default = default_of(spec)
            if not isinstance(default, Chosen):
                walk(type(default), seen)

    walk(JobConfig, set())
    from sds3d.priors.config import ControlConfig, ImagePromptConfig, LoraConfig

    for extra in (ControlConfig, ImagePromptConfig, LoraConfig):
        walk(extra, set())
    assert unmarked == []


def test_inside_root(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("/etc")
    (tmp_path / "loop").symlink_to("loop")
    assert inside_root(tmp_path / "a" / ".." / "a", [tmp_path]) == tmp_path.resolve() / "a"
    for bad in ("b", "../x", "b/passwd", "/etc", "a\0b", "loop/x"):
        with pytest.raises(InputError):
            inside_root(tmp_path / bad, [tmp_path])


# ------------------------------------------------------------------------------------------------- ledger and loop


def result(job: str, number: int = 1, **facts: Any) -> Result:
    return Result(**{"job": job, "attempt": number, "status": "done", **facts})


def test_the_ledger_comes_back_and_ignores_what_a_crash_cut_short(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.started("a", 1)
    ledger.ended(result("a", score=0.5, warnings=("w",), files={"glb": "asset.glb"}), "done")
    ledger.started("b", 1)
    ledger.close()
    with open(tmp_path / "ledger.jsonl", "a") as file:
        file.write('{"event": "ended", "job": "b", "sta')
    again = Ledger(tmp_path)
    assert again.of("a").result == result("a", score=0.5, warnings=("w",), files={"glb": "asset.glb"})
    assert (again.of("b").state, again.of("b").attempts) == ("running", 1)
    again.started("b", 2)
    again.close()
    assert Ledger(tmp_path).of("b").attempts == 2


class Scripted:
    """An engine that answers as it was told, once per order."""

    def __init__(self, script: dict[str, list[dict[str, Any]]], slots: int = 2) -> None:
        self.script, self.slots, self.most = script, slots, 0
        self.orders: list[Order] = []
        self.open: list[Order] = []
        self.cancelled: list[str] = []
        self.stopped = False

    def submit(self, order: Order) -> None:
        self.orders.append(order)
        self.open.append(order)
        self.most = max(self.most, len(self.open))

    def poll(self, timeout_s: float) -> list[Result]:
        for order in self.open:
            facts = self.script.get(order.job.id, [])
            known = facts.pop(0) if facts else {}
            if known != {"silent": True}:
                self.open.remove(order)
                return [result(order.job.id, order.attempt, **known)]
        return []

    def progress(self, job: str) -> Progress:
        return Progress(beat=1)

    def cancel(self, job: str) -> None:
        self.cancelled.append(job)

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None:
        pass


def test_deaths_are_retried_and_mistakes_are_not(tmp_path: Path) -> None:
    died = {"status": "died", "exit_code": 1}
    script = {
        "toy-00": [died, died],
        "toy-01": [died] * 9,
        "toy-02": [{"status": "failed", "exit_code": 2, "error": "no"}],
        "toy-03": [{"status": "failed", "exit_code": 1}],
    }
    engine = Scripted(script)
    board = driven([toy_job(index) for index in range(8)], engine, tmp_path, retries=2)
    states = [board.ledger.of(f"toy-{index:02d}") for index in range(8)]
    assert [record.state for record in states] == ["done", "failed", "failed", *["done"] * 5]
    assert [record.attempts for record in states] == [3, 3, 1, 2, 1, 1, 1, 1]
    assert engine.most == 2
    again = Scripted({})
    driven([toy_job(index) for index in range(8)], again, tmp_path)
    assert [order.job.id for order in again.orders] == ["toy-01", "toy-02"]
    assert [order.attempt for order in again.orders] == [4, 2]


def test_the_word_of_a_worker_that_was_given_up_does_not_count(tmp_path: Path) -> None:
    class Zombie(Scripted):
        def poll(self, timeout_s: float) -> list[Result]:
            found = super().poll(timeout_s)
            return [result("toy-00", 7, status="failed"), *found]

    board = driven([toy_job(0)], Zombie({}), tmp_path)
    assert board.ledger.of("toy-00").state == "done"
    assert len(board.ended) == 1


def test_a_heart_that_stops_is_given_up(tmp_path: Path) -> None:
    engine = Scripted({"toy-00": [{"silent": True}] * 3})
    driven([toy_job(0)], engine, tmp_path, stall_s=-1.0)
    assert engine.cancelled[0] == "toy-00"


def test_worth_another() -> None:
    assert worth_another(result("a", status="died"))
    assert worth_another(result("a", status="interrupted"))
    assert not worth_another(result("a", status="failed", exit_code=3))
    assert not worth_another(result("a"))


# ---------------------------------------------------------------------------------------------------- attempts


def order_of(job: Job, url: str, number: int = 1) -> Order:
    return Order(job=job, attempt=number, storage=url, session="test")


def test_an_attempt_goes_on_where_the_last_one_was_stopped(tmp_path: Path) -> None:
    storage, stop = SharedFolder(tmp_path / "a"), threading.Event()

    def heard(event: Any) -> None:
        if event["event"] == "StepDone" and event["step"] == 12:
            stop.set()

    first = attempt(order_of(toy_job(1), storage.url), toy_run, heard, stop, storage)
    assert first.status == "interrupted"
    second = attempt(
        order_of(toy_job(1), storage.url, 2), toy_run, lambda event: None, threading.Event(), storage
    )
    assert (second.status, second.steps_done, dict(second.files)) == ("done", 20, {"glb": "asset.glb"})
    assert (tmp_path / "a/jobs/toy-01/started.txt").read_text() == "0\n10\n"
    whole = SharedFolder(tmp_path / "b")
    attempt(order_of(toy_job(1), whole.url), toy_run, lambda event: None, threading.Event(), whole)
    assert assets(tmp_path / "a") == assets(tmp_path / "b")


def test_a_folder_that_was_never_begun_is_begun_again(tmp_path: Path) -> None:
    folder = tmp_path / "jobs" / "toy-01"
    (folder / "stages").mkdir(parents=True)
    (folder / "manifest.json").write_text("{")
    storage = SharedFolder(tmp_path)
    ended = attempt(
        order_of(toy_job(1), storage.url), toy_run, lambda event: None, threading.Event(), storage
    )
    assert ended.status == "done"
    assert not (folder / "stages").exists()


def test_a_busy_folder_is_waited_for(tmp_path: Path) -> None:
    storage, held = SharedFolder(tmp_path), tmp_path / "jobs" / "toy-01"
    held.mkdir(parents=True)
    leave, ready = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(held):
            ready.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait(10)
    threading.Timer(0.3, leave.set).start()
    ended = attempt(
        order_of(toy_job(1, steps=5), storage.url), toy_run, lambda e: None, threading.Event(), storage
    )
    thread.join()
    assert ended.status == "done"


def test_an_object_store_gets_checkpoints_and_gives_them_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDS3D_SCRATCH", str(tmp_path / "scratch"))
    url = f"local://{tmp_path}/store"
    storage = open_storage(url)
    assert isinstance(storage, RemoteStorage)
    stop = threading.Event()

    def heard(event: Any) -> None:
        if event["event"] == "StepDone" and event["step"] == 7:
            raise RuntimeError("the machine is gone")

    first = attempt(order_of(toy_job(1), url), toy_run, heard, stop, storage)
    assert first.status == "failed"
    assert json.loads((tmp_path / "store/jobs/toy-01/state.json").read_text())[0] == 5
    other = open_storage(url)
    monkeypatch.setenv("SDS3D_SCRATCH", str(tmp_path / "another machine"))
    second = Result.from_json(serve_order(order_of(toy_job(1), url, 2).to_json(), toy_run))
    assert second.status == "done"
    assert (tmp_path / "store/jobs/toy-01/started.txt").read_text() == "0\n5\n"
    assert json.loads((tmp_path / "store/beats/toy-01.json").read_text())["attempt"] == 2
    with pytest.raises(SupersededError):
        storage.save("toy-01", 1)
    other.fetch("toy-01", ["asset.glb", "none.png"], tmp_path / "here")
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["asset.glb"]


@pytest.mark.parametrize("url", ["memory://x", "nosuchscheme://x"])
def test_storages_that_cannot_be_shared_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--storage"):
        open_storage(url)


class StandIn(WorkerProcess):
    """A worker process that walks in this one."""

    run = staticmethod(toy_run)  # type: ignore[assignment]


def test_the_local_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sds3d.batch.local.WorkerProcess", StandIn)
    jobs = [toy_job(index, FAILS if index == 3 else "a toy", steps=6) for index in range(6)]
    storage = SharedFolder(tmp_path)
    lines = io.StringIO()
    from rich.console import Console

    table = BatchTable(Console(file=lines))
    board = driven(jobs, LocalEngine(storage, 2), tmp_path, on_change=table, retries=1)
    assert board.counts() == {"waiting": 0, "running": 0, "done": 5, "failed": 1, "interrupted": 0}
    assert "toy-03" in lines.getvalue()
    assert "always so" in lines.getvalue()
    assert len(assets(tmp_path)) == 5


def test_processors_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SDS3D_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("sds3d.batch.local.cpu_count", lambda: 16)
    assert share(0, 5) == {"SDS3D_THREADS": "3", "OMP_NUM_THREADS": "3"}
    assert share(0, 99)["SDS3D_THREADS"] == "1"


# ------------------------------------------------------------------------------------------ scores and the report


def test_scores_and_scorers(tmp_path: Path) -> None:
    def job(prompt: str, prior: str = "toybox", **kw: Any) -> JobConfig:
        from sds3d.priors import PriorConfig

        return JobConfig(prompt=prompt, prior=PriorConfig(name=prior), **kw)

    assert scorer_of("auto", job("a red mug")) == "judge"
    assert scorer_of("auto", job("a griffin")) == ""
    assert scorer_of("auto", job("a red mug", "sd15")) == ""
    assert scorer_of("clip:x", job("a griffin", "sd15")) == "clip:x"
    assert score_of("", tmp_path, "a") is None
    for bad in ("clip:", "taste"):
        with pytest.raises(ConfigError, match="--score"):
            scorer_of(bad, job("a"))
    text = tmp_path / "p.txt"
    with pytest.raises(ConfigError, match=r"p\.txt:1: --best-of: nothing here can score"):
        jobs_of(text, "a griffin", best_of=2)
    with pytest.raises(ConfigError, match="CLIP model"):
        plan_batch(BatchConfig(file=text, best_of=2, scorer=f"clip:{tmp_path}"))


def row(job: str, group: str, score: float | None, **facts: Any) -> dict[str, Any]:
    return {"id": job, "group": group, "score": score, "status": "done", "best": False, **facts}


def test_the_best_of_several() -> None:
    rows = [row("a", "g", -0.5), row("b", "g", 0.0), row("c", "g", 9.0, status="failed"), row("d", "h", 1.0)]
    assert mark_best(rows) == {"g": "b"}
    assert [r["best"] for r in rows] == [False, True, False, False]


EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> & ]]>"


def test_the_report_escapes_everything_and_asks_the_network_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    storage = SharedFolder(tmp_path)
    first = Job(
        id="a-1", group="a", prompt=EVIL, seed=1, config="x", settings={}, varied={"negative_prompt": EVIL}
    )
    second = Job(id="a-2", group="a", prompt="=1+1", seed=2, config="x", settings={})
    for job, score in ((first, 0.1), (second, 0.2)):
        folder = tmp_path / "jobs" / job.id
        folder.mkdir(parents=True)
        for name in ("turntable.mp4", "contact_sheet.png", "asset.glb"):
            (folder / name).write_bytes(b"x")
        (folder / "manifest.json").write_text(json.dumps({"verdict": EVIL}))
        ledger.started(job.id, 1)
        ledger.ended(result(job.id, score=score, warnings=(EVIL,)), "done")
    board = Board([first, second], ledger)
    summary = write_report(tmp_path, board, storage, engine="local", wall_s=1.0)
    ledger.close()
    html = (tmp_path / "report.html").read_text()
    assert "<script" not in html
    assert "onerror=alert" not in html.replace("onerror=alert(2)&gt;", "")
    assert "http:" not in html
    assert "https:" not in html
    assert "default-src 'none'" in html
    assert html.count("<video") == 2
    assert summary["best"] == {"a": "a-2"}
    assert os.readlink(tmp_path / "best" / "a") == "../jobs/a-2"
    table = list(csv.DictReader(io.StringIO((tmp_path / "summary.csv").read_text())))
    assert [line["prompt"] for line in table] == [EVIL, "'=1+1"]
    assert [line["best"] for line in table] == ["False", "True"]
    assert json.loads((tmp_path / "summary.json").read_text())["rows"][0]["prompt"] == EVIL
    assert as_csv([]).startswith("id,")


# ---------------------------------------------------------------------------------------------- the whole command


def test_a_batch_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sds3d.batch.local.WorkerProcess", StandIn)
    monkeypatch.setattr("sds3d.batch.attempt.dump_plain", lambda plain: json.dumps(dict(plain)))
    file, out = tmp_path / "p.txt", tmp_path / "out"
    file.write_text("a griffin\na wyvern\na phoenix\n")
    words = BatchConfig(file=file, out=out, overrides=("steps=6",), workers=1)
    asked: list[int] = []

    def stopped() -> bool:
        return bool(asked)

    def after_one(board: Board) -> None:
        asked.extend(1 for r in board.ended if r.status == "done")

    first = run_batch(words, stopped=stopped, on_change=after_one)
    assert 1 <= first["done"] < 3
    second = run_batch(words)
    assert (second["done"], second["failed"]) == (3, 0)
    assert [path.read_text() for path in out.glob("jobs/*/completed.txt")] == ["6\n"] * 3
    with locked(out), pytest.raises(InputError, match="is working on this run"):
        run_batch(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "cloud"], "--engine: got 'cloud'"),
        (["--workers", "0"], "--workers"),
        (["--workers", "9999"], "--workers: got 9999"),
        (["--sweep", "seed"], "--sweep: got 'seed'"),
        (["--sweep", "seed=1,2", "seed=3"], "seed is also set to one value"),
        (["--best-of", "2", "--score", "none"], "--best-of: needs a score"),
        (["--storage", "memory://x", "--engine", "ray"], "seen by one process only"),
        (["--storage", "/tmp/x"], "the local engine works in --out"),
        (["stepz=3"], "stepz: unknown field"),
        (["--out", "."], "holds other files and no batch"),
        (["--engine", "slurm", "--slurm", "partition"], "--slurm: got 'partition'"),
    ],
)
def test_mistakes_start_nothing(
    tmp_path: Path,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a red mug\n")
    monkeypatch.setattr("sds3d.batch.run.LocalEngine", None)
    out = [] if "--out" in words else ["--out", "out"]
    assert main(["batch", "p.txt", *out, *words]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert "Traceback" not in said.err
    assert not Path("out/ledger.jsonl").exists()


def test_slurm_options() -> None:
    assert slurm_options(["partition=gpu", "timeout_min=60", "slurm_qos=x"]) == {
        "slurm_partition": "gpu",
        "timeout_min": 60,
        "slurm_qos": "x",
    }
