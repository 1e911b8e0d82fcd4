"""Two processes share the views of one run: one spawn, in which both go through all scenes of this file in turn."""

import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing

from sds3d.errors import ConfigError, InputError, Sds3dError
from sds3d.guidance import SDS
from sds3d.guidance.lmc import LMC
from sds3d.parallel import CPU, Team, asked_for, joined
from sds3d.rng import Stream
from tests.windows import JOB, build, quiet, write_nothing

STEPS = 5
TIMEOUT_S = 20.0


def _lmc(prior: Any) -> LMC:
    return LMC(LMC.Config(width=4), prior, Stream(0, "lmc"))


def _image_space(prior: Any) -> SDS:
    return SDS(SDS.Config(image_weight=0.3), prior)


LOOPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "held": {"hold": 3, "rule": _image_space},
    "learner": {"rule": _lmc},
}


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _work(rank: int, folder: Path, ports: dict[str, str]) -> None:
    """What process `rank` does; its findings go to `folder`."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    found: dict[str, Any] = {}
    for part in (_same_run, _short_of_memory, _generated, _failing, _vanishing):
        os.environ["MASTER_PORT"] = ports[part.__name__]
        start = time.monotonic()
        found[part.__name__] = part(rank, folder)
        found[f"{part.__name__} seconds"] = time.monotonic() - start
        torch.save(found, folder / f"rank{rank}.pt")


def _same_run(rank: int, folder: Path) -> dict[str, Any]:
    states = {}
    with joined(CPU, TIMEOUT_S) as team:
        for name, options in LOOPS.items():
            loop = build(STEPS, **options)
            loop.team, events = team, []
            loop.run(STEPS, events.append)
            states[name] = (loop.state_dict(), dict(events[-1].log), list(loop.parts.scene.asked))
    return states


def _short_of_memory(rank: int, folder: Path) -> dict[str, Any]:
    """One process runs out of memory; both go on with fewer views at once."""
    loop = build(STEPS)
    eps, messages = loop.parts.prior.eps, []

    def scarce(x_t: torch.Tensor, *words: Any) -> Any:
        if rank == 1 and len(x_t) > 1 and loop.index >= 2:
            raise torch.OutOfMemoryError("no room")
        return eps(x_t, *words)

    loop.parts.prior.eps = scarce
    with joined(CPU, TIMEOUT_S) as team:
        loop.team = team
        loop.run(STEPS, lambda event: messages.append(getattr(event, "message", "")))
    return {
        "image": loop.parts.scene.image.detach(),
        "micro_batch": loop.economy.micro_batch,
        "messages": messages,
    }


def _generated(rank: int, folder: Path) -> dict[str, Any]:
    import sds3d.exporting as exporting
    import sds3d.run as run_module

    run_module.build_loop = lambda job, device, source=None, start=None: build(job.steps)  # type: ignore[assignment]
    exporting.make_asset = write_nothing  # type: ignore[assignment]
    here = folder / f"cwd{rank}"
    here.mkdir()
    os.chdir(here)
    events: list[Any] = []
    result = run_module.generate(JOB, folder / "run", listeners=[events.append])
    files = {name: str(path) for name, path in result.files.items()}
    return {"status": result.status, "files": files, "events": len(events)}


def _failing(rank: int, folder: Path) -> str:
    def broken(*words: Any) -> Any:
        raise ValueError("a defect in process 1")

    try:
        with joined(CPU, TIMEOUT_S) as team:
            loop = build(STEPS)
            loop.team = team
            loop.run(2, quiet)
            if rank == 1:
                loop.parts.prior.eps = broken
            loop.run(STEPS, quiet)
    except (Sds3dError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _vanishing(rank: int, folder: Path) -> str:
    try:
        with joined(CPU, TIMEOUT_S) as team:
            loop = build(STEPS)
            loop.team = team
            loop.run(2, quiet)
            if rank == 1:
                os._exit(0)
            loop.run(STEPS, quiet)
    except Sds3dError as error:
        return str(error)
    return "no error"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("team")
    parts = (_same_run, _short_of_memory, _generated, _failing, _vanishing)
    ports = {part.__name__: _free_port() for part in parts}
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=(rank, folder, ports)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=240)
    assert all(worker.exitcode == 0 for worker in workers)
    answers = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    answers[0]["folder"] = folder
    return answers


@pytest.mark.parametrize("name", LOOPS)
def test_two_processes_take_the_steps_of_one(found: list[dict[str, Any]], name: str) -> None:
    alone, events = build(STEPS, **LOOPS[name]), []
    alone.run(STEPS, events.append)
    expected = alone.state_dict()
    tolerance = 1e-4 if alone.parts.guide.learner is not None else 1e-10  # the learner is float32
    for rank in range(2):
        state, log, asked = found[rank]["_same_run"][name]
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=tolerance, atol=tolerance, msg=key)
        assert log == pytest.approx(dict(events[-1].log), rel=1e-3)
        assert set(asked) == {2}
    for key in expected:
        first, second = (found[rank]["_same_run"][name][0][key] for rank in range(2))
        assert torch.equal(first, second), key


def test_all_processes_save_memory_where_one_runs_short(found: list[dict[str, Any]]) -> None:
    alone = build(STEPS)
    alone.run(STEPS, quiet)
    for rank in range(2):
        short = found[rank]["_short_of_memory"]
        torch.testing.assert_close(short["image"], alone.parts.scene.image.detach(), rtol=1e-10, atol=1e-10)
        assert short["micro_batch"] == 1
        reason = "in another process" if rank == 0 else "no room"
        assert [reason in text for text in short["messages"] if "out of memory" in text] == [True]


def test_the_first_process_alone_writes(found: list[dict[str, Any]]) -> None:
    folder: Path = found[0]["folder"]
    first, second = (each["_generated"] for each in found)
    assert (first["status"], second["status"]) == ("done", "done")
    assert first["events"] > 0
    assert (second["events"], second["files"]) == (0, {})
    assert {path.name for path in (folder / "run").iterdir()} >= {
        "manifest.json",
        "config.yaml",
        "checkpoints",
    }
    assert [list((folder / f"cwd{rank}").iterdir()) for rank in range(2)] == [[], []]


def test_a_failing_process_ends_all(found: list[dict[str, Any]]) -> None:
    assert found[1]["_failing"] == "ValueError: a defect in process 1"
    assert "another process of this run failed" in found[0]["_failing"]
    assert found[0]["_failing seconds"] < TIMEOUT_S


def test_a_vanished_process_ends_all(found: list[dict[str, Any]]) -> None:
    assert "lost the other processes" in found[0]["_vanishing"]
    assert found[0]["_vanishing seconds"] < 2 * TIMEOUT_S


def test_views_must_be_dealt_out_evenly() -> None:
    team = Team(rank=1, size=3)
    team.check(6)
    assert (team.slice(6).start, team.slice(6).stop) == (2, 4)
    with pytest.raises(
        ConfigError, match=r"camera\.batch: got 4 for 3 processes.*multiple of 3, e\.g\. 3 or 6"
    ):
        team.check(4)
    with pytest.raises(ConfigError, match=r"multiple of 12, e\.g\. 12"):
        team.check(8, multiple=4)


def test_failure_is_heard_at_every_exchange_of_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for ask in (lambda team: team.any(False), lambda team: team.least(4)):
        team = Team(rank=0, size=2)
        monkeypatch.setattr(team, "_reduce", lambda values, how: torch.maximum(values, torch.tensor(2)))
        with pytest.raises(Sds3dError, match="another process of this run failed"):
            ask(team)
        assert team.over
    team = Team(rank=0, size=2)
    monkeypatch.setattr(team, "_reduce", lambda values, how: torch.maximum(values, torch.tensor(-3)))
    assert team.least(4) == 3


def test_alone_nothing_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert not asked_for()
    with joined(CPU) as team:
        assert team.leads
        assert (team.any(True), team.least(3), team.total([1.5])) == (True, 3, [1.5])
        team.fail()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_more_processes_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="2 processes, but 0 CUDA devices"), joined(torch.device("cuda")):
        pass
