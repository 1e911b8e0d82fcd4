"""Text encoders as prompts -> packed embeddings."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sds3d.priors.folder import PipelineFolder
from sds3d.priors.packing import Packing
from sds3d.priors.vocabulary import spelled_out, unknown_word_warnings


class TextCoder(Protocol):
    """Prompts to one opaque tensor per prompt, laid out by `packing`."""

    packing: Packing

    def __call__(self, prompts: Sequence[str]) -> Float[Tensor, "p m d"]:
        """Packed embeddings in float32, on the device of the encoders."""
        ...

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """What the user should know about these prompts: unknown words, words beyond the length limit."""
        ...

    def modules(self) -> Sequence[nn.Module]:
        """The encoder networks, to be moved and released."""
        ...


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], length: int) -> Any:
    """Token ids and mask, padded and cut to `length`."""
    spelled = [spelled_out(tokenizer, prompt) for prompt in prompts]
    return tokenizer(spelled, padding="max_length", truncation=True, max_length=length, return_tensors="pt")


def cut_warnings(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], length: int) -> list[str]:
    """One message per prompt that is longer than the encoder reads, with the words that are lost."""
    messages = []
    for prompt in (spelled_out(tokenizer, prompt) for prompt in prompts):
        ids = tokenizer(prompt, add_special_tokens=True, truncation=False, verbose=False).input_ids
        if len(ids) <= length:
            continue
        kept = tokenizer(prompt, truncation=True, max_length=length).input_ids
        # The cut keeps the closing token: the words start to differ one before it.
        lost = tokenizer.decode(ids[len(kept) - 1 :], skip_special_tokens=True).strip()
        messages.append(
            f"the prompt has {len(ids)} tokens and the prior reads {length}; it ignores: {lost!r}"
        )
    return messages


class ClipText:
    """The last hidden states of one CLIP text encoder (Stable Diffusion 1.x, 2.x, toybox)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoder: Any) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder.eval().requires_grad_(False)
        config = encoder.config
        self.packing = Packing(tokens=config.max_position_embeddings, width=config.hidden_size)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Float[Tensor, "p n d"]:
        """Token embeddings, padded to the encoder's length."""
        ids = tokenize(self.tokenizer, prompts, self.packing.tokens).input_ids
        return self.packing.pack(self.encoder(ids.to(self.encoder.device))[0])

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """Unknown words of a closed vocabulary, each with the closest known ones; words beyond the limit."""
        unknown = unknown_word_warnings(self.tokenizer, prompts)
        return unknown + cut_warnings(self.tokenizer, prompts, self.packing.tokens)

    def modules(self) -> Sequence[nn.Module]:
        """The encoder."""
        return [self.encoder]


class ClipSaid(NamedTuple):
    """What one CLIP text encoder says about p prompts."""

    tokens: Float[Tensor, "p n d"]  # hidden states before the last layer, not normalised
    pooled: Float[Tensor, "p e"]  # of the closing token: projected where the encoder has a projection


class ClipReader:
    """One of several text encoders of a model (SDXL, SD3, FLUX); the family joins what they say."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoder: Any, *, projected: bool) -> None:
        """`projected`: the encoder projects its pooled vector, as CLIPTextModelWithProjection does."""
        self.tokenizer, self.encoder = tokenizer, encoder.eval().requires_grad_(False)
        config = encoder.config
        self.tokens, self.width = int(config.max_position_embeddings), int(config.hidden_size)
        self.projected = projected
        self.pooled = int(config.projection_dim) if projected else self.width

    @torch.no_grad()
    def read(self, prompts: Sequence[str]) -> ClipSaid:
        """Tokens and pooled vector, padded to the encoder's length."""
        ids = tokenize(self.tokenizer, prompts, self.tokens).input_ids
        said = self.encoder(ids.to(self.encoder.device), output_hidden_states=True)
        pooled = said.text_embeds if self.projected else said.pooler_output
        return ClipSaid(said.hidden_states[-2], pooled)

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """Words beyond the limit."""
        return cut_warnings(self.tokenizer, prompts, self.tokens)


def load_clip(folder: PipelineFolder, suffix: str = "", *, projected: bool) -> ClipReader:
    """`tokenizer` and `text_encoder` with this suffix, e.g. "_2"; PriorError where one is missing or damaged."""
    cls = CLIPTextModelWithProjection if projected else CLIPTextModel
    encoder = folder.load_text_encoder(f"text_encoder{suffix}", cls)
    tokenizer = folder.load_tokenizer(f"tokenizer{suffix}", CLIPTokenizer, words=encoder.config.vocab_size)
    return ClipReader(tokenizer, encoder, projected=projected)
