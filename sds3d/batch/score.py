"""Which of several candidates is best: their views, scored by the judge of the toybox or by CLIP."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from sds3d.bench.score import views_of
from sds3d.errors import ConfigError
from sds3d.job import JobConfig
from sds3d.rewards import ClipReward, JudgeReward
from sds3d.toybox.judge import parse_prompt

JUDGE, CLIP = "judge", "clip:"
_TOYBOX = "toybox"
_CLIP_PX = 224


def scorer_of(asked: str, job: JobConfig) -> str:
    """The scorer of a job: "judge", "clip:FOLDER", or "" where none fits; `asked` may be "auto" or "none".

    Raises:
        ConfigError: `asked` is none of these.
    """
    if asked == "none":
        return ""
    if asked == JUDGE or (asked.startswith(CLIP) and len(asked) > len(CLIP)):
        return asked
    if asked != "auto":
        raise ConfigError(f"--score: got {asked!r}, expected auto, none, judge or clip:FOLDER")
    knows = job.prior.name == _TOYBOX and any(parse_prompt(job.text()))
    return JUDGE if knows and "glb" in job.export.formats else ""


def check_scorer(scorer: str, job: JobConfig) -> None:
    """Raises ConfigError where a job cannot be scored by what was chosen for it."""
    if not scorer:
        raise ConfigError(
            f"--best-of: nothing here can score {job.text()[:80]!r} with the prior {job.prior.name!r}: the judge knows "
            "the words of the toybox only; give a CLIP model with --score clip:FOLDER"
        )
    if scorer == JUDGE and not any(parse_prompt(job.text())):
        raise ConfigError(f"--score judge: {job.text()[:80]!r} names no kind or colour of the toybox")
    if "glb" not in job.export.formats:
        raise ConfigError("--best-of: scores are taken from the .glb; add glb to export.formats")


def score_of(scorer: str, folder: Path, prompt: str) -> float | None:
    """Mean reward of the exported file from eight sides; None without a scorer."""
    if not scorer:
        return None
    reward = reward_of(scorer)
    images = views_of(folder, _CLIP_PX if scorer.startswith(CLIP) else 64)
    return float(reward(images, prompt).mean())


@lru_cache(maxsize=2)
def reward_of(scorer: str) -> Any:
    """The reward behind a scorer, kept for the next asset.

    Raises:
        ConfigError: no usable model in the folder.
    """
    device = torch.device("cpu")
    if scorer == JUDGE:
        return JudgeReward(JudgeReward.Config(), device)
    return ClipReward(ClipReward.Config(folder=scorer.removeprefix(CLIP)), device)
