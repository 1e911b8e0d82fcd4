"""Checkpoints come back bit for bit or not at all."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sds3d import checkpoint
from sds3d.checkpoint import Checkpoint
from sds3d.errors import CheckpointError, InputError

TENSORS = {
    "scene.grid": torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1)),
    "scene.half": torch.randn(7, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16),
    "optimizer.step": torch.tensor(3.0),
    "index": torch.tensor(12),
    "mask": torch.tensor([True, False]),
    "nothing": torch.zeros(0, 3),
}


def save(folder: Path, step: int = 12) -> Path:
    return checkpoint.save(folder, Checkpoint(step=step, config_hash="abc", tensors=TENSORS))


def test_round_trip_is_exact(tmp_path: Path) -> None:
    again = checkpoint.load(save(tmp_path))
    assert (again.step, again.config_hash) == (12, "abc")
    assert again.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert again.tensors[name].dtype == tensor.dtype
        assert torch.equal(again.tensors[name], tensor)


def test_views_and_shared_memory_are_saved(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": base.T, "b": base[1], "c": base}
    again = checkpoint.load(checkpoint.save(tmp_path, Checkpoint(step=1, config_hash="", tensors=tensors)))
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in tensors.items())


def test_nan_and_infinity_survive(tmp_path: Path) -> None:
    odd = torch.tensor([float("nan"), float("inf"), -0.0])
    path = checkpoint.save(tmp_path, Checkpoint(step=1, config_hash="", tensors={"odd": odd}))
    again = checkpoint.load(path).tensors["odd"]
    assert torch.equal(again.view(torch.int32), odd.view(torch.int32))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_flipped_byte_is_found(data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder))
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        said, tensors = str(path), dict(TENSORS)
        try:
            tensors = dict(checkpoint.load(path).tensors)  # a flip in the padding changes no tensor
        except CheckpointError as error:
            said = str(error)
    assert str(path) in said
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("content", [b"", b"junk", b"\x00" * 100, b"\xff" * 100])
def test_files_that_are_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "step-000005.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="start the run again from step 0"):
        checkpoint.load(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_cut_files_name_the_way_out(tmp_path: Path, share: float) -> None:
    save(tmp_path, step=10)
    path = save(tmp_path, step=20)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"Delete this file and resume to continue from step-000010"):
        checkpoint.load(path)


def test_a_safetensors_file_of_another_program(tmp_path: Path) -> None:
    path = tmp_path / "step-000001.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path)


def test_another_schema_is_named(tmp_path: Path) -> None:
    path = save(tmp_path)
    header = {"schema": 99, "step": 1, "config_hash": "", "digest": ""}
    save_file(load_file(path), path, metadata={"sds3d": json.dumps(header)})
    with pytest.raises(CheckpointError, match="schema 99"):
        checkpoint.load(path)


def test_no_python_objects_are_ever_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "step-000001.safetensors"
    torch.save({"x": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError):
        checkpoint.load(path)


def test_listing_sorts_by_step_and_ignores_other_files(tmp_path: Path) -> None:
    for step in (1_000_000, 20, 100):
        save(tmp_path, step=step)
    (tmp_path / ".step-000007.safetensors.tmp").write_text("left behind")
    (tmp_path / "notes.txt").write_text("x")
    assert [path.name for path in checkpoint.listed(tmp_path)] == [
        "step-000020.safetensors",
        "step-000100.safetensors",
        "step-1000000.safetensors",
    ]


def test_prune_keeps_the_latest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step=step)
    checkpoint.prune(tmp_path, keep=2)
    assert [path.name for path in checkpoint.listed(tmp_path)] == [
        "step-000003.safetensors",
        "step-000004.safetensors",
    ]
    checkpoint.prune(tmp_path, keep=0)
    assert len(checkpoint.listed(tmp_path)) == 1


def test_failed_write_keeps_the_old_file_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path)
    before = path.read_bytes()

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="No space left on device"):
        save(tmp_path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
