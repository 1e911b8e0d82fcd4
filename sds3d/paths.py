"""Where things are and how they are written: data folders, safe names, atomic files.

Nothing here knows what a run is; the only rule is that a reader never sees half a file.
"""

import os
import re
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from sds3d.errors import InputError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

_PACKAGE = Path(__file__).resolve().parent
_WINDOWS_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])", re.IGNORECASE)


def data_dir(name: str) -> Path:
    """Folder `name` ("configs" or "assets"): beside the package in a checkout, inside an installed wheel."""
    checkout = _PACKAGE.parent / name
    return checkout if (_PACKAGE.parent / "pyproject.toml").is_file() else _PACKAGE / "_data" / name


def cache_dir(name: str) -> Path:
    """Folder `name` of what can be made anew: in SDS3D_CACHE_DIR, else XDG_CACHE_HOME/sds3d, else ~/.cache/sds3d."""
    own = os.environ.get("SDS3D_CACHE_DIR")
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(own) if own else Path(shared) / "sds3d").expanduser() / name


def safe_slug(text: str, max_chars: int = 48) -> str:
    """A file-name part for any text: ASCII letters, digits and single dashes, never empty or reserved.

    >>> safe_slug("A red mug / ../etc"), safe_slug("赤い"), safe_slug("CON")
    ('a-red-mug-etc', 'prompt', 'con-')
    """
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_text.lower()).strip("-")[:max_chars].strip("-") or "prompt"
    return f"{slug}-" if _WINDOWS_RESERVED.fullmatch(slug) else slug


def inside_root(path: Path, roots: Sequence[Path]) -> Path:
    """`path` with all links followed; raises InputError where it then lies in none of the `roots`."""
    try:
        real = path.expanduser().resolve()
        if any(real.is_relative_to(root.expanduser().resolve()) for root in roots):
            return real
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, an unknown ~user, a zero byte
        raise InputError(f"{str(path)!r}: not a usable path: {error}") from error
    allowed = ", ".join(str(root) for root in roots) or "none"
    raise InputError(f"{path}: outside the folders that may be used here ({allowed})")


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block succeeds and vanishes when it fails.

    The old file stays whole until the new one is complete and, if `durable`, flushed to disk (slow on a busy
    disk, so not for previews). A full or read-only disk raises InputError.
    """
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        _publish(temporary, path, durable)
    except OSError as error:
        raise InputError(
            f"{path}: cannot write: {error.strerror or error}. Free space or choose another --out."
        ) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


def _publish(temporary: Path, path: Path, durable: bool) -> None:
    os.chmod(temporary, 0o644)
    if durable:
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
    os.replace(temporary, path)
    if durable and os.name == "posix":  # the rename itself must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_atomic(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a whole file or nothing; raises InputError when the disk refuses."""
    with replacing(path, durable=durable) as temporary:
        temporary.write_bytes(data)


LOCK_NAME = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside the block this process alone works in `folder`; the operating system ends the claim of a dead one.

    Raises:
        InputError: another process works there, or the folder cannot be written.
    """
    path = folder / LOCK_NAME
    handle = _open_lock(path)
    try:
        while not _same_file(handle, path):  # the one before has just removed it
            os.close(handle)
            handle = _open_lock(path)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        if _same_file(handle, path):
            with suppress(OSError):
                path.unlink()
        os.close(handle)


def _open_lock(path: Path) -> int:
    """The locked file; InputError where another process has locked it."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"{path.parent}: cannot write here: {error.strerror or error}") from error
    if _try_lock(handle):
        return handle
    who = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
    os.close(handle)
    raise InputError(f"{path.parent}: process {who} is working on this run; wait for it or stop it first")


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _try_lock(handle: int) -> bool:
    """Take the lock of an open file without waiting; True on systems that have none to offer."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def claim_folder(folder: Path) -> Path:
    """Create an empty folder for a new run; one that holds anything is refused and not touched."""
    try:
        if folder.is_dir() and any(folder.iterdir()):
            what = "another run" if (folder / "manifest.json").exists() else "other files"
            raise InputError(
                f"{folder}: holds {what}; choose another --out, or continue a run with: sds3d resume {folder}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass  # proves that files can be written here before anything costly starts
    except OSError as error:
        raise InputError(f"{folder}: cannot write here: {error.strerror or error}") from error
    return folder


def claim_run_folder(config_name: str, prompt: str, root: Path | None = None) -> Path:
    """A new folder `outputs/<config>/<prompt>@<time>`, numbered where that name is taken; `root` is for `outputs`."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    parent = (root or Path("outputs")) / safe_slug(Path(config_name).stem)
    name, count = f"{safe_slug(prompt)}@{stamp}", 1
    while (parent / (name if count == 1 else f"{name}-{count}")).exists():
        count += 1
    return claim_folder(parent / (name if count == 1 else f"{name}-{count}"))
