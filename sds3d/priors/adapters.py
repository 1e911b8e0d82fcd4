"""Styles: LoRAs fused into the weights of a model, and words learned by textual inversion, before it becomes a prior.

Sources: Hu et al. 2021 (LoRA, arXiv:2106.09685); Gal et al. 2022 (textual inversion, arXiv:2208.01618).
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sds3d.errors import PriorError
from sds3d.priors.config import LoraConfig, PriorConfig
from sds3d.priors.lazy import LazyEncoder
from sds3d.priors.quiet import quiet

NETWORK, ENCODER = "unet", "text_encoder"  # what diffusers calls them; further encoders are numbered from 2
# Textual inversions for models with several text encoders say which vectors are whose; both are CLIP's.
ENCODERS = {"clip_l": 0, "clip_g": 1}
NAMELESS = "emb_params"  # the key of files that carry no word: their name is the word

_DAMAGED = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)


def apply_styles(
    config: PriorConfig,
    pipeline: str,
    *,
    network: nn.Module,
    tokenizers: Sequence[PreTrainedTokenizerBase],
    encoders: Sequence[nn.Module],
) -> None:
    """Put a run's LoRAs and textual inversions into loaded modules, in place; before any student copies them.

    `pipeline` names the diffusers pipeline class of these modules, whose loaders know their names. Encoders that
    are not read yet are changed when they are.

    Raises:
        PriorError: a file that cannot be read, or that fits nothing of this model.
    """
    for index, path in enumerate(config.textual_inversions):
        setting = f"prior.textual_inversions[{index}]"
        for word in _words(Path(path), setting, len(encoders)):
            _learn(word, tokenizers[word.encoder], encoders[word.encoder], f"{setting}: {path}")
    for index, lora in enumerate(config.loras):
        with quiet():  # about packages that the class could use
            kind = getattr(diffusers, pipeline)
        style = _read_lora(lora, kind, f"prior.loras[{index}].path", network)
        parts = [ENCODER, *(f"{ENCODER}_{number}" for number in range(2, len(encoders) + 1))]
        touched = style.touches([NETWORK, *parts])
        if NETWORK in touched:
            style.fuse(NETWORK, network)
        for part, encoder in zip(parts, encoders, strict=True):
            if part in touched:
                _when_loaded(encoder, partial(style.fuse, part))


def _when_loaded(encoder: nn.Module, change: Any) -> None:
    if isinstance(encoder, LazyEncoder):
        encoder.after_loading(change)
    else:
        change(encoder)


@dataclass(frozen=True, kw_only=True)
class _Lora:
    """One file, as diffusers reads it."""

    pipeline: Any
    config: LoraConfig
    setting: str
    tensors: Mapping[str, Tensor]
    alphas: Any
    metadata: Any

    def touches(self, parts: Sequence[str]) -> list[str]:
        """The parts of the model that the file has weights for; PriorError where there are none."""
        found = [part for part in parts if any(key.startswith(f"{part}.") for key in self.tensors)]
        if not found:
            raise PriorError(
                f"{self.setting}: {self.config.path} holds no weight of this model ({', '.join(parts)}), so it "
                "would change nothing; use a LoRA that was made for this prior's family"
            )
        return found

    def fuse(self, part: str, module: nn.Module) -> None:
        """W + scale B A for every weight of one part that the file names."""
        host = _assemble(self.pipeline, {part: module})
        given = {"network_alphas": self.alphas, "adapter_name": "style", "metadata": self.metadata}
        try:
            # peft draws initial values that the file replaces.
            with torch.random.fork_rng(devices=[]), quiet():
                if part == NETWORK:
                    host.load_lora_into_unet(dict(self.tensors), unet=module, **given)
                else:
                    host.load_lora_into_text_encoder(
                        dict(self.tensors), text_encoder=module, prefix=part, **given
                    )
                host.fuse_lora(components=[part], lora_scale=self.config.scale)
                host.unload_lora_weights()
        except _DAMAGED as error:
            first = str(error).strip().partition("\n")[0][:200]
            raise PriorError(
                f"{self.setting}: {self.config.path} does not fit the {part} of this model ({first}); "
                "use a LoRA that was made for this prior's family"
            ) from error
        module.eval().requires_grad_(False)


def _read_lora(lora: LoraConfig, pipeline: Any, setting: str, network: nn.Module) -> _Lora:
    path = Path(lora.path)
    # Files in the layout of other trainers number the blocks of two-encoder models in their own way.
    blocks = {"unet_config": network.config} if len(pipeline._lora_loadable_modules) > 2 else {}
    try:
        with quiet():
            tensors, alphas, metadata = pipeline.lora_state_dict(
                str(path.parent),
                weight_name=path.name,
                local_files_only=True,
                use_safetensors=True,
                return_lora_metadata=True,
                **blocks,
            )
    except _DAMAGED as error:
        raise PriorError(
            f"{setting}: {path} cannot be read as a LoRA ({error}); download it again"
        ) from error
    return _Lora(
        pipeline=pipeline, config=lora, setting=setting, tensors=tensors, alphas=alphas, metadata=metadata
    )


def _assemble(pipeline: Any, modules: Mapping[str, Any]) -> Any:
    """A pipeline object around some modules; what it lacks is None."""
    asked = inspect.signature(pipeline.__init__).parameters.values()
    given: dict[str, Any] = {
        spec.name: None for spec in asked if spec.default is spec.empty and spec.name != "self"
    }
    if any(spec.name == "requires_safety_checker" for spec in asked):
        given["requires_safety_checker"] = False
    return pipeline(**given | dict(modules))


@dataclass(frozen=True, kw_only=True)
class _Word:
    """A learned word; it stands for one or more vectors."""

    text: str
    vectors: Tensor  # (n, d)
    encoder: int

    def tokens(self) -> list[str]:
        """One token for each vector, named as diffusers names them."""
        return [self.text, *(f"{self.text}_{index}" for index in range(1, len(self.vectors)))]


def _words(path: Path, setting: str, encoders: int) -> Iterator[_Word]:
    """The words of a file, in the layouts in public use."""
    try:
        tensors = load_file(path)
    except _DAMAGED as error:
        raise PriorError(f"{setting}: {path} cannot be read ({error}); download it again") from error
    if tensors and set(tensors) <= set(ENCODERS):
        found = [(path.stem, vectors, ENCODERS[key]) for key, vectors in tensors.items()]
    elif NAMELESS in tensors:
        found = [(path.stem, tensors[NAMELESS], 0)]
    elif len(tensors) == 1:
        found = [(text, vectors, 0) for text, vectors in tensors.items()]
    else:
        raise PriorError(
            f"{setting}: {path} is no textual inversion: got the entries {', '.join(sorted(tensors)[:3])}, "
            f"expected one word, {NAMELESS}, or {' and '.join(ENCODERS)}"
        )
    for text, vectors, encoder in found:
        if encoder >= encoders:
            raise PriorError(f"{setting}: {path} is for a text encoder that this model does not have")
        yield _Word(text=text, vectors=vectors.reshape(-1, vectors.shape[-1]), encoder=encoder)


def _learn(word: _Word, tokenizer: PreTrainedTokenizerBase, encoder: Any, where: str) -> None:
    """Teach the tokenizer a word now, and the encoder its vectors whenever it is read."""
    width = int(encoder.config.hidden_size)
    if word.vectors.shape[1] != width:
        raise PriorError(
            f"{where}: its vectors have {word.vectors.shape[1]} numbers, this prior's text encoder reads "
            f"{width}; use one that was made for this prior's family"
        )
    known = set(tokenizer.get_vocab()) & set(word.tokens())
    if known:
        raise PriorError(f"{where}: the word {word.text!r} is known already; rename the file's word")
    tokenizer.add_tokens(word.tokens())
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(word.tokens()))
    _when_loaded(encoder, partial(_write_vectors, ids, word.vectors))


@torch.no_grad()
def _write_vectors(ids: Tensor, vectors: Tensor, encoder: Any) -> None:
    """Put vectors into an embedding table, made longer where needed."""
    embedding = encoder.get_input_embeddings()
    old = embedding.weight
    table = old.new_zeros(max(len(old), int(ids.max()) + 1), old.shape[1])
    table[: len(old)] = old
    table[ids.to(old.device)] = vectors.to(old)
    embedding.weight = nn.Parameter(table, requires_grad=False)
    embedding.num_embeddings = len(table)
