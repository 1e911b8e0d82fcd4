"""The command line: one clear message on stderr and the right exit status for every mistake."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from toy_run import ToyLoop, ToyReport, ToyScene, loops

from sds3d import __version__
from sds3d.asset import AssetConfig
from sds3d.cli import heeding_signals, main, split_formats, split_words
from sds3d.errors import ConfigError
from sds3d.events.bus import Finished, PhaseStarted, StepDone, Warned
from sds3d.events.progress import ProgressLine
from sds3d.run import Stop

__all__ = ["loops"]  # a fixture
FAST = "steps: 12\ndevice: cpu\npreview: {turntable_frames: 0, size_px: 32, every_s: 1e6}\n"


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "fast.yaml"
    path.write_text(FAST)
    return str(path)


def test_generate_prints_the_files_and_nothing_else_on_stdout(
    tmp_path: Path, loops: list[ToyLoop], config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["generate", "a red mug", "--config", config, "--out", str(out), "--seed", "7"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{out / 'asset.stl'}\n"
    assert "step 12/12" in said.err
    assert "warning: the prior does not know the word 'mug'" in said.err
    assert (loops[0].job.prompt, loops[0].job.seed, loops[0].job.steps) == ("a red mug", 7, 12)


def test_options_win_over_overrides_and_those_over_files(
    tmp_path: Path, loops: list[ToyLoop], config: str
) -> None:
    words = [
        "generate",
        "steps=3",
        "a: mug # 1",
        "seed=5",
        "--config",
        config,
        "--out",
        str(tmp_path / "run"),
    ]
    assert main([*words, "--seed", "9", "--negative", "null", "--formats", "glb, OBJ"]) == 0
    job = loops[0].job
    assert (job.prompt, job.steps, job.seed, job.negative_prompt) == ("a: mug # 1", 3, 9, "null")
    assert job.export.formats == ("glb", "obj")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", ""], "the prompt is empty"),
        (["generate", "  "], "the prompt is empty"),
        (["generate", "--config", "CONFIG"], "prompt: empty"),
        (["generate", "a", "red", "mug"], 'quote the prompt: "a red mug"'),
        (["generate", "mug", "--config", "nope"], "unknown config 'nope'"),
        (["generate", "mug", "--config", "nope.yaml"], "nope.yaml: cannot read this config"),
        (["generate", "mug", "--config", "CONFIG", "stepz=3"], "stepz: unknown field. Did you mean steps?"),
        (
            ["generate", "mug", "--config", "CONFIG", "steps=x"],
            "command line: steps: got 'x', expected an integer",
        ),
        (["generate", "mug", "--config", "CONFIG", "--steps", "0"], "--steps: steps: got 0, expected 1 to"),
        (["generate", "mug", "--config", "CONFIG", "--seed", "-1"], "--seed: seed: got -1, expected 0 to"),
        (["generate", "mug", "--config", "CONFIG", "--steps", "many"], "--steps"),
        (["generate", "mug", "--config", "CONFIG", "--device", "tpu"], "--device: device: got 'tpu'"),
        (["generate", "mug", "--config", "CONFIG", "--formats", "fbx"], "fbx"),
        (["generate", "mug", "--config", "CONFIG", "--formats", ","], "--formats: names no format"),
        (["generate", "mug", "--config", "CONFIG", "--prior", "no-such-prior"], "no-such-prior"),
        (["generate", "mug", "--config", "CONFIG", "--out", "CONFIG"], "cannot write here"),
        (["resume", "nowhere"], "nowhere: not a run folder"),
        (["export", "nowhere"], "nowhere: not a run folder"),
        (["resume"], "Missing argument"),
        (["frobnicate"], "frobnicate"),
        (["generate", "--frob"], "--frob"),
        (["config", "show", "nope"], "unknown config 'nope'"),
    ],
)
def test_mistakes_are_one_line_and_status_two(
    tmp_path: Path,
    config: str,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([config if word == "CONFIG" else word for word in words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in said.err
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["fast.yaml"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_the_step(
    tmp_path: Path,
    loops: list[ToyLoop],
    config: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    status: int,
) -> None:
    run = ToyLoop.run

    def signalled(self: ToyLoop, until: int, emit: object) -> None:
        if self.index == 4:
            signal.raise_signal(number)
        run(self, until, emit)

    monkeypatch.setattr(ToyLoop, "run", signalled)
    before = signal.getsignal(number)
    out = str(tmp_path / "run")
    assert main(["generate", "a mug", "--config", config, "--out", out]) == status
    assert loops[0].index == 5
    assert f"continue with: sds3d resume {out}" in capsys.readouterr().err
    assert signal.getsignal(number) is before
    monkeypatch.setattr(ToyLoop, "run", run)
    assert main(["resume", out]) == 0
    assert loops[1].steps_taken == list(range(5, 12))


def test_a_second_interrupt_aborts_and_saves_no_half_step(
    tmp_path: Path, loops: list[ToyLoop], config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck(self: ToyLoop, until: int, emit: object) -> None:
        self.index += 1
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ToyLoop, "run", stuck)
    assert main(["generate", "a mug", "--config", config, "--out", str(tmp_path / "run")]) == 130
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert '"status": "interrupted"' in (tmp_path / "run" / "manifest.json").read_text()


def test_signal_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    stop = Stop()
    with heeding_signals(stop):
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)  # impatient schedulers repeat it; the run still ends in order
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_existing_run_is_refused(
    tmp_path: Path, loops: list[ToyLoop], config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "a mug", "--config", config, "--out", str(tmp_path / "run")]
    assert main(words) == 0
    asset = (tmp_path / "run" / "asset.stl").read_bytes()
    assert main([*words, "--seed", "3"]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert (tmp_path / "run" / "asset.stl").read_bytes() == asset


def test_export_takes_budgets_and_refuses_bad_ones_without_touching_a_file(
    tmp_path: Path,
    loops: list[ToyLoop],
    config: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def make(scene: object, folder: Path, settings: AssetConfig, metadata: object) -> ToyReport:
        asked.append(settings)
        return ToyReport({})

    run = tmp_path / "run"
    assert main(["generate", "a mug", "--config", config, "--out", str(run)]) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    for words, message in (
        (["--faces", "3"], "--faces: export: max_faces is 3; expected a value from 100 to 10000000"),
        (
            ["--texture", "500"],
            "--texture: export: texture_px is 500; expected a power of two from 128 to 4096",
        ),
        (
            ["--name", "a/b"],
            "--name: export: 'a/b' cannot be a file name; use letters, digits, '-', '_' and '.'",
        ),
        (["--format", "fbx"], "export: unknown format 'fbx'; known formats: glb, gltf, obj, ply, stl, usdz"),
        (["steps=3"], "export: only settings that begin with export. can change"),
    ):
        assert main(["export", str(run), *words]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {message}")
        assert said.count("\n") == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    monkeypatch.setattr("sds3d.exporting.make_asset", make)
    monkeypatch.setattr("sds3d.run.restored_scene", lambda job, saved: ToyScene())
    words = [
        "--faces",
        "20000",
        "--texture",
        "1024",
        "--name",
        "big",
        "--format",
        "glb,stl",
        "export.pivot=base",
    ]
    assert main(["export", str(run), *words]) == 0
    (only,) = asked
    assert (only.max_faces, only.texture_px, only.name, only.pivot) == (20000, 1024, "big", "base")
    assert only.formats == ("glb", "stl")


def test_a_broken_pipe_of_words_is_split_well() -> None:
    assert split_words(["a mug", "a.b=1", "c=x y"]) == ("a mug", ["a.b=1", "c=x y"])
    assert split_words(["a.b=1"]) == (None, ["a.b=1"])
    assert split_formats("GLB, .obj") == ["glb", "obj"]
    with pytest.raises(ConfigError):
        split_words(["a", "mug"])


def test_config_commands(tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", config, "seed=4"]) == 0
    shown = capsys.readouterr().out
    assert f"steps: 12  # {config}:1" in shown
    assert "seed: 4  # command line" in shown
    assert main(["config", "check", str(tmp_path)]) == 0
    (tmp_path / "bad.yaml").write_text("steps: 1\nsteps: 2\n")
    capsys.readouterr()
    assert main(["config", "check", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert "1 of 2 configs are valid" in said.out
    assert "bad.yaml:2: steps: written twice" in said.err
    assert main(["config", "docs"]) == 0
    assert "| `guidance.cfg_scale` |" in capsys.readouterr().out


def test_no_words_at_all_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("Usage:")


@pytest.mark.parametrize(
    ("command", "expected"),
    [("methods", "Poole et al. 2022"), ("priors", "toybox"), ("--version", __version__)],
)
def test_listings(command: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command]) == 0
    assert expected in capsys.readouterr().out


def test_doctor_reports_every_probe(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor"])
    said = capsys.readouterr().out
    for name in (
        "python",
        "packages",
        "device",
        "threads",
        "kernel cache",
        "gsplat",
        "video",
        "prior",
        "disk",
    ):
        assert name in said
    assert status == (1 if "FAIL" in said else 0)


def test_progress_without_a_terminal_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    clock = {"s": 0.0}
    line = ProgressLine(clock=lambda: clock["s"])
    line(PhaseStarted(name="optimising"))
    for step in range(1, 21):
        line(StepDone(step=step, steps=20, grad_norm=0.5, seconds=1.0, nonfinite=step // 20))
        clock["s"] += 1.0
    line(Warned(message="odd [word]"))
    line(Finished(status="done", folder=Path("x")))
    said = capsys.readouterr()
    assert said.out == ""
    steps = [text for text in said.err.splitlines() if text.startswith("step ")]
    assert [text.split()[1] for text in steps] == ["1/20", "6/20", "11/20", "16/20", "20/20"]
    assert "4 s left  1.000 s/step  gradient 0.5" in steps[3]
    assert "non-finite steps 1" in steps[4]
    assert "warning: odd [word]" in said.err


def test_module_runs_as_a_program_and_starts_without_torch() -> None:
    code = "import sys, sds3d.cli; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    answer = subprocess.run(
        [sys.executable, "-m", "sds3d", "generate", " "],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: the prompt is empty")
