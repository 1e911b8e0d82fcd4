"""Where the toybox data files live."""

from pathlib import Path

from sds3d.paths import data_dir


def asset_path(name: str) -> Path:
    """Path of a file in the `assets/toybox` folder."""
    return data_dir("assets") / "toybox" / name
