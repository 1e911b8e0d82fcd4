"""Prompts become embeddings once, and conditions per batch of cameras."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sds3d.config.option import option
from sds3d.interfaces import Cameras, Condition, Prior, Shading
from sds3d.priors.conditions import conditions_of
from sds3d.transfer import upload

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


def view_index(cameras: Cameras, config: PromptingConfig) -> Int[Tensor, " b"]:
    """Index into VIEW_WORDS per view: overhead above `overhead_deg`, else front, back or side by azimuth."""
    off_front = signed_azimuth(cameras.azimuth_deg).abs()
    index = torch.full_like(off_front, SIDE, dtype=torch.long)
    index = torch.where(off_front < config.front_deg, FRONT, index)
    index = torch.where(off_front > 180.0 - config.back_deg, BACK, index)
    return torch.where(cameras.elevation_deg > config.overhead_deg, OVERHEAD, index)


@dataclass(frozen=True, kw_only=True)
class PerpNegMix:
    """Which view words each view is shown, and which it is kept from; indices into VIEW_WORDS."""

    first: Int[Tensor, " b"]  # the positive prompt is share * first + (1 - share) * second
    second: Int[Tensor, " b"]
    share: Float[Tensor, " b"]
    negatives: Int[Tensor, "b 2"]
    weights: Float[Tensor, "b 2"]


def _decay(a: float, b: float, c: float, r: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """-(a exp(-b r) + c), the weight of a negative at interpolation ratio r."""
    return -(a * torch.exp(-b * r) + c)


def perp_neg_mix(azimuth_deg: Float[Tensor, " b"], overhead: Bool[Tensor, " b"]) -> PerpNegMix:
    """Perp-Neg per view.

    The positive prompt blends front and side (|azimuth| < 90) or side and back; weights are negative and vary
    smoothly, so no view word switches abruptly. Overhead views are shown their own word alone.
    Source: Armandpour et al. 2023 (arXiv:2304.04968), section 4.2, with the constants in common use.
    """
    phi = signed_azimuth(azimuth_deg).abs()
    ahead = phi < 90.0
    r = torch.where(ahead, 1.0, 2.0) - phi / 90.0
    side = torch.full_like(phi, SIDE, dtype=torch.long)
    front_or_side = torch.where(ahead, FRONT, side)
    side_or_front = torch.where(ahead, side, FRONT)
    first_weight = torch.where(ahead, _decay(4.0, 0.5, -2.426, r), _decay(1.0, 0.5, -0.606, r))
    second_weight = torch.where(ahead, _decay(4.0, 0.5, -2.426, 1.0 - r), _decay(1.0, 0.5, 0.967, r))
    weights = torch.stack([first_weight, second_weight], dim=1)
    return PerpNegMix(
        first=torch.where(overhead, OVERHEAD, front_or_side),
        second=torch.where(overhead, OVERHEAD, torch.where(ahead, side, BACK)),
        share=torch.where(overhead, 1.0, r),
        negatives=torch.stack([front_or_side, side_or_front], dim=1),
        weights=torch.where(overhead[:, None], 0.0, weights),
    )


@runtime_checkable
class ReleasesText(Protocol):
    """A prior whose text encoders can be let go once all prompts are embedded."""

    def release_text(self) -> None:
        """Free them."""
        ...


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
        self.device, self.prompt, self.conditions = prior.device, prompt, conditions_of(prior)
        templates = {"": "{prompt}", **(extra or {})}
        words = [f", {word}" for word in VIEW_WORDS] if config.view_dependent else [""]
        prompts = ["", negative, prompt]
        for template in templates.values():
            filled = template.replace("{prompt}", prompt).strip()
            # A prompt that is empty stays empty: it stands for "no text", whatever the view.
            prompts += [filled + word if filled else "" for word in words]
        embedded = prior.encode_text(prompts).to(prior.device)
        if isinstance(prior, ReleasesText):
            prior.release_text()
        self.null, self.plain = embedded[0], embedded[2]
        self.negative = embedded[1] if negative.strip() else None
        self.sets = dict(zip(templates, embedded[3:].split(len(words)), strict=True))
        self.views = self.sets[""]

    def for_views(
        self,
        cameras: Cameras,
        shading: Shading,
        source: Float[Tensor, "b c h w"] | None = None,
        control: Float[Tensor, "b q H W"] | None = None,
    ) -> Condition:
        """What the prior is told about these views.

        `source` is x of the asset that is edited, `control` the pictures for control networks.
        """
        count = len(cameras)
        which = torch.zeros(count, dtype=torch.long, device=self.device)
        if self.config.view_dependent:
            which = upload(view_index(cameras, self.config), self.device)
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
            control=control,
            camera_always=self.conditions.camera_always,
        )
        if self.conditions.image is not None:
            image, no_image = self.conditions.image.told(cameras)
            cond = replace(cond, image=image, no_image=no_image)
        if self.config.perp_neg and self.config.view_dependent:
            text, negatives, weights = self._perp_neg(cameras)
            cond = replace(cond, text=text, negatives=negatives, negative_weights=weights)
        return cond

    def _perp_neg(
        self, cameras: Cameras
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b 2 n d"], Float[Tensor, "b 2"]]:
        """Blended positives, negatives and weights, each indexed by view first: no interleaving to get wrong."""
        cameras = cameras.to(self.device)
        mix = perp_neg_mix(cameras.azimuth_deg, cameras.elevation_deg > self.config.overhead_deg)
        share = mix.share[:, None, None]
        text = share * self.views[mix.first] + (1.0 - share) * self.views[mix.second]
        return text, self.views[mix.negatives], mix.weights
