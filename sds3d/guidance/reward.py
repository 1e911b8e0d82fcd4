"""Reward-weighted score distillation around any rule."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import Chosen, kinds, option
from sds3d.guidance.trajectory import follow, guided_eps, stride_times
from sds3d.interfaces import Condition, Draw, Need, ParamGroup, Prior, Residual, Reward, Rule, RuleInfo
from sds3d.rewards import REWARDS
from sds3d.rng import Stream

Image = Float[Tensor, "b c h w"]
Mixing = Literal["minmax", "best", "top2", "softmax", "mean"]


def _inner_rules() -> Mapping[str, type]:
    """Every rule but this one; asked for late, because the table holds this class too."""
    from sds3d.guidance.table import RULES

    return {kind: rule for kind, rule in RULES.items() if kind != "reward"}


def reward_weights(rewards: Float[Tensor, "n b"], mixing: Mixing) -> Float[Tensor, "n b"]:
    """The weight of each of n noises, view by view.

    minmax: 0.9 on the mean of the best two, -0.1 on the mean of the worst two (one each where n < 4); best: the best
    one; top2: the mean of the best two; softmax: of the rewards; mean: 1/n, whatever the rewards.
    """
    count = rewards.shape[0]
    few = min(2, max(1, count // 2))
    if mixing == "mean":
        return torch.full_like(rewards, 1.0 / count)
    if mixing == "softmax":
        return rewards.softmax(dim=0)

    def share(kept: int, largest: bool) -> Float[Tensor, "n b"]:
        index = rewards.topk(kept, dim=0, largest=largest).indices
        return torch.zeros_like(rewards).scatter(0, index, 1.0 / kept)

    if mixing == "minmax":
        return 0.9 * share(few, True) - 0.1 * share(few, False)
    return share(1 if mixing == "best" else few, True)


class RewardWeighted(Rule):
    """Reward-weighted distillation: grad = sum_i w_i grad_inner(x, noise_i), w_i from the reward of noise i.

    Each of N noises is rolled out deterministically to a clean image, which a reward scores; the inner rule then acts
    on the noises with weights made of the scores, view by view. With sds inside it is RewardSDS, with vsd RewardVSD.
    After `until` of the run the inner rule acts alone.

    Source: Chachy et al. 2025 (RewardSDS, arXiv:2503.09601).
    """

    info = RuleInfo(
        title="reward-weighted score distillation",
        paper="Chachy et al. 2025, arXiv:2503.09601",
        passes="N (2 S + inner)",
        state="that of the inner rule",
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of reward weighting."""

        inner: Chosen = kinds(_inner_rules, "sds", help="the rule that is weighted")
        reward: Chosen = kinds(REWARDS, "judge", help="what scores the rolled-out images")
        noises: int = option(4, help="noises N tried per step", ge=1, le=64)
        rollout_steps: int = option(4, help="DDIM steps S from x_t to the scored image", ge=1, le=100)
        rollout_cfg: float = option(7.5, help="classifier-free guidance of the roll-out", ge=0.0)
        mixing: Mixing = option("minmax", help="how scores become weights")
        until: float = option(0.5, help="part of the run in which rewards are asked", ge=0.0, le=1.0)

    def __init__(self, config: Config, prior: Prior, stream: Stream | None = None) -> None:
        super().__init__(config, prior, stream)
        self.inner = _inner_rules()[config.inner.kind](config.inner.config, prior, stream)
        self.reward: Reward = REWARDS[config.reward.kind](config.reward.config, prior.device)

    @classmethod
    def needs(cls, config: Any) -> tuple[Need, ...]:
        """Those of the inner rule."""
        return _inner_rules()[config.inner.kind].needs(config.inner.config)  # type: ignore[attr-defined,no-any-return]

    def prompts(self) -> Mapping[str, str]:
        """Those of the inner rule."""
        return self.inner.prompts()

    def groups(self) -> Sequence[ParamGroup]:
        """Those of the inner rule."""
        return self.inner.groups()

    def residual(self, x: Image, draw: Draw, cond: Condition) -> Residual:
        """Grad = sum_i w_i grad_i; noises whose weight is zero in all views cost no inner pass."""
        if draw.now.progress >= self.config.until or self.config.noises == 1:
            return self.inner.residual(x, draw, cond)
        draws = [draw, *(draw.fork(index) for index in range(1, self.config.noises))]
        rewards = torch.stack([self._score(x, each, cond) for each in draws])
        weights = reward_weights(rewards, self.config.mixing)[:, :, None, None, None]
        used = [i for i in range(len(draws)) if bool((weights[i] != 0).any())]
        parts = [self.inner.residual(x, draws[i], cond) for i in used]
        losses = [part.aux_loss for part in parts if part.aux_loss is not None]
        return Residual(
            grad=torch.stack([weights[i] * part.grad for i, part in zip(used, parts, strict=True)]).sum(0),
            aux_loss=torch.stack(losses).mean() if losses else None,
            log={"reward": rewards.mean(), "reward_gain": (rewards.amax(0) - rewards.mean(0)).mean()},
        )

    def _score(self, x: Image, draw: Draw, cond: Condition) -> Float[Tensor, " b"]:
        """The reward of the clean image that the probability-flow ODE reaches from this noise."""
        steps = self.config.rollout_steps
        times = stride_times(draw.schedule, draw.t, torch.zeros_like(draw.t), float(draw.t.max()) / steps)
        guide = guided_eps(self.prior, cond, self.config.rollout_cfg)
        clean = follow(draw.diffuse(x), guide, draw.schedule, times).x
        return self.reward(self.prior.decode(clean).clamp(0.0, 1.0), cond.prompt).to(x)
