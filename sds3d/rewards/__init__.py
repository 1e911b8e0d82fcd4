"""Rewards: scorers of images against a prompt. One small class each, one line in this table."""

from typing import Any

from sds3d.rewards.clip import ClipReward
from sds3d.rewards.judge import JudgeReward

REWARDS: dict[str, Any] = {"clip": ClipReward, "judge": JudgeReward}

__all__ = ["REWARDS", "ClipReward", "JudgeReward"]
