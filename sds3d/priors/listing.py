"""What `sds3d priors` says: the catalog with what of it is on this disk, and the examination of one prior."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from sds3d.errors import PriorError
from sds3d.priors.catalog import PRIORS, PriorInfo
from sds3d.priors.config import PriorConfig
from sds3d.priors.families import FAMILIES, family_of
from sds3d.priors.hub import cached_folder, complete, describe_sources, local_folder, sources_of, state_of
from sds3d.priors.vocabulary import unknown_word_warnings
from sds3d.priors.weights import INDEX_FILE, bytes_of, is_network, parts_of, pipeline_of, read_json

COLUMNS = ("name", "family", "size", "licence", "gated", "source", "cached", "summary")


def rows() -> list[dict[str, Any]]:
    """One record per known prior, for people who parse."""
    return [_row(name, info) for name, info in PRIORS.items()]


def _row(name: str, info: PriorInfo) -> dict[str, Any]:
    family = FAMILIES.get(info.pipeline)
    return {
        "name": name,
        "family": family.module if family is not None else info.pipeline,
        "pipeline": info.pipeline,
        "size_gb": info.size_gb,
        "memory_gb": info.memory_gb,
        "image_px": info.image_px,
        "licence": info.licence,
        "gated": info.gated,
        "sources": [f"{source.repository}@{source.revision}" for source in info.sources],
        "source": "ships with sds3d" if info.folder is not None else describe_sources(info.sources[:1]),
        "cached": state_of(info),
        "preset": info.preset,
        "summary": info.summary,
        "notes": info.notes,
    }


def table() -> list[str]:
    """One line per known prior under a line of headings."""
    cells = [list(COLUMNS)]
    for row in rows():
        shown = row | {"size": f"{row['size_gb']:.3g} GB", "gated": "gated" if row["gated"] else "open"}
        cells.append([str(shown[column]) for column in COLUMNS])
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells]


@dataclass(frozen=True)
class Finding:
    """One line of an examination."""

    name: str
    detail: str


def examine(config: PriorConfig) -> Iterator[Finding]:
    """What is found in the folder of a prior, then what it is like once loaded; downloads nothing.

    Raises:
        PriorError: the folder is not here, not complete, or does not load.
    """
    folder = _folder(config)
    yield Finding("folder", str(folder))
    pipeline = pipeline_of(folder)
    yield Finding("pipeline", f"{pipeline}: {family_of(pipeline, folder).title}")
    complete(folder, config.name)
    for part, class_name in parts_of(read_json(folder / INDEX_FILE)).items():
        yield Finding(part, _describe(folder, part, class_name))
    yield from _loaded(folder, config)


def prompt_warnings(config: PriorConfig, prompts: Sequence[str]) -> list[str]:
    """What a prior with a small vocabulary would say about these prompts, from its tokenizer alone.

    Nothing for priors that are not in a folder of this machine, or know all words.
    """
    try:
        folder = local_folder(config)
        tokenizer = None if folder is None else _tokenizer(folder)
    except PriorError:  # told where the prior is loaded
        return []
    return [] if tokenizer is None else unknown_word_warnings(tokenizer, prompts)


@lru_cache(maxsize=4)
def _tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    from sds3d.priors.folder import PipelineFolder

    if not (folder / "tokenizer" / "tokenizer.json").is_file():
        return None
    return PipelineFolder(folder).load("tokenizer", PreTrainedTokenizerFast)


def _folder(config: PriorConfig) -> Path:
    local = local_folder(config)
    if local is not None:
        return local
    sources = sources_of(config)
    cached = [folder for folder in map(cached_folder, sources) if folder is not None]
    if not cached:
        raise PriorError(
            f"prior {config.name!r}: not on this disk; a run would fetch it from {describe_sources(sources)}"
        )
    return cached[0]


def _describe(folder: Path, part: str, class_name: str) -> str:
    from transformers import AutoTokenizer

    from sds3d.priors.folder import PipelineFolder

    if "Tokenizer" in class_name:
        words = len(PipelineFolder(folder).load(part, AutoTokenizer))
        return f"{class_name}, {words:,} words"
    size = f", {bytes_of(folder / part) / 1e6:,.1f} MB" if is_network(class_name) else ""
    return f"{class_name}{size}"


def _loaded(folder: Path, config: PriorConfig) -> Iterator[Finding]:
    from sds3d.priors import open_prior

    prior = open_prior(folder, config, torch.device("cpu"))
    count = sum(p.numel() for p in prior.denoiser.module.parameters())
    yield Finding("network", f"{count / 1e6:,.1f} M parameters, predicts {prior.prediction}")
    yield Finding("x", f"{'x'.join(map(str, prior.shape))} of {prior.image_px} px images")
    text = prior.encode_text(["a red mug"])
    if not text.isfinite().all():
        raise PriorError(f"{folder}: its text encoder gives numbers that are not finite")
    layout = prior.text.packing
    yield Finding("text", f"{layout.tokens} tokens of width {layout.width}")
