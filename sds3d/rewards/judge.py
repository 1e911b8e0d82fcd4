"""The toybox judge as a reward."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.errors import ConfigError
from sds3d.toybox.colors import COLOR_NAMES
from sds3d.toybox.judge import load_judge, parse_prompt
from sds3d.toybox.kinds import KIND_NAMES


class JudgeReward:
    """log p(kind asked for) + color_share log p(colour asked for), read by the shipped judge."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of the judge reward."""

        color_share: float = option(1.0, help="weight of the colour against the kind", ge=0.0)

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config = config
        self.judge = load_judge(device)

    def __call__(self, images: Float[Tensor, "b 3 H W"], prompt: str) -> Float[Tensor, " b"]:
        """One number per image, larger is better.

        Raises:
            ConfigError: the prompt names neither a kind nor a colour that the judge knows.
        """
        color, kind = parse_prompt(prompt)
        if color is None and kind is None:
            raise ConfigError(
                f"reward judge: the prompt {prompt!r} names no kind or colour of the toybox; use another reward"
            )
        verdicts = self.judge(images)
        score = images.new_zeros(len(images))
        if kind is not None:
            score = score + verdicts.kind_probs[:, KIND_NAMES.index(kind)].clamp(min=1e-6).log()
        if color is not None:
            share = verdicts.color_probs[:, COLOR_NAMES.index(color)].clamp(min=1e-6).log()
            score = score + self.config.color_share * share
        return score
