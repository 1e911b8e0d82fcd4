"""The program in docs/ui.md runs as it stands there, against a server of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sds3d.mesh.files import load_mesh
from tests.serving import ROOT, serving

pytest.importorskip("gradio")


def test_the_snippet_of_the_documentation_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "ui.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    with serving(tmp_path / "root") as (address, _):
        script = code[1].replace("http://127.0.0.1:7860/", address) + "\nprint(path)\n"
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert re.search(r"done \d+ faces", done.stdout)
        assert len(load_mesh(Path(done.stdout.splitlines()[-1])).faces) > 100
