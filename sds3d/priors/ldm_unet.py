"""UNets stored under the names of the original latent-diffusion code (input_blocks.*), as `UNet2DConditionModel`."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import LDM_UNET_KEY, convert_ldm_unet_checkpoint
from torch import Tensor

from sds3d.errors import PriorError

Weights = dict[str, Tensor]


def is_ldm_config(config: Mapping[str, Any]) -> bool:
    """Whether a unet/config.json has the fields of the original code instead of diffusers'."""
    return {"model_channels", "channel_mult"} <= config.keys()


def ldm_unet(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype, where: str
) -> tuple[UNet2DConditionModel, Weights]:
    """The network, and the weights that a plain UNet has no place for, under diffusers' names where those exist.

    Raises:
        PriorError: fields or weights are missing or have other shapes.
    """
    try:
        settings = _settings(config, weights)
        prefixed = {LDM_UNET_KEY + name: value for name, value in weights.items()}
        converted = convert_ldm_unet_checkpoint(prefixed, settings)
        with torch.device("meta"):
            unet = UNet2DConditionModel(**settings)
        own = unet.state_dict().keys()
        unet.load_state_dict(
            {name: value.to(dtype) for name, value in converted.items() if name in own}, assign=True
        )
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise PriorError(
            f"{where}: config and weights do not make a UNet ({error}); download or copy it again"
        ) from error
    further = {name: value for name, value in converted.items() if name not in own}
    blocks = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "out.")
    further |= {name: value for name, value in weights.items() if not name.startswith(blocks)}
    return unet.eval().requires_grad_(False), further


def _settings(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Diffusers' config of the same architecture."""
    multiples = list(config["channel_mult"])
    channels = [int(config["model_channels"]) * multiple for multiple in multiples]
    has_attention = [2**level in config["attention_resolutions"] for level in range(len(multiples))]
    head = int(config.get("num_head_channels") or -1)
    # diffusers' "attention_head_dim" is the number of heads.
    heads = [width // head for width in channels] if head > 0 else int(config["num_heads"])
    return {
        "sample_size": int(config.get("image_size") or 32),
        "in_channels": int(config["in_channels"]),
        "out_channels": int(config["out_channels"]),
        "block_out_channels": channels,
        "layers_per_block": int(config["num_res_blocks"]),
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in has_attention],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(has_attention)],
        "cross_attention_dim": int(config["context_dim"]),
        "attention_head_dim": heads,
        "transformer_layers_per_block": int(config.get("transformer_depth") or 1),
        # The field is not always written; a linear layer has two axes, a convolution four.
        "use_linear_projection": weights["middle_block.1.proj_in.weight"].ndim == 2,
    }
