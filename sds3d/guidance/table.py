"""The table of guidance rules: one file per method, one line here."""

from sds3d.guidance.csd import CSD
from sds3d.guidance.sds import SDS
from sds3d.interfaces import Rule

RULES: dict[str, type[Rule]] = {
    "csd": CSD,
    "sds": SDS,
}
