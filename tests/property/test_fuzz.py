"""Ten thousand inputs that nobody asked for: an answer or one message, never a traceback, nothing outside the root.

Inputs are made from valid ones by cutting, repeating, flipping and splicing, so that they get past the first check.
Every file that is opened for writing meanwhile is watched.
"""

import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import trimesh
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sds3d.batch.run import BatchConfig, plan_batch
from sds3d.config.load import override_layers, setting
from sds3d.errors import Sds3dError
from sds3d.mesh.files import export_mesh
from sds3d.mesh.read import READABLE, load_geometry
from sds3d.mesh.textured import TexturedMesh
from sds3d.paths import claim_run_folder, data_dir
from sds3d.staged import load_stages
from sds3d.workers.task import Task, layers_of

EACH = 2100  # inputs per kind of input; there are five kinds
quick = settings(
    max_examples=EACH,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
_written: list[str] = []
_watching: list[Path] = []


def _note_write(event: str, args: tuple[object, ...]) -> None:
    if not _watching:
        return
    changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "shutil.copyfile")
    if event == "open" and isinstance(args[0], (str, bytes)):
        flags = args[2] if isinstance(args[2], int) else 0
        changes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if changes:
        _written.append(os.path.abspath(os.fsdecode(args[0])))  # type: ignore[arg-type]


