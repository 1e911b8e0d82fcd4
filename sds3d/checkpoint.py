"""Checkpoints: tensors only, written whole or not at all, verified by a digest when read.

A file is safetensors with one metadata entry: JSON with schema version, step, config hash and a digest of all
tensors, so that a flipped bit is found and not optimised further.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor

from sds3d.errors import CheckpointError
from sds3d.paths import write_atomic

SCHEMA = 1
_NAME = re.compile(r"step-(\d{6,})\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a loop after `step` steps of the run with this config."""

    step: int
    config_hash: str
    tensors: Mapping[str, Tensor]


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `folder/step-NNNNNN.safetensors`; an older file of that name stays whole until the new one is."""
    tensors = {name: t.detach().to("cpu").contiguous().clone() for name, t in checkpoint.tensors.items()}
    header = {
        "schema": SCHEMA,
        "step": checkpoint.step,
        "config_hash": checkpoint.config_hash,
        "digest": _digest(tensors),
    }
    path = folder / f"step-{checkpoint.step:06d}.safetensors"
    write_atomic(path, safetensors_torch.save(tensors, metadata={"sds3d": json.dumps(header)}))
    return path


def load(path: Path) -> Checkpoint:
    """Read and verify a checkpoint; raises CheckpointError that names the file and the way out."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            header = json.loads((file.metadata() or {})["sds3d"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        schema, step, config_hash = header["schema"], int(header["step"]), str(header["config_hash"])
        digest = header["digest"]
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise _damaged(path, f"cannot be read ({type(error).__name__})") from error
    if schema != SCHEMA:
        raise CheckpointError(
            f"{path}: has schema {schema}, this sds3d reads {SCHEMA}. Use the version that wrote it."
        )
    if digest != _digest(tensors):
        raise _damaged(path, "its contents do not match its digest")
    return Checkpoint(step=step, config_hash=config_hash, tensors=tensors)


def listed(folder: Path) -> list[Path]:
    """All checkpoints in a folder, the latest last."""
    found = [(int(match[1]), path) for path in folder.glob("*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def prune(folder: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints."""
    for path in listed(folder)[: -max(keep, 1)]:
        path.unlink(missing_ok=True)


def _damaged(path: Path, how: str) -> CheckpointError:
    others = [other for other in listed(path.parent) if other != path]
    instead = f"continue from {others[-1].name}" if others else "start the run again from step 0"
    return CheckpointError(f"{path}: damaged: {how}. Delete this file and resume to {instead}.")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
