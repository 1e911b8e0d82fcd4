"""Engines whose package is missing say what to install."""

import sys
from pathlib import Path

import pytest

from sds3d.cli import main


@pytest.mark.parametrize(
    ("engine", "package", "extra"), [("ray", "ray", "cluster"), ("slurm", "submitit", "slurm")]
)
def test_a_missing_package_is_one_message(
    engine: str,
    package: str,
    extra: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "p.txt").write_text("a red mug\n")
    assert main(["batch", str(tmp_path / "p.txt"), "--out", str(tmp_path / "out"), "--engine", engine]) == 2
    said = capsys.readouterr().err
    assert f"pip install 'sds3d[{extra}]'" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
