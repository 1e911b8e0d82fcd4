"""What surrounds a prior besides text: styles, an image prompt, control networks; and who takes which.

The networks themselves live in `adapters`, `image_prompt` and `control`; nothing here loads one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.errors import PriorError
from sds3d.interfaces import Cameras
from sds3d.priors.config import ControlKind, ImagePromptConfig, PriorConfig

Extra = Literal["loras", "textual_inversions", "image_prompt", "controls"]  # fields of PriorConfig
EXTRAS: frozenset[Extra] = frozenset(get_args(Extra))
WEIGHTS_SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class PromptImage:
    """A picture as an image encoder sees it, and how much it counts from each side.

    What a prior is told (`Told.image`) is the embedding with one more row, whose first entry is the scale: so all
    zeros, as where nothing is told, is the bare prior.
    """

    embedding: Float[Tensor, "m d"]
    nothing: Float[Tensor, "m d"]  # how the adapter was told "no picture" when it was trained
    scale: float
    back_scale: float
    azimuth_deg: float

    def scales(self, azimuth_deg: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """back_scale + (scale - back_scale) (1 + cos(azimuth - azimuth_deg)) / 2: smooth, half way at the sides."""
        facing = 0.5 + 0.5 * torch.cos(torch.deg2rad(azimuth_deg - self.azimuth_deg))
        return self.back_scale + (self.scale - self.back_scale) * facing

    def told(self, cameras: Cameras) -> tuple[Float[Tensor, "b k d"], Float[Tensor, "b k d"]]:
        """What to tell about these views: the picture, and "no picture" at the same scales."""
        scales = self.scales(cameras.azimuth_deg.to(self.embedding))
        row = torch.zeros(len(scales), 1, self.embedding.shape[1], device=scales.device)
        row[:, 0, 0] = scales
        count = len(scales)
        seen, nothing = (
            torch.cat([part.expand(count, -1, -1), row], 1) for part in (self.embedding, self.nothing)
        )
        return seen, nothing


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a loaded prior wants to be told besides text and camera."""

    image: PromptImage | None = None
    controls: tuple[ControlKind, ...] = ()  # the pictures of its control networks, in order
    camera_always: bool = False  # the camera goes with the empty prompt too


@runtime_checkable
class Conditioned(Protocol):
    """A prior that may want more than text."""

    conditions: Conditions


def conditions_of(prior: object) -> Conditions:
    """The conditions of a prior; none for those that know of none."""
    return prior.conditions if isinstance(prior, Conditioned) else Conditions()


def check_extras(
    config: PriorConfig, takes: frozenset[Extra], title: str, *, reads_pictures: bool = False
) -> None:
    """Before anything is loaded: can this family be given what the settings ask for, and do the files exist?

    A family that `reads_pictures` by itself needs no adapter for an image prompt, all others do.

    Raises:
        PriorError: naming the setting.
    """
    for name in get_args(Extra):
        if getattr(config, name) and name not in takes:
            can = "; it can be given " + ", ".join(sorted(takes)) if takes else ""
            raise PriorError(
                f"prior.{name}: a model of the family {title!r} cannot be given these{can}; "
                "remove the setting, or use a Stable Diffusion 1.x, 2.x or XL model"
            )
    if config.image_prompt is not None:
        _check_adapter(config.image_prompt, title, reads_pictures)
    _check_files(config)


def _check_adapter(prompt: ImagePromptConfig, title: str, reads_pictures: bool) -> None:
    for name in ("adapter", "image_encoder"):
        given = getattr(prompt, name) is not None
        if given == reads_pictures:
            how = "reads pictures by itself; remove it" if given else "sees pictures through it; give a path"
            raise PriorError(f"prior.image_prompt.{name}: a model of the family {title!r} {how}")


def _check_files(config: PriorConfig) -> None:
    for setting, path in _weights(config):
        if path.suffix != WEIGHTS_SUFFIX:
            raise PriorError(
                f"{setting}: got {str(path)!r}, expected a {WEIGHTS_SUFFIX} file (pickled weights can run "
                "code and are not read); convert it, or download its safetensors version"
            )
        if not path.is_file():
            raise PriorError(
                f"{setting}: no file {str(path)!r}; give the path of a local {WEIGHTS_SUFFIX} file"
            )
    for setting, path in _folders(config):
        if not (path / "config.json").is_file():
            raise PriorError(
                f"{setting}: no config.json in {str(path)!r}; expected the folder of one model "
                "as save_pretrained writes it"
            )
    if config.image_prompt is not None and not Path(config.image_prompt.image).is_file():
        raise PriorError(f"prior.image_prompt.image: no file {config.image_prompt.image!r}; give a picture")


def _weights(config: PriorConfig) -> Iterator[tuple[str, Path]]:
    for index, lora in enumerate(config.loras):
        yield f"prior.loras[{index}].path", Path(lora.path)
    for index, path in enumerate(config.textual_inversions):
        yield f"prior.textual_inversions[{index}]", Path(path)
    if config.image_prompt is not None and config.image_prompt.adapter is not None:
        yield "prior.image_prompt.adapter", Path(config.image_prompt.adapter)


def _folders(config: PriorConfig) -> Iterator[tuple[str, Path]]:
    for index, control in enumerate(config.controls):
        yield f"prior.controls[{index}].path", Path(control.path)
    if config.image_prompt is not None and config.image_prompt.image_encoder is not None:
        yield "prior.image_prompt.image_encoder", Path(config.image_prompt.image_encoder)
