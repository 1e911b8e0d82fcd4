"""Reading a diffusers pipeline folder: safetensors only, no remote code, no network, clear words when it is not one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers import DDPMScheduler
from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from sds3d.errors import PriorError
from sds3d.priors.lazy import LazyEncoder
from sds3d.priors.weights import INDEX_FILE, named_pipeline, read_json, variant_of

EXTRA_FILE = "sds3d_prior.json"  # what diffusers has no field for: pixel unshuffle, camera inputs


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of transformers: loading a local file is not worth a line on the terminal."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


class PipelineFolder:
    """The parts of one pipeline folder, loaded one by one by the families."""

    def __init__(self, path: Path) -> None:
        """Raises PriorError where `path` holds no readable model_index.json."""
        self.path = path
        self.index = read_json(path / INDEX_FILE)
        self.extra = read_json(path / EXTRA_FILE) if (path / EXTRA_FILE).is_file() else {}

    @property
    def pipeline(self) -> str:
        """The pipeline class that the folder names, e.g. "StableDiffusionPipeline"."""
        return named_pipeline(self.index)

    def has(self, name: str) -> bool:
        """Whether the pipeline has this part at all."""
        return (self.index.get(name) or [None])[0] is not None

    def require(self, *names: str) -> None:
        """PriorError that names all missing folders at once."""
        missing = [name for name in names if not (self.path / name).is_dir()]
        if missing:
            raise PriorError(
                f"{self.path}: no {', '.join(f'{name}/' for name in missing)} inside; "
                f"expected a complete {self.pipeline} folder; download or copy it again"
            )

    def load(self, name: str, cls: Any, **options: Any) -> Any:
        """`cls.from_pretrained` of a part, from disk only."""
        self.require(name)
        try:
            with _quiet():
                return cls.from_pretrained(self.path / name, local_files_only=True, **options)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise PriorError(
                f"{self.path / name}: cannot be loaded ({error}); download or copy it again"
            ) from error

    def load_network(self, name: str, cls: Any, dtype: torch.dtype) -> Any:
        """A diffusers network, frozen, from safetensors; the half-precision variant only for half precision."""
        variant = variant_of(self.path / name, half=dtype != torch.float32)
        # low_cpu_mem_usage: without it diffusers reads all weights in float32 first, twice the memory of the model.
        network = self.load(
            name, cls, low_cpu_mem_usage=True, use_safetensors=True, torch_dtype=dtype, variant=variant
        )
        return network.eval().requires_grad_(False)

    def load_text_encoder(self, name: str, cls: Any, dtype: torch.dtype = torch.float32) -> LazyEncoder:
        """A transformers text encoder, frozen, from safetensors; its weights are read when it is first called."""

        def read() -> Any:
            variant = variant_of(self.path / name, half=dtype != torch.float32)
            network = self.load(name, cls, use_safetensors=True, dtype=dtype, variant=variant)
            return network.eval().requires_grad_(False)

        settings = getattr(cls, "config_class", None) or AutoConfig
        return LazyEncoder(self.load(name, settings), read)

    def load_tokenizer(self, name: str, cls: Any, *, words: int) -> PreTrainedTokenizerBase:
        """A tokenizer whose vocabulary fits an encoder with `words` embeddings.

        transformers makes an empty tokenizer, without a word, from a folder that lacks its vocabulary.

        Raises:
            PriorError: the files are missing, or the tokenizer belongs to another model.
        """
        whole = (self.path / name / "tokenizer.json").is_file()
        tokenizer = self.load(name, PreTrainedTokenizerFast if whole else cls)
        if not 0.5 * words <= len(tokenizer) <= words:
            raise PriorError(
                f"{self.path / name}: tokenizer has {len(tokenizer)} words, its text encoder {words}; "
                "the tokenizer files are incomplete or from another model"
            )
        return tokenizer


def alphas_cumprod_of(scheduler: Any) -> Float[Tensor, " N"]:
    """The table a model was trained on, in float64, whatever sampler its folder names."""
    config = dict(scheduler.config)
    keys = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
    )
    training = DDPMScheduler(**{key: config[key] for key in keys if key in config})
    return training.alphas_cumprod.double()