sys.addaudithook(_note_write)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in; whatever is written elsewhere fails the test."""
    seed_meshes()
    folder = tmp_path / "root"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("not for you")
    monkeypatch.chdir(folder)
    _written.clear()
    _watching.append(folder)
    yield folder
    _watching.clear()
    outside = [name for name in _written if not name.startswith((str(folder) + os.sep, "/dev/null"))]
    outside = [name for name in outside if "__pycache__" not in name and ".hypothesis" not in name]
    assert outside == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root", "secret.txt"]


def answered(action: Callable[[], object]) -> object:
    """What it gives, or the message of an error that is meant for the user."""
    try:
        return action()
    except Sds3dError as error:
        message = str(error)
        assert message
        assert "not for you" not in message
        return message


SPLICES = [
    b"../",
    b"/etc/passwd",
    b"\x00",
    b"\xff\xfe",
    b"1e999",
    b"nan",
    b"-1",
    b"!!python/object",
    b"&a [*a]",
]
SPLICES += [b"{", b"[", b": ", b"\n  ", b"${HOME}", b"'", b'"', b"9" * 40, b"<script>", "é🙂\u202e".encode()]


def spoiled(seed: bytes, rng: random.Random) -> bytes:
    """A valid input with some damage."""
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randrange(len(data) + 1)
        way = rng.randrange(5)
        if way == 0:
            del data[at : at + rng.choice((1, 4, 64, 4096))]
        elif way == 1 and data:
            data[at % len(data)] = rng.randrange(256)
        elif way == 2:
            data[at:at] = rng.choice(SPLICES)
        elif way == 3:
            data[at:at] = data[at : at + rng.choice((4, 40))] * rng.choice((1, 3))
        else:
            data[at : at + 4] = rng.randrange(2**32).to_bytes(4, "little")
    return bytes(data)


CONFIGS = [path.read_bytes() for path in sorted(data_dir("configs").rglob("*.yaml"))]
randoms = st.randoms(use_true_random=False)
UTF8 = st.text(max_size=200) | st.sampled_from(
    ["\ud800", "a\x00b", "../../x", "CON", "x" * 5000, "%s{}", "-rf"]
)


@quick
@given(rng=randoms)
def fuzz_config(folder: Path, rng: random.Random) -> None:
    path = folder / "job.yaml"
    path.write_bytes(spoiled(rng.choice(CONFIGS), rng))
    answered(lambda: [stage.job.validate() for stage in load_stages(str(path))])


@quick
@given(prompt=UTF8, key=UTF8, value=UTF8)
@example(prompt="a red mug", key="seed", value="1")
@example(prompt="a\nred: mug", key="edit.run", value="../../../etc")
def fuzz_prompt(folder: Path, prompt: str, key: str, value: str) -> None:
    def make() -> Path:
        layers = [setting("prompt", prompt, "test"), *override_layers([f"{key}={value}"])]
        return claim_run_folder("default", load_stages("default", layers)[0].job.text())

    answered(make)
    made = claim_run_folder(value, prompt).resolve()
    assert made.parent.parent == folder.resolve() / "outputs"
    answered(lambda: layers_of({key: value, "prompt": prompt}))


BATCHES = [
    b"- {prompt: a red mug, config: fast, seed: 3}\n- prompt: a blue car\n  sweep: {guidance.cfg_scale: [5, 10]}\n",
    b"config: fast\nsweep: {seed: [0, 1]}\njobs:\n  - prompt: a red mug\n    edit.run: ../other\n",
    b"- {prompt: a dog, prior.name: /etc, config: ../secret.yaml}\n",
]


@quick
@given(rng=randoms)
def fuzz_batch(folder: Path, rng: random.Random) -> None:
    lines, path = rng.random() < 0.3, folder / "jobs.yaml"
    if lines:
        path = folder / "prompts.txt"
    path.write_bytes(spoiled(b"a red mug\n# none\na blue car\n" if lines else rng.choice(BATCHES), rng))
    jobs = answered(lambda: plan_batch(BatchConfig(file=path, config="fast", out=folder / "out")))
    for job in jobs if isinstance(jobs, list) else []:
        assert (folder / "out" / job.id).resolve().parent == (folder / "out").resolve()


@quick
@given(rng=randoms)
def fuzz_mesh(folder: Path, rng: random.Random) -> None:
    name, seed = rng.choice(seed_meshes())
    path = folder / name
    path.write_bytes(spoiled(seed, rng))
    made = answered(lambda: load_geometry(path))
    if isinstance(made, TexturedMesh):
        assert len(made.faces) > 0
        assert made.vertices.isfinite().all()
        assert int(made.faces.min()) >= 0
        assert int(made.faces.max()) < len(made.vertices)


@lru_cache
def seed_meshes() -> list[tuple[str, bytes]]:
    """A small sound mesh as a file of every format."""
    ball = trimesh.creation.icosphere(subdivisions=1)
    vertices = torch.tensor(ball.vertices, dtype=torch.float32)
    mesh = TexturedMesh(
        vertices=vertices,
        faces=torch.tensor(ball.faces, dtype=torch.int64),
        normals=vertices,
        uvs=vertices[:, :2] / 2 + 0.5,
        texture=torch.full((8, 8, 3), 128, dtype=torch.uint8),
    )
    with tempfile.TemporaryDirectory() as name:
        export_mesh(mesh, Path(name), "ball", ("glb", "gltf", "obj", "ply", "stl"), {})
        for kind in ("off", "stl", "obj"):
            ball.export(Path(name) / f"plain.{kind}")
        files = sorted(path for path in Path(name).iterdir() if path.suffix[1:] in READABLE)
        return [(path.name, path.read_bytes()) for path in files]


@quick
@given(rng=randoms, text=UTF8)
def fuzz_task(folder: Path, rng: random.Random, text: str) -> None:
    seed = Task(kind="generate", folder="a", settings={"prompt": text, "seed": 1}).to_json()
    line = spoiled(seed.encode(), rng).decode("utf-8", "replace")
    task = answered(lambda: Task.from_json(line))
    if isinstance(task, Task):
        answered(lambda: load_stages(task.config, layers_of(task.settings)))


@pytest.mark.parametrize("fuzz", [fuzz_config, fuzz_prompt, fuzz_batch, fuzz_mesh, fuzz_task])
def test_any_input_gets_an_answer(fuzz: Callable[[Path], None], root: Path) -> None:
    fuzz(root)
