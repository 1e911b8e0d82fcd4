"""`sds3d ui` as a process, for tests that talk to it."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def serving(root: Path) -> Iterator[tuple[str, Path]]:
    """(address, root) while the server runs; it must end well."""
    command = [sys.executable, "-m", "sds3d", "ui", "--port", "0", "--allowed-root", str(root)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "ready" in line, line
        try:
            yield line.split()[-1].rstrip("/"), root
        finally:
            process.terminate()
        assert process.wait(60) == 0
