"""FLUX.1: a rectified-flow transformer on 2x2 patches of a 16-channel latent, with CLIP (pooled) and T5 text.

The "dev" kind is told a guidance value and answers as if guided (Meng et al. 2022, arXiv:2210.03142); the "schnell"
kind has no such input.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxTransformer2DModel
from jaxtyping import Float
from torch import Tensor, nn

from sds3d.priors.codec import VaeCodec
from sds3d.priors.families import LoadOptions
from sds3d.priors.families.sd3 import flow_schedule
from sds3d.priors.folder import PipelineFolder
from sds3d.priors.network import PriorParts, Rows
from sds3d.priors.packing import Packing
from sds3d.priors.sizes import side_of
from sds3d.priors.text_coders import ClipReader, load_clip
from sds3d.priors.text_t5 import T5Text, load_t5

PARTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "transformer", "vae", "scheduler")
PATCH = 2  # latent pixels along a side of one token
TRAINED_SIDE = 128  # of the latent; no file of the folder says it
DEV_TOKENS, SCHNELL_TOKENS = 512, 256


def build(folder: PipelineFolder, options: LoadOptions) -> PriorParts:
    """The parts of a FLUX.1 folder; PriorError where a part is missing or damaged."""
    folder.require(*PARTS)
    schedule = flow_schedule(folder)
    network = folder.load_network("transformer", FluxTransformer2DModel, options.dtype)
    guided = bool(network.config.guidance_embeds)
    text = FluxText(
        load_clip(folder, projected=False),
        load_t5(
            folder,
            tokenizer="tokenizer_2",
            encoder="text_encoder_2",
            dtype=options.dtype,
            length=DEV_TOKENS if guided else SCHNELL_TOKENS,
        ),
    )
    codec = VaeCodec(folder.load_network("vae", AutoencoderKL, torch.float32).to(options.device))
    trained = int(folder.extra.get("image_px", TRAINED_SIDE * codec.factor)) // codec.factor
    return PriorParts(
        denoiser=FluxDenoiser(
            module=network,
            packing=text.packing,
            guidance=options.config.flux_guidance if guided else None,
        ),
        text=text,
        codec=codec,
        schedule=schedule,
        prediction="flow",
        side=side_of(trained, codec, options.config.image_px, PATCH),
    )


class FluxText:
    """The tokens of T5 and the pooled vector of CLIP."""

    def __init__(self, clip: ClipReader, t5: T5Text) -> None:
        self.clip, self.t5 = clip, t5
        self.packing = Packing(tokens=t5.packing.tokens, width=t5.packing.width, pooled=clip.pooled)

    def __call__(self, prompts: Sequence[str]) -> Float[Tensor, "p m d"]:
        """Packed embeddings."""
        return self.packing.pack(self.t5.read(prompts)[0], self.clip.read(prompts).pooled)

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """Words that no encoder reads: T5 reads the most."""
        return self.t5.warnings(prompts)

    def modules(self) -> Sequence[nn.Module]:
        """Both encoders."""
        return [self.clip.encoder, self.t5.encoder]


@dataclass(frozen=True, kw_only=True)
class FluxDenoiser:
    """`FluxTransformer2DModel` on patches; it predicts the velocity noise - x."""

    module: nn.Module
    packing: Packing
    guidance: float | None  # None = the network has no such input

    def __call__(self, rows: Rows) -> Float[Tensor, "r c h w"]:
        """The velocity."""
        patches = F.pixel_unshuffle(rows.x, PATCH)
        height, width = patches.shape[-2:]
        tokens = self.packing.tokens_of(rows.text)
        velocity = self.module(
            hidden_states=patches.flatten(2).transpose(1, 2),
            encoder_hidden_states=tokens,
            pooled_projections=self.packing.pooled_of(rows.text),
            timestep=rows.t,
            img_ids=positions(height, width, rows.x.device),
            txt_ids=torch.zeros(tokens.shape[1], 3, device=rows.x.device),
            guidance=None if self.guidance is None else torch.full_like(rows.t, self.guidance),
            return_dict=False,
        )[0]
        return F.pixel_shuffle(velocity.transpose(1, 2).unflatten(2, (height, width)), PATCH)


def positions(height: int, width: int, device: torch.device) -> Float[Tensor, "n 3"]:
    """(0, row, column) of every patch, row by row: what the rotary embedding of an image token is made from."""
    row, column = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1).float()
