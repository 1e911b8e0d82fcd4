"""Text-to-image UNet models in the diffusers folder layout: Stable Diffusion 1.x / 2.x and the shipped toybox.

Everything that differs between such models is settled here: latent or pixel space, eps / v / x0 output, text
length, camera condition. Above this file there is only eps(x_t, t) with t in [0, 1].
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from diffusers.schedulers import DDIMScheduler, DDPMScheduler
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from sds3d.errors import PriorError
from sds3d.interfaces import Student, Told
from sds3d.mathx.predict import eps_from_v, eps_from_x0
from sds3d.mathx.schedule import TableSchedule
from sds3d.ops.threads import map_slices
from sds3d.priors.camera_condition import (
    CONDITION_SIZE,
    COORDINATE_CHANNELS,
    condition_vector,
    with_coordinates,
)
from sds3d.priors.vocabulary import unknown_word_warnings
from sds3d.rng import Stream

EXTRA_FILE = "sds3d_prior.json"
Prediction = Literal["epsilon", "v_prediction", "sample"]


class PixelCodec:
    """x is the image in [-1, 1], pixel-unshuffled by `factor` (1 = plain pixels): an exact, noise-preserving code."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def encode(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """[-1, 1] image to x."""
        return F.pixel_unshuffle(image, self.factor) if self.factor > 1 else image

    def decode(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """X to [-1, 1] image."""
        return F.pixel_shuffle(x, self.factor) if self.factor > 1 else x


class VaeCodec:
    """x is the posterior mean of a VAE times its scaling factor."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae

    def encode(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """[-1, 1] image to scaled latent; differentiable. The mean keeps sampling noise out of the gradient."""
        posterior = self.vae.encode(image.to(self.vae.dtype)).latent_dist
        return posterior.mean.to(image.dtype) * self.vae.config.scaling_factor

    def decode(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Scaled latent to [-1, 1] image."""
        return self.vae.decode((x / self.vae.config.scaling_factor).to(self.vae.dtype)).sample.to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The loaded modules of a pipeline folder."""

    tokenizer: PreTrainedTokenizerBase
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    scheduler: SchedulerMixin
    vae: AutoencoderKL | None
    extra: dict[str, Any]


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


def _component(folder: Path, name: str, load: Any, **options: Any) -> Any:
    if not (folder / name).is_dir():
        raise PriorError(f"{folder}: no {name}/ inside; expected a complete diffusers pipeline folder")
    try:
        with _quiet():
            return load(folder / name, local_files_only=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise PriorError(f"{folder / name}: cannot be loaded ({error}); download or copy it again") from error


def load_parts(folder: Path, dtype: torch.dtype = torch.float32) -> Parts:
    """Load a pipeline folder from disk: safetensors only, no remote code, no network; the UNet in `dtype`.

    Raises:
        PriorError: a part is missing or damaged, or the tokenizer is not the one the text encoder was made for.
    """
    if not (folder / "model_index.json").is_file():
        raise PriorError(f"{folder}: no model_index.json; expected a diffusers pipeline folder")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    tokenizer_file = folder / "tokenizer" / "tokenizer.json"
    if tokenizer_file.is_file():
        tokenizer = _component(folder, "tokenizer", PreTrainedTokenizerFast.from_pretrained)
    else:
        from transformers import CLIPTokenizer

        tokenizer = _component(folder, "tokenizer", CLIPTokenizer.from_pretrained)
    text_encoder = _component(
        folder, "text_encoder", CLIPTextModel.from_pretrained, use_safetensors=True, dtype=torch.float32
    )
    if len(tokenizer) != text_encoder.config.vocab_size:
        raise PriorError(
            f"{folder}: tokenizer has {len(tokenizer)} words, text encoder {text_encoder.config.vocab_size}; "
            "the tokenizer files are incomplete or from another model"
        )
    unet = _component(
        folder,
        "unet",
        UNet2DConditionModel.from_pretrained,
        low_cpu_mem_usage=False,
        use_safetensors=True,
        torch_dtype=dtype,
    )
    scheduler = _component(folder, "scheduler", DDIMScheduler.from_pretrained)
    has_vae = (index.get("vae") or [None])[0] is not None
    vae = None
    if has_vae:
        # float32: the SDXL-class autoencoders overflow in half precision.
        vae = _component(
            folder,
            "vae",
            AutoencoderKL.from_pretrained,
            low_cpu_mem_usage=False,
            use_safetensors=True,
            torch_dtype=torch.float32,
        )
    extra_file = folder / EXTRA_FILE
    extra = json.loads(extra_file.read_text(encoding="utf-8")) if extra_file.is_file() else {}
    return Parts(
        tokenizer=tokenizer, text_encoder=text_encoder, unet=unet, scheduler=scheduler, vae=vae, extra=extra
    )


def alphas_cumprod_of(scheduler: SchedulerMixin) -> Float[Tensor, " N"]:
    """The table the model was trained on, in float64, whatever sampler the folder names."""
    config = dict(scheduler.config)
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    training = DDPMScheduler(**{key: config[key] for key in keys if key in config})
    return training.alphas_cumprod.double()


class DiffusersPrior:
    """A UNet text-to-image model as a frozen eps-predictor. See `sds3d.interfaces.Prior`."""

    def __init__(self, parts: Parts, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.tokenizer, self.text_encoder = parts.tokenizer, parts.text_encoder.eval().requires_grad_(False)
        unet = parts.unet.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.unet = unet if unet.dtype == dtype else unet.to(dtype)
        self.schedule = TableSchedule(alphas_cumprod_of(parts.scheduler).to(device))
        self.prediction: Prediction = parts.scheduler.config.get("prediction_type", "epsilon")
        if self.prediction not in ("epsilon", "v_prediction", "sample"):
            raise PriorError(
                f"prediction_type {self.prediction!r} is unknown; expected epsilon, v_prediction, sample"
            )
        self.takes_condition = "condition" in parts.extra
        self.takes_coordinates = bool(parts.extra.get("coordinates", False))
        size = int(parts.unet.config.sample_size)
        self.shape = (
            int(parts.unet.config.in_channels) - COORDINATE_CHANNELS * self.takes_coordinates,
            size,
            size,
        )
        self.codec: PixelCodec | VaeCodec
        if parts.vae is not None:
            vae = parts.vae.eval().requires_grad_(False).to(device, torch.float32)
            self.codec = VaeCodec(vae)
            self.image_px = size * 2 ** (len(vae.config.block_out_channels) - 1)
        else:
            factor = int(parts.extra.get("pixel_unshuffle", 1))
            self.codec = PixelCodec(factor)
            self.image_px = size * factor

    @property
    def is_pixel(self) -> bool:
        """Whether x is (a permutation of) the image itself, so that x0 lies in [-1, 1]."""
        return isinstance(self.codec, PixelCodec)

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """Messages about words that a closed-vocabulary model does not know, each naming the closest known ones."""
        return unknown_word_warnings(self.tokenizer, prompts)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Float[Tensor, "p n d"]:
        """Token embeddings in float32, padded to the text encoder's length."""
        ids = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.text_encoder.config.max_position_embeddings,
            return_tensors="pt",
        ).input_ids
        return self.text_encoder(ids.to(self.text_encoder.device))[0].float().to(self.device)

    def encode(self, rgb: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """SRGB [0, 1] to x; resizes to `image_px` (bilinear, antialiased when shrinking)."""
        if rgb.shape[-2:] != (self.image_px, self.image_px):
            shrinks = rgb.shape[-1] > self.image_px
            rgb = F.interpolate(rgb, size=(self.image_px,) * 2, mode="bilinear", antialias=shrinks)
        return self.codec.encode(rgb * 2.0 - 1.0)

    @torch.no_grad()
    def decode(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """X to sRGB, [0, 1] up to the model's error."""
        return (self.codec.decode(x) + 1.0) / 2.0

    @torch.no_grad()
    def eps(
        self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], *told: Told
    ) -> tuple[Float[Tensor, "b c h w"], ...]:
        """Noise predictions, one per bundle, from one network call of b * len(told) images."""
        condition = self.condition(told, len(x_t)) if self.takes_condition else None
        return self.eps_of(self.unet, condition, x_t, t, *told)

    def eps_of(
        self,
        unet: Callable[..., tuple[Tensor]],
        condition: Float[Tensor, "r k"] | None,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, " b"],
        *told: Told,
    ) -> tuple[Float[Tensor, "b c h w"], ...]:
        """Noise predictions of a network with this prior's inputs and outputs: its own, or a student's.

        `condition` are the class labels of all r = b * len(told) rows. Differentiable where autograd is on.
        """
        rows = len(told)
        text = torch.cat([bundle.text for bundle in told]).to(self.dtype)
        told_x = with_coordinates(x_t) if self.takes_coordinates else x_t
        batch = told_x.to(self.dtype).repeat(rows, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        output = self._call(unet, batch, self.schedule.index(t).repeat(rows), text, condition)
        output = output.to(x_t.dtype)[:, : x_t.shape[1]]
        a, s = self.schedule.alpha(t), self.schedule.sigma(t)
        return tuple(self._to_eps(part, x_t, a, s) for part in output.chunk(rows))

    def student(self, *, rank: int, lr: float, convolutions: bool, stream: Stream) -> Student:
        """A LoRA on this network, see `sds3d.priors.student`."""
        from sds3d.priors.student import LoraStudent

        return LoraStudent(self, rank=rank, lr=lr, convolutions=convolutions, stream=stream)

    def _call(
        self,
        unet: Callable[..., tuple[Tensor]],
        batch: Tensor,
        step: Tensor,
        text: Tensor,
        condition: Tensor | None,
    ) -> Tensor:
        """The denoiser; on the CPU, without autograd, the batch is cut into one piece per thread.

        Convolutions this small gain little from threads inside an operator, and an OpenMP team that waits for a
        busy core is many times slower than independent single-thread calls.
        """

        def call(part: slice) -> Tensor:
            labels = None if condition is None else condition[part]
            return unet(batch[part], step[part], text[part], class_labels=labels, return_dict=False)[0]

        if self.device.type != "cpu" or torch.is_grad_enabled():
            return call(slice(None))
        return torch.cat(map_slices(torch.no_grad()(call), len(batch)))  # grad mode is a thread's own

    def _to_eps(self, output: Tensor, x_t: Tensor, a: Tensor, s: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return output
        if self.prediction == "v_prediction":
            return eps_from_v(x_t, output, a, s)
        return eps_from_x0(x_t, output, a, s)

    def condition(self, told: Sequence[Told], views: int) -> Float[Tensor, "r 10"]:
        """Camera and background of every row; zeros with their flag off where not told."""
        rows = []
        none = torch.zeros(views, device=self.device)
        for bundle in told:
            cameras, background = bundle.cameras, bundle.background
            if cameras is None and background is None:
                rows.append(none[:, None].expand(views, CONDITION_SIZE))
                continue
            azimuth = elevation = radius = none
            if cameras is not None:
                azimuth, elevation, radius = cameras.azimuth_deg, cameras.elevation_deg, cameras.radius
            ground = none[:, None].expand(views, 3) if background is None else background
            rows.append(
                condition_vector(
                    azimuth.to(self.device),
                    elevation.to(self.device),
                    radius.to(self.device),
                    ground.to(self.device),
                    none + float(cameras is not None),
                    none + float(background is not None),
                )
            )
        return torch.cat(rows).to(self.dtype)
