"""Guidance rules, time laws and noise sources: one file per method, one line in a table."""

from sds3d.guidance.csd import CSD
from sds3d.guidance.sds import SDS
from sds3d.guidance.table import RULES

__all__ = ["CSD", "RULES", "SDS"]
