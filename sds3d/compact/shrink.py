"""The smallest file of a cloud that loses no more than it may: prune, recover, quantise, look; again with fewer.

    significance -> keep the best -> recover -> encode -> decode -> PSNR over held-out views

Every round starts from the cloud of the round before, so that it only has to recover from a small cut. What is judged
is the file as it is read back, not the cloud in memory.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sds3d.compact.quantise import morton_order, with_codebook
from sds3d.compact.recover import recover
from sds3d.compact.significance import significance
from sds3d.compact.views import SUPERSAMPLES, Pictures, psnr, scattered_cameras
from sds3d.config.option import option
from sds3d.errors import ConfigError
from sds3d.mesh.splat_cloud import GaussianCloud
from sds3d.mesh.splat_files import SPLAT_DECODERS, SPLAT_ENCODERS
from sds3d.mesh.splat_ply import encode_ply
from sds3d.rng import Stream

FORMATS = ("spz", "splat")
_FEWEST = 16  # Gaussians
_REFINEMENTS = 2  # smaller cuts after the first that went too far


@dataclass(frozen=True, kw_only=True)
class CompactConfig:
    """How a cloud is compacted. Every field is checked when the record is made."""

    format: str = option(
        "spz", help="spz (24-bit positions, the rest 8-bit, gzipped) or splat (32 bytes each)"
    )
    max_loss_db: float = option(1.0, help="how much PSNR may be lost over held-out views", ge=0.0, le=60.0)
    like_db: float = option(
        40.0, help="how like the original's own renders the file's must stay, as PSNR", ge=0.0, le=100.0
    )
    ratio: float | None = option(None, help="stop once the file is this much smaller", ge=1.0, le=1e6)
    keep: float = option(0.7, help="share of the Gaussians that a round keeps", ge=0.05, le=0.99)
    codes: int = option(256, help="different colours, by vector quantisation; 0 = any", ge=0, le=65_536)
    steps: int = option(60, help="steps of fine-tuning per round; 0 = none", ge=0, le=100_000)
    size_px: int = option(128, help="side of the pictures that are compared and learned from", ge=16, le=2048)
    views: int = option(64, help="views that significance and fine-tuning see", ge=4, le=1000)
    held_out: int = option(16, help="other views, on which PSNR is measured", ge=1, le=1000)
    seed: int = option(0, help="fixes the views and the order in which they are learned from", ge=0)

    def __post_init__(self) -> None:
        """Raise ConfigError for a value that cannot work."""
        if self.format not in FORMATS:
            raise ConfigError(f"--format: got {self.format!r}, expected one of {', '.join(FORMATS)}")
        for name, spec in type(self).__dataclass_fields__.items():
            low, high, value = spec.metadata.get("min"), spec.metadata.get("max"), getattr(self, name)
            if value is None or low is None:
                continue
            # Not a number is in no range.
            if not low <= value <= (math.inf if high is None else high):
                raise ConfigError(
                    f"compact: {name} is {value}; expected {low} "
                    + (f"to {high}" if high is not None else "or more")
                )


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A cloud with its file, and how good that file looks."""

    cloud: GaussianCloud
    data: bytes
    psnr_db: float  # of the file against the alias-free pictures of the original
    agreement_db: float  # of the file against the original's own renders


@dataclass(frozen=True, kw_only=True)
class Compacted:
    """The smallest file that was found, and what it cost."""

    data: bytes
    gaussians_before: int
    gaussians_after: int
    bytes_before: int  # as a .ply with the standard fields
    psnr_before_db: float  # of the original against its own alias-free pictures
    psnr_after_db: float
    agreement_db: float
    within: bool  # whether both limits hold; false only where quantisation alone breaks one
    rounds: list[dict[str, Any]] = field(default_factory=list)  # every attempt, for the report

    @property
    def ratio(self) -> float:
        """How much smaller the file is."""
        return self.bytes_before / len(self.data)

    @property
    def loss_db(self) -> float:
        """PSNR lost over the held-out views; negative where the file is closer to the alias-free pictures."""
        return self.psnr_before_db - self.psnr_after_db


def shrink(
    cloud: GaussianCloud, config: CompactConfig, tell: Callable[[str], None] | None = None
) -> Compacted:
    """Compact a cloud; it stays as it is.

    PSNR needs a truth that is not the original itself, which would be infinitely like it: that truth is the original
    without aliasing, every pixel the mean over 4 x 4 smaller ones. A rough original leaves much room there, so the
    file must also stay like the original's own renders (`like_db`). Raises ExportError for an empty or non-finite
    cloud.
    """
    cloud = cloud.finite()
    stream = Stream(config.seed, "compact")
    device = cloud.means.device
    learned = scattered_cameras(config.views, config.size_px, stream.fork("views")).to(device)
    held_out = scattered_cameras(config.held_out, config.size_px, stream.fork("held out")).to(device)
    teacher = Pictures.of(cloud, learned)
    shown, truth = Pictures.of(cloud, held_out), Pictures.of(cloud, held_out, SUPERSAMPLES)
    before, whole = psnr(shown, truth), len(encode_ply(cloud))

    def attempt(start: GaussianCloud, count: int, index: int) -> Attempt:
        kept = start
        if count < len(start):
            order = significance(start, learned).argsort(descending=True, stable=True)
            kept = start.take(order[:count].sort().values)
        steps = config.steps if count < len(start) or start.harmonics is not None else 0
        tuned = recover(kept, teacher, steps, stream.fork(f"round{index}"))
        few = with_codebook(tuned, config.codes, stream.fork(f"codes{index}"))
        data = SPLAT_ENCODERS[config.format](few.take(morton_order(few.means)))
        read = SPLAT_DECODERS[config.format](data, "compact")
        seen = Pictures.of(read.to(device), held_out)
        made = Attempt(cloud=tuned, data=data, psnr_db=psnr(seen, truth), agreement_db=psnr(seen, shown))
        rounds.append(
            {
                "gaussians": count,
                "bytes": len(data),
                "psnr_db": round(made.psnr_db, 3),
                "agreement_db": round(made.agreement_db, 3),
            }
        )
        if tell is not None:
            tell(
                f"{count} Gaussians, {whole / len(data):.1f}x smaller, {before - made.psnr_db:+.2f} dB lost, "
                f"{made.agreement_db:.1f} dB like the original"
            )
        return made

    def holds(made: Attempt) -> bool:
        return before - made.psnr_db <= config.max_loss_db and made.agreement_db >= config.like_db

    rounds: list[dict[str, Any]] = []
    best = attempt(cloud, len(cloud), 0)
    keep, refinements = config.keep, 0
    while holds(best):
        count = int(len(best.cloud) * keep)
        if count < _FEWEST or (config.ratio is not None and whole / len(best.data) >= config.ratio):
            break
        made = attempt(best.cloud, count, len(rounds))
        if holds(made):
            best = made
        elif refinements < _REFINEMENTS:
            keep, refinements = math.sqrt(keep), refinements + 1
        else:
            break
    return Compacted(
        data=best.data,
        gaussians_before=len(cloud),
        gaussians_after=len(best.cloud),
        bytes_before=whole,
        psnr_before_db=before,
        psnr_after_db=best.psnr_db,
        agreement_db=best.agreement_db,
        within=holds(best),
        rounds=rounds,
    )
