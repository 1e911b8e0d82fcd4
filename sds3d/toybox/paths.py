"""Where the toybox data files live."""

from pathlib import Path


def asset_path(name: str) -> Path:
    """Path of a file under the repository's ``assets/toybox`` folder."""
    return Path(__file__).resolve().parents[2] / "assets" / "toybox" / name
