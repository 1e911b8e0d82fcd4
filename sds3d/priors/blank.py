"""Architectures of full-size models with random weights: what a step costs, without a download.

Sizes are those of the published configurations; the tests compare their parameter counts with the published ones.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.schedulers import DDPMScheduler
from jaxtyping import Float
from torch import Tensor, nn

from sds3d.errors import PriorError
from sds3d.mathx.schedule import TableSchedule
from sds3d.priors.codec import Codec, PixelCodec, VaeCodec
from sds3d.priors.config import PriorConfig
from sds3d.priors.folder import alphas_cumprod_of
from sds3d.priors.network import NetworkPrior, Prediction, PriorParts
from sds3d.priors.packing import Packing
from sds3d.priors.sizes import side_of
from sds3d.priors.speed import pick_dtype, tuned
from sds3d.priors.unet import UNetDenoiser
from sds3d.rng import Stream, derive_seed

Sizes = Mapping[str, Any]

KL: Sizes = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
CROSS: Sizes = {
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes of one model: constructor arguments of diffusers' classes."""

    title: str
    unet: Sizes
    vae: Sizes | None = field(default_factory=lambda: KL)  # None: the model sees pixels
    tokens: int = 77
    pooled: int = 0
    prediction: Prediction = "epsilon"


ARCHITECTURES: dict[str, Architecture] = {
    "sd15": Architecture(
        title="Stable Diffusion 1.5",
        unet={**CROSS, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    ),
    "sd21": Architecture(
        title="Stable Diffusion 2.1",
        unet={
            **CROSS,
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        prediction="v_prediction",
    ),
    "sdxl": Architecture(
        title="Stable Diffusion XL",
        unet={
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "layers_per_block": 2,
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        vae={**KL, "scaling_factor": 0.13025},
        pooled=1280,
    ),
    "pixel": Architecture(
        title="a 64 px pixel model with the UNet of Stable Diffusion 1.5",
        unet={
            **CROSS,
            "in_channels": 3,
            "out_channels": 3,
            "sample_size": 64,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        vae=None,
    ),
}
# The same classes, shrunk until a step takes a fraction of a second on one CPU core.
TOY_WIDTH = 32
TOY_SIDE = 8
TOY_VAE: Sizes = {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 8}
TOY_TOKENS = 8
TOY_HEADS = 4


class BlankText:
    """Random embeddings, fixed by the prompt."""

    def __init__(self, packing: Packing) -> None:
        self.packing = packing

    def __call__(self, prompts: Sequence[str]) -> Float[Tensor, "p m d"]:
        """Standard normal numbers."""
        rows = [Stream(derive_seed(p), "text").normal(self.packing.rows, self.packing.width) for p in prompts]
        return torch.stack(rows)

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """None."""
        return []

    def modules(self) -> Sequence[nn.Module]:
        """None."""
        return []


def blank_prior(name: str, config: PriorConfig, device: torch.device, *, toy: bool = False) -> NetworkPrior:
    """A model of this architecture with random weights; `toy`: the same classes with few channels.

    `config.vae = "tiny"` makes the tiny autoencoder of that model's kind, also with random weights.

    Raises:
        PriorError: no such architecture here.
    """
    if name not in ARCHITECTURES:
        raise PriorError(f"random weights: got {name!r}, expected one of {', '.join(ARCHITECTURES)}")
    sizes = shrunk(ARCHITECTURES[name]) if toy else ARCHITECTURES[name]
    dtype, told = pick_dtype(config.dtype, device)
    unet = _made(UNet2DConditionModel, sizes.unet, device, dtype)
    codec: Codec = PixelCodec()
    if sizes.vae is not None:
        codec = VaeCodec(_made(AutoencoderKL, sizes.vae, device, torch.float32))
    packing = Packing(tokens=sizes.tokens, width=unet.config.cross_attention_dim, pooled=sizes.pooled)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedule = TableSchedule(alphas_cumprod_of(DDPMScheduler(**betas)).to(device))
    parts = PriorParts(
        denoiser=UNetDenoiser(
            module=unet, packing=packing, clock=schedule.index, further=_further(packing, codec.factor)
        ),
        text=BlankText(packing),
        codec=codec,
        schedule=schedule,
        prediction=sizes.prediction,
        side=side_of(unet.config.sample_size, codec, config.image_px),
    )
    prior = NetworkPrior(parts, device, dtype)
    prior.notes += told
    tiny = None
    if config.vae == "tiny":
        few: Sizes = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
        tiny = _made(AutoencoderTiny, few if toy else {}, device, torch.float32)
    return tuned(prior, config, tiny=tiny)


def shrunk(whole: Architecture) -> Architecture:
    """The same classes with a tenth of the channels, for tests and dry runs."""
    unet: dict[str, Any] = {
        **whole.unet,
        "block_out_channels": tuple(
            max(TOY_WIDTH, c // 320 * TOY_WIDTH) for c in whole.unet["block_out_channels"]
        ),
        "sample_size": TOY_SIDE,
        "cross_attention_dim": TOY_WIDTH,
        "attention_head_dim": TOY_HEADS,
        "layers_per_block": 1,
    }
    if whole.pooled:
        unet["transformer_layers_per_block"] = (1, 1, 2)
        unet |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + TOY_WIDTH}
    vae = None if whole.vae is None else {**whole.vae, **TOY_VAE}
    pooled = TOY_WIDTH if whole.pooled else 0
    return replace(whole, unet=unet, vae=vae, tokens=TOY_TOKENS, pooled=pooled)


def _further(packing: Packing, factor: int) -> Callable[..., Mapping[str, Any]]:
    from sds3d.priors.families.sdxl import SizeConditions
    from sds3d.priors.unet import nothing

    return SizeConditions(packing=packing, factor=factor) if packing.pooled else nothing


def _made(cls: Any, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Any:
    """A network with diffusers' initial values, made where it is used and in its precision."""
    before = torch.get_default_dtype()
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        try:
            torch.set_default_dtype(dtype)
            with device:
                made = cls(**sizes)
        finally:
            torch.set_default_dtype(before)
    return made.eval().requires_grad_(False)
