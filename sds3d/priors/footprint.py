"""How large a model is, from its settings and the headers of its files: nothing is loaded."""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sds3d.priors.config import PriorConfig
from sds3d.priors.weights import INDEX_FILE, is_network, parts_of, read_json, weight_files


@dataclass(frozen=True, kw_only=True)
class PriorSizes:
    """What the files of a pipeline say about its size."""

    network: int  # parameters; control networks among them
    codec: int  # parameters
    text: int  # bytes
    width: int  # channels of the first block, or width of the transformer
    patch: int | None  # of a transformer; None for a UNet
    side: int  # of x at the trained size
    factor: int  # side of the image / side of x
    encoder_width: int  # channels of the encoder's first block; 0 without one


def prior_sizes(folder: Path, config: PriorConfig) -> PriorSizes:
    """Sizes from settings and safetensors headers; KeyError, TypeError or ValueError where they are unusual."""
    parts = parts_of(read_json(folder / INDEX_FILE))
    half = config.dtype != "float32"
    counts = {
        name: parameter_count(folder / name, half=half)
        for name, kind in parts.items()
        if is_network(kind) and (folder / name).is_dir()
    }
    main = "transformer" if (folder / "transformer").is_dir() else "unet"
    settings = read_json(folder / main / "config.json")
    vae = read_json(folder / "vae" / "config.json") if (folder / "vae").is_dir() else {}
    blocks = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or ()
    extra = read_json(folder / "sds3d_prior.json") if (folder / "sds3d_prior.json").is_file() else {}
    controls = sum(parameter_count(Path(control.path), half=half) for control in config.controls)
    factor = 2 ** (len(blocks) - 1) if blocks else int(extra.get("pixel_unshuffle", 1))
    given = settings.get("sample_size") or settings.get("image_size")
    # Where the network does not say it, the folder's own note or the autoencoder does, as the side of the image.
    side = (
        int(extra["image_px"]) // factor
        if "image_px" in extra
        else int(given or vae["sample_size"] // factor)
    )
    return PriorSizes(
        network=counts.get(main, parameter_count(folder / main, half=half)) + controls,
        codec=counts.get("vae", 0),
        # CLIP is read in float32, the large encoders in the network's precision.
        text=sum(
            count * (4 if parts[name].startswith("CLIP") or not half else 2)
            for name, count in counts.items()
            if name.startswith("text_encoder")
        ),
        width=_width(settings),
        patch=_patch(settings, vae) if main == "transformer" else None,
        side=side,
        factor=factor,
        encoder_width=int(blocks[0]) if blocks else 0,
    )


def _width(settings: Mapping[str, Any]) -> int:
    """Channels of a UNet's first block, or width of a transformer."""
    channels = settings.get("block_out_channels") or [settings.get("model_channels")]
    heads = settings.get("num_attention_heads")
    if isinstance(heads, int) and isinstance(settings.get("attention_head_dim"), int) and not channels[0]:
        return heads * int(settings["attention_head_dim"])
    return int(channels[0])


def _patch(settings: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
    """Side of a transformer's token in x; FLUX-class models pack 2 x 2 latents into the channels of one token."""
    packed = int(settings["in_channels"]) // int(vae.get("latent_channels") or settings["in_channels"])
    return int(settings.get("patch_size") or 1) * max(math.isqrt(packed), 1)


def parameter_count(part: Path, *, half: bool) -> int:
    """Numbers in the safetensors files of a part, from their headers."""
    names = [path.name for path in part.glob("*.safetensors")]
    chosen = weight_files(names, half=half)
    total = 0
    for name in names if chosen is None else chosen[1]:
        with (part / name).open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: Mapping[str, Any] = json.loads(file.read(length))
        for key, entry in header.items():
            if key != "__metadata__":
                total += torch.Size(entry["shape"]).numel()
    return total
