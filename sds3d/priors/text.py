"""Prompts become embeddings once, and conditions per batch of cameras."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.interfaces import Cameras, Condition, Prior, Shading

VIEW_WORDS = ("front view", "side view", "back view", "overhead view")
FRONT, SIDE, BACK, OVERHEAD = range(4)


@dataclass(frozen=True, kw_only=True)
class PromptingConfig:
    """How the prompt depends on the view."""

    view_dependent: bool = option(True, help='append ", front view" and so on to the prompt')
    perp_neg: bool = option(False, help="Perp-Neg: steer away from the wrong view, needs view_dependent")
    camera_condition: bool = option(True, help="tell camera-conditioned priors where the camera is")
    front_deg: float = option(45.0, help="|azimuth| below this is the front", ge=0.0, le=90.0)
    back_deg: float = option(45.0, help="within this of 180 degrees is the back", ge=0.0, le=90.0)
    overhead_deg: float = option(50.0, help="elevation above this is overhead", ge=0.0, le=90.0)


def signed_azimuth(azimuth_deg: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Azimuth wrapped to [-180, 180)."""
    return (azimuth_deg + 180.0) % 360.0 - 180.0


def view_index(cameras: Cameras, config: PromptingConfig) -> Tensor:
    """Index into VIEW_WORDS per view: overhead above `overhead_deg`, else front, back or side by azimuth."""
    off_front = signed_azimuth(cameras.azimuth_deg).abs()
    index = torch.full_like(off_front, SIDE, dtype=torch.long)
    index[off_front < config.front_deg] = FRONT
    index[off_front > 180.0 - config.back_deg] = BACK
    index[cameras.elevation_deg > config.overhead_deg] = OVERHEAD
    return index


def _decay(a: float, b: float, c: float, r: float) -> float:
    """-(a exp(-b r) + c), the weight of a negative at interpolation ratio r."""
    return -(a * math.exp(-b * r) + c)


def perp_neg_mix(
    azimuth_deg: float,
) -> tuple[tuple[int, int, float], tuple[tuple[int, float], tuple[int, float]]]:
    """Perp-Neg at one azimuth: ((view_a, view_b, share of a), ((negative view, weight), (negative view, weight))).

    The positive prompt blends front and side (|azimuth| < 90) or side and back; weights are negative and vary
    smoothly, so no view word switches abruptly.
    Source: Armandpour et al. 2023 (arXiv:2304.04968), section 4.2, with the constants in common use.
    """
    phi = abs(float(signed_azimuth(torch.tensor([azimuth_deg]))))
    if phi < 90.0:
        r = 1.0 - phi / 90.0
        return (FRONT, SIDE, r), (
            (FRONT, _decay(4.0, 0.5, -2.426, r)),
            (SIDE, _decay(4.0, 0.5, -2.426, 1.0 - r)),
        )
    r = 2.0 - phi / 90.0
    return (SIDE, BACK, r), ((SIDE, _decay(1.0, 0.5, -0.606, r)), (FRONT, _decay(1.0, 0.5, 0.967, r)))


class TextBank:
    """The embeddings of one prompt for all views, made once; the text encoder is not needed afterwards."""

    def __init__(
        self,
        prior: Prior,
        prompt: str,
        negative: str,
        config: PromptingConfig,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        """`extra` are the prompts that a rule asks for, see `Rule.prompts`."""
        self.config = config
        self.device, self.prompt = prior.device, prompt
        templates = {"": "{prompt}", **(extra or {})}
        words = [f", {word}" for word in VIEW_WORDS] if config.view_dependent else [""]
        prompts = ["", negative, prompt]
        for template in templates.values():
            filled = template.replace("{prompt}", prompt).strip()
            # A prompt that is empty stays empty: it stands for "no text", whatever the view.
            prompts += [filled + word if filled else "" for word in words]
        embedded = prior.encode_text(prompts).to(prior.device)
        self.null, self.plain = embedded[0], embedded[2]
        self.negative = embedded[1] if negative.strip() else None
        self.sets = dict(zip(templates, embedded[3:].split(len(words)), strict=True))
        self.views = self.sets[""]

    def for_views(
        self, cameras: Cameras, shading: Shading, source: Float[Tensor, "b c h w"] | None = None
    ) -> Condition:
        """What the prior is told about these views; `source` is x of the asset that is edited."""
        count = len(cameras)
        which = torch.zeros(count, dtype=torch.long, device=self.device)
        if self.config.view_dependent:
            which = view_index(cameras, self.config).to(self.device)
        cond = Condition(
            text=self.views[which],
            null=self.null.expand(count, -1, -1),
            negative=None if self.negative is None else self.negative.expand(count, -1, -1),
            plain=self.plain.expand(count, -1, -1),
            prompt=self.prompt,
            extra={name: rows[which] for name, rows in self.sets.items() if name},
            cameras=cameras if self.config.camera_condition else None,
            background=shading.background,
            source=source,
        )
        if self.config.perp_neg and self.config.view_dependent:
            text, negatives, weights = self._perp_neg(cameras)
            cond = replace(cond, text=text, negatives=negatives, negative_weights=weights)
        return cond

    def _perp_neg(
        self, cameras: Cameras
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b 2 n d"], Float[Tensor, "b 2"]]:
        """Blended positives, negatives and weights, each indexed by view first: no interleaving to get wrong."""
        text, negatives, weights = [], [], []
        for azimuth, elevation in zip(
            cameras.azimuth_deg.tolist(), cameras.elevation_deg.tolist(), strict=True
        ):
            if elevation > self.config.overhead_deg:
                (a, b, share), pairs = (OVERHEAD, OVERHEAD, 1.0), ((FRONT, 0.0), (SIDE, 0.0))
            else:
                (a, b, share), pairs = perp_neg_mix(azimuth)
            text.append(share * self.views[a] + (1.0 - share) * self.views[b])
            negatives.append(torch.stack([self.views[view] for view, _ in pairs]))
            weights.append([w for _, w in pairs])
        return torch.stack(text), torch.stack(negatives), torch.tensor(weights, device=self.device)
