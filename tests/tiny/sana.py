"""A tiny SANA: Gemma 2, a linear flow transformer, a deep-compression autoencoder of factor 4."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from tests.tiny.texts import WORDS

WIDTH = 16


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words and bytes; an opening token and no closing one, padded on the left as Gemma's is."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<pad>", "<eos>", "<bos>", *letters, *(f"Ġ{word}" for word in WORDS)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        grown = "Ġ"
        for letter in word:
            if (grown, letter) not in merges:
                merges.append((grown, letter))
            grown += letter
            if grown not in pieces:
                pieces.append(grown)
    core = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", padding_side="left"
    )


def make_sana(folder: Path, *, published: bool = False) -> Path:
    """Save the pipeline with random weights; `folder`. `published`: with the sampler of the published folders."""
    torch.manual_seed(0)
    tokenizer = gemma_tokenizer()
    blocks: dict[str, Any] = {
        "encoder_block_types": "ResBlock",
        "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "encoder_block_out_channels": (8, 8, 16),
        "decoder_block_out_channels": (8, 8, 16),
        "encoder_layers_per_block": (1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1),
        "encoder_qkv_multiscales": ((), (), (5,)),
        "decoder_qkv_multiscales": ((), (), (5,)),
    }
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    solver = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(
            Gemma2Config(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                query_pre_attn_scalar=8,
                pad_token_id=0,
                eos_token_id=1,
                bos_token_id=2,
            )
        ),
        vae=AutoencoderDC(latent_channels=4, attention_head_dim=8, scaling_factor=0.41407, **blocks),
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=WIDTH,
            sample_size=8,
            patch_size=1,
        ),
        scheduler=solver if published else flow,
    ).save_pretrained(folder)
    return folder
