"""Embeddings of prompts kept on disk, so that a large text encoder is read once per prompt, not once per run.

An entry is one safetensors file, found by a digest of everything that its numbers depend on: the model and its
revision, the settings that could change its text (styles among them), the layout, the prompt. Prompts are embedded
one by one, so that an embedding is the same whether it, or its neighbours, were at hand or not.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from sds3d.errors import InputError
from sds3d.paths import cache_dir, write_atomic
from sds3d.priors.families import LoadOptions
from sds3d.priors.hub import origin_of
from sds3d.priors.network import PriorParts
from sds3d.priors.text_coders import TextCoder
from sds3d.priors.weights import bytes_of

SCHEMA = 1  # rises when the same model and prompt would be embedded differently
LIMIT_BYTES = 2 * 2**30
WORTH_BYTES = 64 * 2**20  # encoders smaller than this are read faster than a cache is explained
_SAMPLE = 4096
# Settings that no embedding depends on; every other one, also one that is new, makes entries of its own.
_NOT_TEXT = (
    *("name", "revision", "text_cache", "as_flow", "image_px", "dtype", "compile", "allowed_steps"),
    *("vae", "vae_dtype", "vae_slice", "vae_checkpointing", "image_prompt", "controls"),
    *("flux_guidance", "lcm_guidance"),
)


class TextStore:
    """A folder of embeddings, least recently used ones pruned."""

    def __init__(self, folder: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self.notices: list[str] = []

    def get(self, key: str, shape: tuple[int, int]) -> Float[Tensor, "m d"] | None:
        """An embedding, or None where it is not here; a damaged one is told in `notices`."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            found = load(path.read_bytes())["text"]  # not mapped: others may prune the file
            _check(found, shape)
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            why = str(error) or type(error).__name__
            self._tell(f"{path}: a damaged text embedding ({why}); it is made anew")
            return None
        with suppress(OSError):
            os.utime(path)  # used just now
        return found

    def put(self, key: str, text: Float[Tensor, "m d"]) -> None:
        """Keep an embedding; a disk that refuses is told in `notices` and stops nothing."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path(key), save({"text": text.contiguous()}), durable=False)
            self._prune()
        except (OSError, InputError) as error:
            self._tell(f"embeddings of prompts are not kept: {error}")

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _tell(self, message: str) -> None:
        if message not in self.notices:
            self.notices.append(message)

    def _prune(self) -> None:
        """Down to the limit, oldest first; files that others remove meanwhile do not matter."""
        entries = []
        for path in self.folder.glob("*.safetensors"):
            with suppress(OSError):
                stat = path.stat()
                entries.append((stat.st_mtime_ns, stat.st_size, path))
        excess = sum(size for _, size, _ in entries) - self.limit_bytes
        for _, size, path in sorted(entries)[:-1]:  # never the newest
            if excess <= 0:
                return
            with suppress(OSError):
                path.unlink()
            excess -= size


def _check(found: Tensor, shape: tuple[int, int]) -> None:
    if tuple(found.shape) != shape or found.dtype != torch.float32:
        raise ValueError(f"{tuple(found.shape)} of {found.dtype}, expected {shape}")
    if not found.isfinite().all():
        raise ValueError("not finite")


class CachedText:
    """A text coder whose embeddings are looked up first; the encoders are asked only for the missing ones."""

    def __init__(self, inner: TextCoder, store: TextStore, model: str) -> None:
        """`model` stands for all that an embedding depends on besides the prompt, see `model_key`."""
        self.inner, self.store, self.model = inner, store, model
        self.packing = inner.packing

    def __call__(self, prompts: Sequence[str]) -> Float[Tensor, "p m d"]:
        """Packed embeddings in float32, on the CPU."""
        known = {prompt: self._one(prompt) for prompt in dict.fromkeys(prompts)}
        return torch.stack([known[prompt] for prompt in prompts])

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """Those of the encoders, and what went wrong with the cache."""
        return self.inner.warnings(prompts) + self.store.notices

    def modules(self) -> Sequence[nn.Module]:
        """Those of the encoders."""
        return self.inner.modules()

    def _one(self, prompt: str) -> Float[Tensor, "m d"]:
        layout = self.packing
        key = _digest([self.model, asdict(layout), type(self.inner).__name__, prompt])
        found = self.store.get(key, (layout.rows, layout.width))
        if found is None:
            found = self.inner([prompt])[0].float().cpu()
            self.store.put(key, found)
        return found


def with_text_cache(parts: PriorParts, folder: Path, options: LoadOptions) -> PriorParts:
    """The parts with cached text, where the text encoders are large enough to be worth it."""
    encoders = sum(bytes_of(part) for part in folder.glob("text_encoder*"))
    if not options.config.text_cache or encoders < WORTH_BYTES:
        return parts
    store = TextStore(cache_dir("text"))
    return replace(parts, text=CachedText(parts.text, store, model_key(folder, options)))


def model_key(folder: Path, options: LoadOptions) -> str:
    """Digest of the text side of a model: repository and commit, else the folder's files, and the run's styles."""
    origin = origin_of(folder)
    files: list[Any] = [] if origin is not None else [str(folder.resolve()), *_stamps(folder)]
    settings = {name: value for name, value in asdict(options.config).items() if name not in _NOT_TEXT}
    styles = [_stamp(path) for path in _paths(settings)]
    return _digest(
        [SCHEMA, None if origin is None else asdict(origin), files, settings, styles, str(options.dtype)]
    )


def _stamps(folder: Path) -> Iterator[list[Any]]:
    """What would show that the text side of a folder was replaced."""
    for pattern in ("*.json", "text_encoder*/*", "tokenizer*/*"):
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                yield [path.relative_to(folder).as_posix(), *_stamp(path)]


def _stamp(path: Path) -> list[Any]:
    """Size and time of a file, and its end, where weights of equal size differ."""
    stat = path.stat()
    with path.open("rb") as file:
        file.seek(max(stat.st_size - _SAMPLE, 0))
        return [stat.st_size, stat.st_mtime_ns, hashlib.sha256(file.read()).hexdigest()]


def _paths(settings: Any) -> Iterator[Path]:
    """Files named anywhere in the settings."""
    if isinstance(settings, dict):
        settings = list(settings.values())
    if isinstance(settings, list | tuple):
        for value in settings:
            yield from _paths(value)
    elif isinstance(settings, str) and Path(settings).is_file():
        yield Path(settings)


def _digest(facts: list[Any]) -> str:
    text = json.dumps(facts, sort_keys=True, default=str)  # ASCII, whatever the prompt
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:40]
