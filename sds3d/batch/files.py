"""Which files the settings of a batch may name: those inside its roots, and everything that ships with sds3d."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sds3d.config.load import find_config
from sds3d.config.paths import Key, dotted, paths_in
from sds3d.config.tree import Origin, fail
from sds3d.errors import ConfigError, InputError
from sds3d.ops.skies import SKIES
from sds3d.paths import data_dir, inside_root
from sds3d.priors.catalog import PRIORS

SHIPPED = frozenset({*PRIORS, *SKIES, "full", "tiny"})
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Where the files of a batch may lie; `folder` is that of the batch file."""

    folder: Path
    roots: tuple[Path, ...]
    trusted: frozenset[str] = frozenset()  # sources whose settings may name any file: the command line's own

    def config(self, name: str, origin: Origin | None) -> Path:
        """The config file that a batch file names: a shipped one, or a file beside it.

        Raises:
            ConfigError: unknown, or outside the roots.
        """
        try:
            path = find_config(name, beside=self.folder)
        except ConfigError as error:
            fail(origin or Origin("config"), "config", str(error))
        self.may_read(path, origin)
        return path

    def may_read(self, path: Path, origin: Origin | None = None) -> None:
        """Raises ConfigError for a config file outside the roots that does not ship with sds3d."""
        try:
            inside_root(path, (*self.roots, data_dir("configs")))
        except InputError as error:
            fail(origin or Origin(str(path)), "config", f"{error}; {_WAY_OUT}")

    def settings(self, job: Any, plain: dict[str, Any], origins: Mapping[str, Origin]) -> None:
        """Check every file that a job names; `plain` (of `to_plain`) gets absolute paths, as workers live elsewhere.

        A relative path is looked for beside the batch file first, then here.

        Raises:
            ConfigError: with the place of the first that lies outside the roots.
        """
        for key, text in paths_in(job):
            origin = _origin(key, origins)
            if origin is None or text in SHIPPED:
                continue
            if origin.source in self.trusted:
                if _exists(Path(text).expanduser()):
                    _put(plain, key, str(Path(text).expanduser().resolve()))
                continue
            path = self._place(text)
            if path is None:
                continue
            try:
                _put(plain, key, str(inside_root(path, self.roots)))
            except InputError as error:
                fail(origin, dotted(key), f"{error}; {_WAY_OUT}")

    def _place(self, text: str) -> Path | None:
        """The path that a text stands for; None where it is a name."""
        if "\0" in text:
            return Path(text)
        beside = self.folder / text
        if text and not Path(text).is_absolute() and _exists(beside):
            return beside
        looks = "/" in text or "\\" in text or text.startswith(("~", ".")) or _exists(Path(text))
        if not text or not looks or (_HUB_ID.fullmatch(text) and not _exists(Path(text))):
            return None
        return Path(text)


_WAY_OUT = "move it there, or allow its folder with --root"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _origin(key: Key, origins: Mapping[str, Origin]) -> Origin | None:
    """Where a setting, or the list it stands in, was written; None for a default."""
    parts = dotted(key)
    while parts:
        if parts in origins:
            return origins[parts]
        parts = parts[: max(parts.rfind("."), parts.rfind("["), 0)]
    return None


def _put(plain: dict[str, Any], key: Key, text: str) -> None:
    inner: Any = plain
    for part in key[:-1]:
        inner = inner[part]
    inner[key[-1]] = text


def root_folders(batch_file: Path, out: Path, more: Sequence[Path]) -> tuple[Path, ...]:
    """The folder of the batch file and the out folder, and those that the command line allows."""
    return (batch_file.parent.resolve(), out.resolve(), *(path.expanduser().resolve() for path in more))
