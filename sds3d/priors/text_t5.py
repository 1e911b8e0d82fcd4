"""T5 encoders as prompts -> packed embeddings (DeepFloyd IF, PixArt, Stable Diffusion 3, FLUX)."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import nn
from transformers import T5EncoderModel, T5TokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sds3d.priors.folder import PipelineFolder
from sds3d.priors.packing import Packing
from sds3d.priors.text_coders import cut_warnings, tokenize


class T5Text:
    """The last hidden states of one T5 encoder, padded to `length` tokens.

    Two masks are independent of each other: `encoder_masked` keeps the encoder's own attention off the padding (IF and
    PixArt do, SD3 and FLUX do not), `masked` hands the mask on to the denoiser (PixArt).
    Source of the encoder: Raffel et al. 2019 (arXiv:1910.10683).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        encoder: Any,
        *,
        length: int,
        encoder_masked: bool = False,
        masked: bool = False,
        lower: bool = False,
    ) -> None:
        """`lower` reads prompts in lower case and without outer blanks, as IF and PixArt were trained."""
        self.tokenizer, self.encoder = tokenizer, encoder.eval().requires_grad_(False)
        self.encoder_masked, self.lower = encoder_masked, lower
        self.packing = Packing(tokens=length, width=int(encoder.config.d_model), masked=masked)

    @torch.no_grad()
    def read(self, prompts: Sequence[str]) -> tuple[Float[torch.Tensor, "p n d"], Bool[torch.Tensor, "p n"]]:
        """Token embeddings and the mask of real tokens, not packed: for families that add other encoders."""
        said = tokenize(self.tokenizer, self._as_trained(prompts), self.packing.tokens).to(
            self.encoder.device
        )
        mask = said.attention_mask if self.encoder_masked else None
        return self.encoder(said.input_ids, attention_mask=mask)[0], said.attention_mask.bool()

    def __call__(self, prompts: Sequence[str]) -> Float[torch.Tensor, "p m d"]:
        """Packed embeddings in float32, with the mask where the packing has one."""
        tokens, mask = self.read(prompts)
        return self.packing.pack(tokens, mask=mask if self.packing.masked else None)

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """Words beyond the limit."""
        return cut_warnings(self.tokenizer, self._as_trained(prompts), self.packing.tokens)

    def modules(self) -> Sequence[nn.Module]:
        """The encoder."""
        return [self.encoder]

    def _as_trained(self, prompts: Sequence[str]) -> list[str]:
        return [prompt.lower().strip() if self.lower else prompt for prompt in prompts]


def load_t5(
    folder: PipelineFolder,
    *,
    tokenizer: str = "tokenizer",
    encoder: str = "text_encoder",
    dtype: torch.dtype,
    length: int,
    **options: bool,
) -> T5Text:
    """The T5 of a pipeline folder; `options` go to `T5Text`. PriorError where a part is missing or damaged."""
    network = folder.load_text_encoder(encoder, T5EncoderModel, dtype)
    words = folder.load_tokenizer(tokenizer, T5TokenizerFast, words=network.config.vocab_size)
    return T5Text(words, network, length=length, **options)
