"""The one folder that the interface may read and write, and the settings that could name anything else."""

import re
from pathlib import Path
from typing import Any

from sds3d.config.paths import dotted, paths_in
from sds3d.errors import ConfigError, InputError
from sds3d.job import JobConfig
from sds3d.ops.skies import SKIES
from sds3d.priors import known_priors

# Values of settings that name a place, where the value is a name that everybody knows.
NAMES = {"prior.vae": ("full", "tiny")}
RUNS = ("edit.run", "start.run")  # settings that name a run folder
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")


class Root:
    """A folder, and the run folders below it by their ids: relative paths with slashes."""

    def __init__(self, path: Path) -> None:
        """Creates the folder; raises InputError where that is refused."""
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path}: cannot be used: {error.strerror or error}") from error
        self.path = path.resolve()

    def holds(self, path: Path) -> bool:
        """Whether a path, with all links followed, lies below the folder."""
        try:
            return path.resolve().is_relative_to(self.path)
        except (OSError, ValueError, RuntimeError):
            return False

    def run(self, run_id: str) -> Path:
        """The run folder of an id; raises InputError where there is none below the folder."""
        folder = self.path / run_id if run_id and "\0" not in run_id and len(run_id) < 500 else self.path
        hidden = any(part.startswith(".") for part in Path(run_id).parts)
        if folder == self.path or hidden or Path(run_id).is_absolute() or not self.holds(folder):
            raise InputError(f"no such run: {run_id[:100]!r}")
        return folder

    def id_of(self, folder: Path) -> str:
        """The id of a folder below the root."""
        return folder.resolve().relative_to(self.path).as_posix()

    def check(self, job: JobConfig) -> None:
        """Refuse settings that name a file or folder outside; raises ConfigError.

        Places are absolute paths: what is relative would be looked up elsewhere by the worker.
        """
        for parts, text in paths_in(job):
            key = dotted(parts)
            if not (self._known(key, text) or self._inside(text)):
                known = "a known prior, or " if key == "prior.name" else ""
                raise ConfigError(
                    f"{key}: got {text[:100]!r}, expected {known}the full path of something below {self.path}"
                )
        revision = job.prior.revision
        if revision is not None and (".." in revision or not _REVISION.fullmatch(revision)):
            raise ConfigError(f"prior.revision: got {revision[:100]!r}, expected a commit, tag or branch")

    def _known(self, key: str, text: str) -> bool:
        """Whether the text is a name that means the same everywhere."""
        if key == "prior.name":
            return text in known_priors()
        return text in NAMES.get(key, ()) or ("environment" in key and text in SKIES)

    def _inside(self, text: str) -> bool:
        return "\0" not in text and Path(text).is_absolute() and self.holds(Path(text))

    def placed(self, key: str, value: Any) -> Any:
        """A setting as a worker needs it: ids of runs become their folders."""
        if key in RUNS and isinstance(value, str) and value and not Path(value).is_absolute():
            return str(self.run(value))
        return value
