"""The table of guidance rules: one file per method, one line here."""

from sds3d.guidance.asd import ASD
from sds3d.guidance.bridge import Bridge
from sds3d.guidance.cds import CDS
from sds3d.guidance.csd import CSD
from sds3d.guidance.dds import DDS
from sds3d.guidance.fdiv import FDiv
from sds3d.guidance.isd import ISD
from sds3d.guidance.ism import ISM
from sds3d.guidance.lmc import LMC
from sds3d.guidance.nfsd import NFSD
from sds3d.guidance.pds import PDS
from sds3d.guidance.reward import RewardWeighted
from sds3d.guidance.rfds import RFDS
from sds3d.guidance.sdi import SDI
from sds3d.guidance.sds import SDS
from sds3d.guidance.ssd import SSD
from sds3d.guidance.tsm import TSM
from sds3d.guidance.vdm import VDM
from sds3d.guidance.vsd import VSD
from sds3d.interfaces import Rule

RULES: dict[str, type[Rule]] = {
    "asd": ASD,
    "bridge": Bridge,
    "cds": CDS,
    "csd": CSD,
    "dds": DDS,
    "fdiv": FDiv,
    "isd": ISD,
    "ism": ISM,
    "lmc": LMC,
    "nfsd": NFSD,
    "pds": PDS,
    "reward": RewardWeighted,
    "rfds": RFDS,
    "sdi": SDI,
    "sds": SDS,
    "ssd": SSD,
    "tsm": TSM,
    "vdm": VDM,
    "vsd": VSD,
}
