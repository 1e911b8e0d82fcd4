"""Fetching a pipeline from a hub: only settings, tokenizers and safetensors; one clear reason where it cannot be had.

Code that lies beside the weights is neither fetched nor run. Honours HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE
as huggingface_hub does. A machine without network is told so within seconds: one short question goes out before any
download, whose own retries are bounded by the hub's library.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sds3d.errors import PriorError
from sds3d.priors.catalog import Source
from sds3d.priors.weights import INDEX_FILE, missing_files, read_json, wanted_files

ASK_TIMEOUT_S = 5.0  # for the question whether a repository is there; downloads have the hub's own limits
# The HTTP library below the hub has changed over the versions; this is the root of its errors in each.
_TRANSPORT: tuple[type[BaseException], ...] = (HfHubHTTPError.__mro__[1], OSError)


class Refusal(Exception):  # noqa: N818 (control flow: one source refuses, the next is asked)
    """Why one source gave nothing; `final` where no other source can do better (no network, full disk)."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


def cached_folder(source: Source) -> Path | None:
    """The snapshot of a source in the hub's cache, complete or not; None where there is none."""
    found = try_to_load_from_cache(
        source.repository, INDEX_FILE, cache_dir=constants.HF_HUB_CACHE, revision=source.revision
    )
    return Path(found).parent if isinstance(found, str) else None


def lacks(folder: Path) -> list[str]:
    """What a folder lacks, a readable index included; empty where it is complete."""
    try:
        return missing_files(folder)
    except PriorError:
        return [INDEX_FILE]


@dataclass(frozen=True)
class _Place:
    """One repository on the hub that is asked now."""

    source: Source
    endpoint: str

    @property
    def name(self) -> str:
        return self.source.repository

    @property
    def url(self) -> str:
        return f"{self.endpoint}/{self.name}"


def download(source: Source, *, half: bool) -> Path:
    """Fetch what a prior reads; raises Refusal with what to do."""
    place = _Place(source, os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/"))
    if constants.HF_HUB_OFFLINE:
        raise Refusal(_offline(place, "HF_HUB_OFFLINE is set"), final=True)
    with _explained(place):
        api = HfApi(endpoint=place.endpoint)
        listed = api.model_info(
            place.name, revision=source.revision, files_metadata=True, timeout=ASK_TIMEOUT_S
        )
        index_path = hf_hub_download(
            place.name,
            INDEX_FILE,
            revision=source.revision,
            endpoint=place.endpoint,
            cache_dir=constants.HF_HUB_CACHE,
            etag_timeout=ASK_TIMEOUT_S,
        )
        sizes = {file.rfilename: file.size or 0 for file in listed.siblings or []}
        files = wanted_files(sizes, read_json(Path(index_path)), half=half)
        _check_disk(place, sum(sizes[name] for name in files))
        folder = snapshot_download(
            place.name,
            revision=source.revision,
            endpoint=place.endpoint,
            cache_dir=constants.HF_HUB_CACHE,
            etag_timeout=ASK_TIMEOUT_S,
            allow_patterns=[_literal(name) for name in files],
        )
    missing = missing_files(Path(folder))
    if missing:
        raise Refusal(f"{place.name} is not complete: {', '.join(missing)}")
    return Path(folder)


@contextmanager
def _explained(place: _Place) -> Iterator[None]:
    """Turns the errors of the hub into refusals that say what to do."""
    try:
        yield
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError) as error:
        raise _answered(place, error) from error
    except _TRANSPORT as error:
        raise _unanswered(place, error) from error


def _answered(place: _Place, error: Exception) -> Refusal:
    """What an answer of the hub means; the order matters, as gated is a kind of not found."""
    name = place.name
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, LocalEntryNotFoundError):  # it did not answer, and nothing is cached
        return Refusal(_offline(place, f"no connection to {place.endpoint}"), final=True)
    if isinstance(error, HFValidationError):
        return Refusal(f"{name} is not a hub id: {error}")
    if isinstance(error, RevisionNotFoundError):
        return Refusal(f"{name} has no revision {place.source.revision!r}; set prior.revision")
    if isinstance(error, EntryNotFoundError):
        return Refusal(f"{name} has no {INDEX_FILE}: not a diffusers pipeline")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError) or status == 403:
        return Refusal(
            f"{name} is gated: accept its licence at {place.url}, then {log_in}, "
            "or copy its folder from elsewhere and give the path"
        )
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return Refusal(f"{name} is not on {place.endpoint}, or private (then {log_in})")
    return Refusal(f"{place.endpoint} answers {status} for {name}; try again later")


def _unanswered(place: _Place, error: BaseException) -> Refusal:
    """What an error of the network or of the disk means."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return Refusal(_full(place), final=True)
    if number in (errno.EACCES, errno.EROFS):
        text = f"{constants.HF_HUB_CACHE} cannot be written; set HF_HOME to a folder that can"
        return Refusal(text, final=True)
    return Refusal(_offline(place, f"no connection to {place.endpoint}"), final=True)


def _offline(place: _Place, why: str) -> str:
    """What to do without a network, and what the cache holds of it."""
    cached = cached_folder(place.source)
    where = f"the cache {constants.HF_HUB_CACHE}"
    have = f"not in {where}" if cached is None else f"only partly in {where}: {', '.join(lacks(cached))}"
    return (
        f"{why}, and {place.name} is {have}; run once with network, or copy the pipeline folder from another "
        "machine and give its path (--prior PATH)"
    )


def _check_disk(place: _Place, size: int) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    parent = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    have = _downloaded(place.source)
    if shutil.disk_usage(parent).free < size - have:
        raise Refusal(_full(place, (size - have) / 1e9), final=True)


def _downloaded(source: Source) -> int:
    """Bytes of a half-finished download."""
    blobs = Path(constants.HF_HUB_CACHE) / f"models--{source.repository.replace('/', '--')}" / "blobs"
    return sum(blob.stat().st_size for blob in blobs.iterdir()) if blobs.is_dir() else 0


def _full(place: _Place, need_gb: float | None = None) -> str:
    need = "more room" if need_gb is None else f"{need_gb:.1f} GB"
    return (
        f"{place.name} needs {need} in {constants.HF_HUB_CACHE}, where the disk is full; free space, or set "
        "HF_HOME to a folder on a larger disk"
    )


def _literal(name: str) -> str:
    """A pattern that matches this file name alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)
