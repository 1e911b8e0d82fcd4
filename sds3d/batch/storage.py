"""Where the runs of a batch live: a folder that every machine sees, or an object store through fsspec.

In a shared folder a run works in place; its lock keeps a second worker out. With an object store it works in a
folder of its machine, which is filled from the store before and copied there at every checkpoint and at the end;
of two workers on one job the later attempt alone may write.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from sds3d.checkpoint import listed
from sds3d.errors import ConfigError, InputError, Sds3dError
from sds3d.paths import write_atomic

JOBS, BEATS, STOP, PLANS, ATTEMPTS = "jobs", "beats", "stop", "plans", "attempts"


class SupersededError(Sds3dError):
    """A later attempt at the same job has begun elsewhere."""

    exit_code = 1


class Storage(Protocol):
    """What workers and the driver of a batch share."""

    url: str

    def begin(self, job: str, attempt: int) -> Path:
        """The folder to run in, with what earlier attempts left."""

    def save(self, job: str, attempt: int) -> None:
        """Keep what the run has written so far."""

    def folder(self, job: str) -> Path | None:
        """The run folder where the driver can see it as files."""

    def fetch(self, job: str, names: Iterable[str], to: Path) -> None:
        """Copy some files of a run into a folder of this machine."""

    def read(self, name: str) -> bytes | None:
        """A small shared file; None where there is none."""

    def write(self, name: str, data: bytes) -> None:
        """Replace a small shared file."""


def open_storage(url: str) -> Storage:
    """The storage behind a path or an fsspec URL.

    Raises:
        ConfigError: a URL that machines cannot share, or whose protocol is not installed.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return SharedFolder(Path(url))
    if scheme == "file":
        return SharedFolder(Path("/" + rest.lstrip("/")))
    if scheme == "memory":
        raise ConfigError(
            f"--storage: {url} is seen by one process only; give a shared folder or an object store"
        )
    import fsspec

    try:
        files, base = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"--storage: cannot use {url}: {error}") from error
    return RemoteStorage(url, files, base)


class SharedFolder:
    """A folder under one path on all machines."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.url = str(self.root)

    def begin(self, job: str, attempt: int) -> Path:
        """The run folder itself."""
        (self.root / JOBS).mkdir(parents=True, exist_ok=True)
        return self.root / JOBS / job

    def save(self, job: str, attempt: int) -> None:
        """Nothing to do: the run works in place."""

    def folder(self, job: str) -> Path | None:
        """The run folder."""
        return self.root / JOBS / job

    def fetch(self, job: str, names: Iterable[str], to: Path) -> None:
        """Nothing to do: the files are here."""

    def read(self, name: str) -> bytes | None:
        """A small file; None where there is none."""
        try:
            return (self.root / name).read_bytes()
        except OSError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Replace a small file; not flushed, as it is soon replaced again."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data, durable=False)


class RemoteStorage:
    """An fsspec file system; runs work in a scratch folder of their machine (SDS3D_SCRATCH, else the temporary one)."""

    def __init__(self, url: str, files: Any, base: str) -> None:
        self.url, self.files, self.base = url, files, base.rstrip("/")
        self._sent: dict[
            tuple[str, str], tuple[int, int]
        ] = {}  # (job, name) -> size and time of what was copied

    def begin(self, job: str, attempt: int) -> Path:
        """A fresh scratch folder with the last state of the run; from here on earlier attempts may not write."""
        self.write(f"{ATTEMPTS}/{job}", str(attempt).encode())
        folder = self._scratch(job)
        shutil.rmtree(folder, ignore_errors=True)
        remote = f"{self.base}/{JOBS}/{job}"
        found = self.files.find(remote) if self.files.exists(remote) else []
        for name in found:
            inside = str(name)[len(remote) :].lstrip("/")
            target = folder / inside
            if not target.resolve().is_relative_to(folder.resolve()):
                raise InputError(f"{self.url}: holds a file outside its folder: {name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # an old checkpoint that has just been removed
                self.files.get_file(str(name), str(target))
        return folder

    def save(self, job: str, attempt: int) -> None:
        """Copy what is new, checkpoints before the manifest that counts on them, then remove what is gone.

        Raises:
            SupersededError: a later attempt has begun.
        """
        owner = self.read(f"{ATTEMPTS}/{job}")
        if owner is not None and int(owner) > attempt:
            raise SupersededError(f"{job}: attempt {attempt} gives way to attempt {int(owner)}")
        folder, remote = self._scratch(job), f"{self.base}/{JOBS}/{job}"
        paths = sorted(
            (p for p in folder.rglob("*") if p.is_file()), key=lambda p: (p.name == "manifest.json", p)
        )
        for path in paths:
            if path.name.startswith("."):  # locks and half-written files
                continue
            inside, stat = path.relative_to(folder).as_posix(), path.stat()
            mark = (stat.st_size, stat.st_mtime_ns)
            if self._sent.get((job, inside)) != mark:
                self.files.makedirs(f"{remote}/{inside}".rpartition("/")[0], exist_ok=True)
                self.files.put_file(str(path), f"{remote}/{inside}")
                self._sent[job, inside] = mark
        self._prune(folder, remote)

    def _prune(self, folder: Path, remote: str) -> None:
        """Remove checkpoints that the run itself has removed."""
        for local in {path.parent for path in folder.rglob("checkpoints/*.safetensors")}:
            there = f"{remote}/{local.relative_to(folder).as_posix()}"
            kept = {path.name for path in listed(local)}
            for name in self.files.ls(there, detail=False):
                if str(name).rpartition("/")[2] not in kept:
                    with suppress(FileNotFoundError):
                        self.files.rm_file(str(name))

    def folder(self, job: str) -> Path | None:
        """None: its files are not here."""
        return None

    def fetch(self, job: str, names: Iterable[str], to: Path) -> None:
        """Copy files that exist; the others are left out."""
        to.mkdir(parents=True, exist_ok=True)
        for name in names:
            with suppress(FileNotFoundError):
                (to / name).parent.mkdir(parents=True, exist_ok=True)
                self.files.get_file(f"{self.base}/{JOBS}/{job}/{name}", str(to / name))

    def read(self, name: str) -> bytes | None:
        """A small object; None where there is none."""
        try:
            data: bytes = self.files.cat_file(f"{self.base}/{name}")
            return data
        except OSError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Replace a small object."""
        path = f"{self.base}/{name}"
        self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
        self.files.pipe_file(path, data)

    def _scratch(self, job: str) -> Path:
        root = Path(os.environ.get("SDS3D_SCRATCH") or tempfile.gettempdir())
        return root / f"sds3d-batch-{os.getpid()}" / job


def beat(storage: Storage, job: str, facts: Mapping[str, Any]) -> None:
    """Tell that a worker is alive and where its run stands."""
    storage.write(f"{BEATS}/{job}.json", json.dumps(dict(facts)).encode())


def last_beat(storage: Storage, job: str) -> dict[str, Any]:
    """What `beat` told last; empty where nothing was told."""
    data = storage.read(f"{BEATS}/{job}.json")
    try:
        found = json.loads(data or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
