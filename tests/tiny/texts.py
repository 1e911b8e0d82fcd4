"""Tokenizers and text encoders with a few hundred words and random weights, in the classes of the real models."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

WORDS = ("red", "mug", "blue", "car", "front", "view", "side", "back")
CLIP_TOKENS = 16


def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """Byte-level BPE like CLIP's: every byte, every byte at a word's end, a few merges; nothing is unknown."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges(WORDS)
    pieces = ["!"] + [letter for letter in letters if letter != "!"]
    pieces += [f"{letter}</w>" for letter in letters]
    pieces += ["".join(pair) for pair in merges]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=CLIP_TOKENS)


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """The merges that make one token of each word, in an order that has no gaps."""
    found: list[tuple[str, str]] = []
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if pair not in found:
                found.append(pair)
            pieces[:2] = ["".join(pair)]
    return found


def clip_encoder(
    words: int, *, width: int = 16, projection: int | None = None, act: str = "quick_gelu"
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Two layers; with a projection of the pooled vector where its size is given."""
    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection or width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        hidden_act=act,
        # As the files of the real models say: 2 makes transformers pool at the highest id.
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


def t5_tokenizer() -> T5TokenizerFast:
    """Unigram like T5's: whole words, and letters for the others."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in WORDS] + [(letter, -6.0) for letter in letters]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def t5_encoder(words: int, *, width: int = 32) -> T5EncoderModel:
    """Two gated layers, as in T5 1.1."""
    return T5EncoderModel(
        T5Config(
            vocab_size=words,
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def as_old_clip_files(folder: Path) -> None:
    """Leave a CLIP tokenizer as vocab.json and merges.txt, as the older models on the hub have it."""
    whole = folder / "tokenizer.json"
    model = json.loads(whole.read_text(encoding="utf-8"))["model"]
    vocabulary = dict(model["vocab"])
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    whole.unlink()
