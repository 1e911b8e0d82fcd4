"""SANA: a linear rectified-flow transformer on a deep-compression autoencoder, with a Gemma 2 text encoder.

Source: Xie et al. 2024 (arXiv:2410.10629).
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
from diffusers.schedulers import DPMSolverMultistepScheduler
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Gemma2Model, GemmaTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sds3d.errors import PriorError
from sds3d.mathx.schedule import FlowSchedule
from sds3d.priors.codec import DcCodec
from sds3d.priors.families import LoadOptions
from sds3d.priors.folder import PipelineFolder
from sds3d.priors.network import PriorParts, Rows
from sds3d.priors.packing import Packing
from sds3d.priors.sizes import side_of
from sds3d.priors.text_coders import tokenize

TEXT_TOKENS = 300
NATIVE_STEPS = 1000.0  # the sampler's clock runs from 0 to 1000


def build(folder: PipelineFolder, options: LoadOptions) -> PriorParts:
    """The parts of a SANA folder; PriorError where a part is missing, damaged, or the model is no flow."""
    folder.require("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    _require_flow(folder)
    network = folder.load_network("transformer", SanaTransformer2DModel, options.dtype)
    encoder = folder.load_text_encoder("text_encoder", Gemma2Model, options.dtype)
    tokenizer = folder.load_tokenizer("tokenizer", GemmaTokenizerFast, words=encoder.config.vocab_size)
    text = SanaText(tokenizer, encoder)
    codec = DcCodec(folder.load_network("vae", AutoencoderDC, torch.float32).to(options.device))
    patch = int(network.config.patch_size)
    return PriorParts(
        denoiser=SanaDenoiser(
            module=network,
            packing=text.packing,
            time_scale=NATIVE_STEPS * float(network.config.timestep_scale),
        ),
        text=text,
        codec=codec,
        schedule=FlowSchedule(trained=True),
        prediction="flow",
        side=side_of(int(network.config.sample_size), codec, options.config.image_px, patch),
    )


def _require_flow(folder: PipelineFolder) -> None:
    """The published folders name a flow sampler, or a DPM-Solver with flow_prediction."""
    name = str((folder.index.get("scheduler") or [None, ""])[1])
    if "FlowMatch" in name:
        return
    said = folder.load("scheduler", DPMSolverMultistepScheduler).config.get("prediction_type")
    if said != "flow_prediction":
        raise PriorError(
            f"{folder.path / 'scheduler'}: {name} with prediction_type {said!r} contradicts {folder.pipeline}, "
            "whose networks are rectified flows; expected flow_prediction"
        )


def instruction() -> str:
    """What SANA's text encoder is told before every prompt, as in its pipeline."""
    parameter = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"]
    return "\n".join(parameter.default)


class SanaText:
    """The last hidden states of a Gemma 2 decoder, read with an instruction before the prompt.

    Of instruction and prompt together the first and the last 299 tokens are kept. The empty prompt is read without
    the instruction, as the pipeline reads negative prompts; which other prompts are negative cannot be seen here, so
    they carry it too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoder: Any) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder.eval().requires_grad_(False)
        self.tokenizer.padding_side = "right"
        self.packing = Packing(tokens=TEXT_TOKENS, width=int(encoder.config.hidden_size), masked=True)
        self.instruction = instruction()
        # The instruction and the prompt share the first token, and a closing one is not counted.
        self.length = len(tokenizer.encode(self.instruction)) + TEXT_TOKENS - 2

    def __call__(self, prompts: Sequence[str]) -> Float[Tensor, "p m d"]:
        """Packed embeddings with mask."""
        return torch.cat([self._pack(_as_trained(prompt)) for prompt in prompts])

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """Words beyond the limit."""
        messages = []
        for prompt in prompts:
            ids = self.tokenizer(self.instruction + _as_trained(prompt)).input_ids
            if len(ids) > self.length:  # Gemma has no closing token, so the cut is a plain one
                lost = self.tokenizer.decode(ids[self.length :]).strip()
                room = TEXT_TOKENS - 2
                messages.append(
                    f"the prompt has {len(ids) - self.length + room} tokens and the prior reads {room}; "
                    f"it ignores: {lost!r}"
                )
        return messages

    def modules(self) -> Sequence[nn.Module]:
        """The encoder."""
        return [self.encoder]

    @torch.no_grad()
    def _pack(self, prompt: str) -> Float[Tensor, "1 m d"]:
        text, length = (self.instruction + prompt, self.length) if prompt else ("", TEXT_TOKENS)
        said = tokenize(self.tokenizer, [text], length).to(self.encoder.device)
        tokens = self.encoder(said.input_ids, attention_mask=said.attention_mask)[0]
        kept = [0, *range(length - TEXT_TOKENS + 1, length)]
        return self.packing.pack(tokens[:, kept], mask=said.attention_mask[:, kept].bool())


def _as_trained(prompt: str) -> str:
    return prompt.lower().strip()


@dataclass(frozen=True, kw_only=True)
class SanaDenoiser:
    """`SanaTransformer2DModel`; it predicts the velocity noise - x."""

    module: nn.Module
    packing: Packing
    time_scale: float

    def __call__(self, rows: Rows) -> Float[Tensor, "r k h w"]:
        """The velocity."""
        return self.module(
            rows.x,
            encoder_hidden_states=self.packing.tokens_of(rows.text),
            encoder_attention_mask=self.packing.mask_of(rows.text),
            timestep=(rows.t * self.time_scale).float(),
            return_dict=False,
        )[0]
