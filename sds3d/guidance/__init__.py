"""Guidance rules: one file per method, one line in this table."""

from sds3d.guidance.csd import CSD
from sds3d.guidance.sds import SDS
from sds3d.interfaces import Rule

RULES: dict[str, type[Rule]] = {
    "csd": CSD,
    "sds": SDS,
}

__all__ = ["CSD", "RULES", "SDS"]
