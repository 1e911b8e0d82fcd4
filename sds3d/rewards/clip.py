"""CLIP similarity as a reward, from a model folder on disk."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.errors import ConfigError


class ClipReward:
    """Cosine similarity of image and prompt under a CLIP model (Radford et al. 2021, arXiv:2103.00020)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of the CLIP reward."""

        folder: str = option(
            "", help="folder of a CLIP model in the transformers layout, with its processor", path=True
        )

    def __init__(self, config: Config, device: torch.device) -> None:
        from transformers import AutoTokenizer, CLIPModel

        folder = Path(config.folder)
        if not config.folder or not folder.is_dir():
            raise ConfigError(
                f"reward.folder: got {config.folder!r}, expected the folder of a CLIP model (config.json, "
                "model.safetensors, tokenizer files)"
            )
        try:
            self.model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"reward.folder: {folder} holds no usable CLIP model ({error})") from error
        self.model = self.model.eval().requires_grad_(False).to(device)
        self.mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], device=device)[:, None, None]
        self.std = torch.tensor([0.26862954, 0.26130258, 0.27577711], device=device)[:, None, None]

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "b 3 H W"], prompt: str) -> Float[Tensor, " b"]:
        """One number in [-1, 1] per image, larger is better."""
        size = self.model.config.vision_config.image_size
        pixels = F.interpolate(images.clamp(0, 1), size=(size, size), mode="bicubic", antialias=True)
        words = self.tokenizer([prompt], padding=True, truncation=True, return_tensors="pt").to(pixels.device)
        text = _features(self.model.get_text_features(**words))
        seen = _features(self.model.get_image_features(pixel_values=(pixels - self.mean) / self.std))
        return F.cosine_similarity(seen, text.expand(len(seen), -1))


def _features(output: object) -> Tensor:
    """The projected embedding; newer transformers wrap it in an output object."""
    features = getattr(output, "pooler_output", output)
    if not isinstance(features, Tensor):
        raise TypeError(f"expected CLIP features, got {type(output).__name__}")
    return features
