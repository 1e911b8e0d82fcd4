"""Where the files of a prior are: a folder, the hub's cache on this disk, or a download. Says clearly why not."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from sds3d.errors import PriorError
from sds3d.priors.catalog import PRIORS, PriorInfo, Source
from sds3d.priors.config import PriorConfig
from sds3d.priors.download import Refusal, cached_folder, download, lacks
from sds3d.priors.weights import INDEX_FILE, missing_files

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CACHED = re.compile(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\]([^/\\]+)$")


def find_folder(config: PriorConfig) -> Path:
    """The complete pipeline folder of a prior: a known name, a folder, or a hub id; downloads it where needed.

    Raises:
        PriorError: one message that says what was tried and what to do.
    """
    local = local_folder(config)
    if local is not None:
        return complete(local, config.name)
    sources = sources_of(config)
    for source in sources:
        cached = cached_folder(source)
        if cached is not None and not lacks(cached):
            return cached
    half = config.dtype != "float32"
    reasons: list[str] = []
    for source in sources:
        try:
            return download(source, half=half)
        except Refusal as refusal:
            reasons.append(str(refusal))
            if refusal.final:
                break
    here = "" if config.name in PRIORS else "no such folder; as a hub id: "
    raise PriorError(f"prior {config.name!r}: {here}{'; '.join(reasons)}")


def local_folder(config: PriorConfig) -> Path | None:
    """The folder that a config names, or that ships with the package; None for what lives on a hub.

    Raises:
        PriorError: a path without a folder, an unknown name, or a revision that makes no sense.
    """
    info = PRIORS.get(config.name)
    path = Path(config.name).expanduser()
    if info is None and path.is_file():
        raise PriorError(
            f"prior {config.name!r}: a file, expected a diffusers pipeline folder; convert a single-file "
            "checkpoint once with diffusers' from_single_file(...).save_pretrained(FOLDER)"
        )
    folder = info.folder if info is not None else path if config.name and path.is_dir() else None
    if folder is None:
        if info is None and not _HUB_ID.fullmatch(config.name):
            raise PriorError(unknown(config.name))
        return None
    if config.revision is not None:
        raise PriorError(
            f"prior.revision: {config.name!r} is a folder; only priors from a hub have revisions"
        )
    if not folder.is_dir():
        raise PriorError(
            f"prior {config.name!r}: its files are missing from {folder}; install sds3d again, "
            "or give another prior from `sds3d priors` or a folder"
        )
    return folder


def unknown(name: str) -> str:
    """What to say about a name that is neither known nor a folder nor a hub id."""
    close = difflib.get_close_matches(name.lower(), PRIORS, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return (
        f"prior {name!r}: {hint}not one of {', '.join(sorted(PRIORS))} and no such folder; "
        "give a name from `sds3d priors`, the path of a diffusers pipeline folder, or a hub id owner/name"
    )


def complete(folder: Path, name: str) -> Path:
    """The folder itself; PriorError that names every missing part."""
    missing = missing_files(folder)
    if missing:
        raise PriorError(
            f"prior {name!r}: {folder} is not complete: {', '.join(missing)}; download or copy it again"
        )
    return folder


def sources_of(config: PriorConfig) -> tuple[Source, ...]:
    """Repositories in the order in which they are tried; `prior.revision` replaces the pinned one of the first."""
    info = PRIORS.get(config.name)
    known = info.sources if info is not None else (Source(repository=config.name),)
    if config.revision is None:
        return known
    return (Source(repository=known[0].repository, revision=config.revision),)


def origin_of(folder: Path) -> Source | None:
    """Repository and commit of a folder in the hub's cache; None for any other folder."""
    found = _CACHED.search(str(folder.absolute()))
    if found is None:
        return None
    return Source(repository=f"{found[1]}/{found[2]}".replace("--", "/"), revision=found[3])


def files_of(config: PriorConfig) -> str:
    """What a run with this prior reads, for its record: "owner/name@commit", else the folder; asks no network."""
    folder = local_folder(config)
    if folder is None:
        cached = (cached_folder(source) for source in sources_of(config))
        folder = next((found for found in cached if found is not None and not lacks(found)), None)
    if folder is None:
        return ""
    origin = origin_of(folder)
    return str(folder.resolve()) if origin is None else f"{origin.repository}@{origin.revision}"


def state_of(info: PriorInfo) -> str:
    """Whether a prior is on this disk: "yes", "partly" or "no"."""
    folders = [info.folder] if info.folder is not None else [cached_folder(s) for s in info.sources]
    there = [folder for folder in folders if folder is not None and (folder / INDEX_FILE).is_file()]
    if not there:
        return "no"
    return "partly" if all(lacks(folder) for folder in there) else "yes"


def describe_sources(sources: Sequence[Source]) -> str:
    """Repositories on one line, pinned ones with the start of their commit."""
    return ", ".join(
        s.repository if s.revision == "main" else f"{s.repository}@{s.revision[:7]}" for s in sources
    )
