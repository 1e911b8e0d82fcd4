"""ControlNets beside a UNet: networks that see a picture of the layout and add to the UNet's features.

Source: Zhang et al. 2023 (arXiv:2302.05543).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel
from jaxtyping import Float
from torch import Tensor

from sds3d.errors import PriorError
from sds3d.priors.config import ControlConfig
from sds3d.priors.control_pictures import CHANNELS
from sds3d.priors.network import PriorParts, Rows
from sds3d.priors.packing import Packing
from sds3d.priors.unet import Clock, Further, UNetDenoiser

_SAME = ("in_channels", "cross_attention_dim", "block_out_channels", "layers_per_block")


@dataclass(frozen=True, kw_only=True)
class Control:
    """One control network at work."""

    network: ControlNetModel
    scale: float

    @property
    def channels(self) -> int:
        """Channels of its picture."""
        return int(self.network.config.conditioning_channels)

    def picture(self, picture: Float[Tensor, "r q H W"], side: int) -> Float[Tensor, "r q P P"]:
        """The picture at the size that the network shrinks to the side of x."""
        size = side * 2 ** (len(self.network.config.conditioning_embedding_out_channels) - 1)
        if picture.shape[-2:] == (size, size):
            return picture
        shrinks = picture.shape[-1] > size
        # Antialiased interpolation knows no half precision on the CPU.
        resized = F.interpolate(picture.float(), size=(size, size), mode="bilinear", antialias=shrinks)
        return resized.to(picture.dtype)


@dataclass(frozen=True, kw_only=True)
class ControlFeatures:
    """The sum of what all control networks add, as further arguments of a UNet; none where rows carry no pictures."""

    controls: Sequence[Control]
    packing: Packing
    clock: Clock
    before: Further

    def __call__(self, rows: Rows) -> Mapping[str, Any]:
        """The arguments of the UNet."""
        said = self.before(rows)
        if rows.control is None:
            return said
        return {**said, **self._features(rows.control, rows, said.get("added_cond_kwargs"))}

    @torch.no_grad()
    def _features(
        self, pictures: Float[Tensor, "r q H W"], rows: Rows, added: Mapping[str, Any] | None
    ) -> Mapping[str, Any]:
        channels = [control.channels for control in self.controls]
        if pictures.shape[1] != sum(channels):
            raise PriorError(
                f"prior.controls: got pictures of {pictures.shape[1]} channels in all, the control networks "
                f"expect {' + '.join(map(str, channels))}"
            )
        time, tokens = self.clock(rows.t), self.packing.tokens_of(rows.text)
        down: list[Tensor] = []
        middle: Tensor | None = None
        for control, picture in zip(self.controls, pictures.split(channels, dim=1), strict=True):
            features, last = control.network(
                rows.x,
                time,
                tokens,
                controlnet_cond=control.picture(picture, rows.x.shape[-1]),
                conditioning_scale=control.scale,
                added_cond_kwargs=added,
                return_dict=False,
            )
            down = [a + b for a, b in zip(down, features, strict=True)] if down else list(features)
            middle = last if middle is None else middle + last
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


def with_controls(
    parts: PriorParts, configs: Sequence[ControlConfig], device: torch.device, dtype: torch.dtype
) -> PriorParts:
    """The prior's parts with control networks; PriorError where one cannot be loaded or belongs to another UNet."""
    denoiser = parts.denoiser
    if not isinstance(denoiser, UNetDenoiser):
        raise PriorError("prior.controls: only UNet models can be given control networks")
    controls = []
    for index, config in enumerate(configs):
        network = _load(config, f"prior.controls[{index}].path", denoiser.module, dtype)
        controls.append(Control(network=network.to(device), scale=config.scale))
    features = ControlFeatures(
        controls=controls, packing=denoiser.packing, clock=denoiser.clock, before=denoiser.further
    )
    kinds = tuple(config.kind for config in configs)
    return replace(
        parts,
        denoiser=replace(denoiser, further=features),
        conditions=replace(parts.conditions, controls=kinds),
    )


def _load(config: ControlConfig, setting: str, unet: Any, dtype: torch.dtype) -> ControlNetModel:
    try:
        with torch.random.fork_rng(devices=[]):  # initial values that the file replaces
            network = ControlNetModel.from_pretrained(
                Path(config.path),
                local_files_only=True,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                torch_dtype=dtype,
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise PriorError(
            f"{setting}: {config.path} cannot be loaded as a ControlNetModel ({error}); download it again"
        ) from error
    for name in _SAME:
        ours, theirs = _plain(unet.config[name]), _plain(network.config[name])
        if ours != theirs:
            raise PriorError(
                f"{setting}: {config.path} was made for another UNet ({name}: got {theirs}, the prior has "
                f"{ours}); use one for this prior's family"
            )
    channels = int(network.config.conditioning_channels)
    if channels != CHANNELS[config.kind]:
        raise PriorError(
            f"{setting}: {config.path} reads pictures of {channels} channels, kind {config.kind} has "
            f"{CHANNELS[config.kind]}; check `kind`"
        )
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def _plain(value: Any) -> Any:
    """Lists and tuples alike."""
    return list(value) if isinstance(value, (list, tuple)) else value
