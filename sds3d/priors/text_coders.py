"""Text encoders as prompts -> packed embeddings."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sds3d.priors.packing import Packing
from sds3d.priors.vocabulary import unknown_word_warnings


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
    return tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )


def cut_warnings(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], length: int) -> list[str]:
    """One message per prompt that is longer than the encoder reads, with the words that are lost."""
    messages = []
    for prompt in prompts:
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
