"""Which files of a pipeline belong to a part and whether they are all there: names and headers only, nothing is loaded.

The same rules choose what is downloaded, what counts as a complete folder, and which variant is read.
"""

import json
import re
import struct
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sds3d.errors import PriorError

INDEX_FILE = "model_index.json"
DEFAULT_PIPELINE = "StableDiffusionPipeline"
UNUSED_PARTS = ("safety_checker", "feature_extractor", "watermarker")  # named by pipelines, read by no family
HALF = "fp16"  # the variant in half precision: half the download
SMALL_FILES = (".json", ".txt", ".model")
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?"
    r"(?:-(?P<shard>\d{5})-of-(?P<count>\d{5}))?\.safetensors"
)
_WORDS = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("tokenizer.model",),
    ("vocab.txt",),
)
_NOT_NETWORKS = ("Scheduler", "Tokenizer", "TokenizerFast", "Processor", "Extractor", "ProcessorFast")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a pipeline folder; PriorError where it is missing or damaged."""
    if not path.is_file():
        raise PriorError(f"{path.parent}: no {path.name}; expected a diffusers pipeline folder")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PriorError(f"{path}: cannot be read ({error}); download or copy it again") from error
    if not isinstance(found, dict):
        raise PriorError(f"{path}: got a {type(found).__name__}, expected a JSON object")
    return found


def pipeline_of(folder: Path) -> str:
    """The pipeline class that a folder names, from its model_index.json alone."""
    return named_pipeline(read_json(folder / INDEX_FILE))


def named_pipeline(index: Mapping[str, Any]) -> str:
    """The pipeline class of an index. Public ImageDream folders name MVDream's, and differ by an image encoder."""
    name = str(index.get("_class_name", DEFAULT_PIPELINE))
    reads_pictures = (index.get("image_encoder") or [None, None])[1] is not None
    return "ImageDreamPipeline" if name == "MVDreamPipeline" and reads_pictures else name


def parts_of(index: Mapping[str, Any]) -> dict[str, str]:
    """Class name of every part that a pipeline index names and a prior may read."""
    return {
        name: str(entry[1])
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None and name not in UNUSED_PARTS
    }


def is_network(class_name: str) -> bool:
    """Whether a part of this class has weights."""
    return not class_name.endswith(_NOT_NETWORKS)


def weight_files(names: Iterable[str], *, half: bool) -> tuple[str | None, list[str]] | None:
    """Variant and file names of one complete set of weights among the files of a part; None where there is none.

    `half` prefers the half-precision variant, otherwise full precision comes first.
    """
    order: tuple[str | None, ...] = (HALF, None) if half else (None, HALF)
    sets = _sets(names)
    complete = [v for v in order if v in sets and not _lost(sets[v])]
    return (complete[0], sorted(sets[complete[0]])) if complete else None


def variant_of(part: Path, *, half: bool) -> str | None:
    """The variant to read from the folder of a part; None is the plain one (also where nothing is complete)."""
    chosen = weight_files(_present(part), half=half)
    return None if chosen is None else chosen[0]


def wanted_files(names: Collection[str], index: Mapping[str, Any], *, half: bool) -> list[str]:
    """The files of a repository that a prior reads: settings, tokenizers and one set of weights per network.

    Weights come as safetensors or not at all; autoencoders in full precision where there is a choice, because
    gradients go through them.
    """
    parts = parts_of(index)
    chosen = [name for name in names if name in (INDEX_FILE, "sds3d_prior.json")]
    for part, class_name in parts.items():
        inside = [PurePosixPath(name).name for name in names if _folder_of(name) == part]
        kept = [name for name in inside if name.endswith(SMALL_FILES)]
        if is_network(class_name):
            weights = weight_files(inside, half=half and part != "vae")
            kept += [] if weights is None else weights[1]
        chosen += [f"{part}/{name}" for name in kept]
    return sorted(chosen)


def missing_files(folder: Path) -> list[str]:
    """What a pipeline folder lacks, part by part; empty where it is complete.

    Raises:
        PriorError: `folder` has no readable model_index.json.
    """
    missing = []
    for part, class_name in parts_of(read_json(folder / INDEX_FILE)).items():
        reason = _missing(folder / part, class_name)
        if reason is not None:
            missing.append(f"{part}/ ({reason})")
    return missing


def bytes_of(folder: Path) -> int:
    """Size of the files in a folder, links followed."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _missing(part: Path, class_name: str) -> str | None:
    if not part.is_dir():
        return "no such folder"
    names = _present(part)
    if "Tokenizer" in class_name:
        whole = any(all(name in names for name in group) for group in _WORDS)
        return None if whole else "no vocabulary"
    if not is_network(class_name):
        return None if any(name.endswith(".json") for name in names) else "no settings"
    return _missing_weights(part, names)


def _missing_weights(part: Path, names: set[str]) -> str | None:
    if "config.json" not in names:
        return "no config.json"
    if weight_files(names, half=False) is not None:
        return None
    lost = sorted(name for files in _sets(names).values() for name in _lost(files))
    if lost:
        return f"missing {', '.join(lost)}"
    for path in sorted(part.glob("*.safetensors")):
        if path.name not in names:  # a link of the hub's cache may point to a file that is gone
            return f"{path.name} is only partly there" if path.exists() else f"missing {path.name}"
    pickles = any(name.endswith((".bin", ".ckpt")) for name in names)
    return "weights only as pickle, safetensors needed" if pickles else "no safetensors"


def _present(part: Path) -> set[str]:
    """Names of the files of a part that are really there: dangling links and cut-off weights are not."""
    files = [path for path in part.iterdir() if path.is_file()] if part.is_dir() else []
    return {path.name for path in files if path.suffix != ".safetensors" or _is_whole(path)}


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8 or (length := struct.unpack("<Q", head)[0]) > size - 8:
            return False
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
    return size == 8 + length + max(ends, default=0)


def _sets(names: Iterable[str]) -> dict[str | None, set[str]]:
    """Weight files by variant."""
    sets: dict[str | None, set[str]] = {}
    for name in names:
        if found := _WEIGHTS.fullmatch(name):
            sets.setdefault(found["variant"], set()).add(name)
    return sets


def _lost(files: Collection[str]) -> list[str]:
    """Shards that a set of weight files lacks; a single file beside shards makes it whole."""
    found = [match for name in files if (match := _WEIGHTS.fullmatch(name))]
    if any(match["count"] is None for match in found):
        return []
    lost = []
    for match in found[:1]:
        stem, count = match.string.rpartition(f"-{match['shard']}-of-")[0], match["count"]
        every = [f"{stem}-{i:05d}-of-{count}.safetensors" for i in range(1, int(count) + 1)]
        lost = [name for name in every if name not in files]
    return lost


def _folder_of(name: str) -> str:
    """First folder of a path in a repository, "" for files at its root or deeper than one folder."""
    pieces = PurePosixPath(name).parts
    return pieces[0] if len(pieces) == 2 else ""
