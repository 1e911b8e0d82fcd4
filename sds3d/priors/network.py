"""A denoising network as a frozen eps-predictor: the one implementation of `Prior` for all trained models.

A family (see `sds3d.priors.families`) supplies the parts; everything that differs between models is settled in them:
latent or pixel space, what the network predicts, its clock, its text, its cameras. Above this file there is only
eps(x_t, t) with t in [0, 1].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sds3d.errors import PriorError
from sds3d.interfaces import NoiseSchedule, Student, Told
from sds3d.mathx.predict import eps_from_flow, eps_from_v, eps_from_x0
from sds3d.ops.threads import map_slices
from sds3d.priors.codec import Codec, PixelCodec, Settling
from sds3d.priors.conditions import Conditions
from sds3d.priors.lazy import LazyEncoder
from sds3d.priors.text_coders import TextCoder
from sds3d.rng import Stream

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """All rows of one network call: bundle after bundle, the same b views in each; r = b * bundles."""

    x: Float[Tensor, "r c h w"]  # in the network's precision
    t: Float[Tensor, " r"]  # our clock, float32
    text: Float[Tensor, "r m d"]  # packed, in the network's precision
    labels: Float[Tensor, "r k"] | None = None  # what a camera-conditioned network is told
    image: Float[Tensor, "r p e"] | None = None  # image prompts, opaque here
    control: Float[Tensor, "r q H W"] | None = None  # pictures that steer the layout (ControlNet)

    def __getitem__(self, part: slice) -> "Rows":
        """Some of the rows."""
        given = {name: value[part] for name, value in vars(self).items() if value is not None}
        return Rows(**given)


class Denoiser(Protocol):
    """Calls a network in the way of its family. A frozen dataclass, so that a student can put its own module in."""

    @property
    def module(self) -> nn.Module:
        """The network."""
        ...

    def __call__(self, rows: Rows) -> Float[Tensor, "r k h w"]:
        """The raw output, k >= c channels (those beyond c, learned variances, are dropped by the caller)."""
        ...


Labels = Callable[[Sequence[Told], int], Tensor]


@dataclass(frozen=True, kw_only=True)
class PriorParts:
    """What a family puts together. `side` is the side of x."""

    denoiser: Denoiser
    text: TextCoder
    codec: Codec
    schedule: NoiseSchedule
    prediction: Prediction
    side: int
    labels: Labels | None = None  # camera and background of all rows, for networks that are told them
    views_per_object: int = 1  # views that the network denoises jointly
    conditions: Conditions = field(
        default_factory=Conditions
    )  # what it wants to be told besides text and camera


class NetworkPrior:
    """A text-to-image network as a frozen eps-predictor. See `sds3d.interfaces.Prior`."""

    def __init__(self, parts: PriorParts, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.text, self.codec, self.labels = parts.text, parts.codec, parts.labels
        module = parts.denoiser.module.eval().requires_grad_(False)
        module.to(device)
        if next(module.parameters()).dtype != dtype:
            module.to(dtype)
        self.denoiser = parts.denoiser
        self.fast: Denoiser | None = None  # the same network, compiled: for calls without autograd
        self.notes: list[str] = []  # what the user should know and was not told yet
        self.schedule, self.prediction = parts.schedule, parts.prediction
        self.views_per_object, self.conditions = parts.views_per_object, parts.conditions
        self.shape = (parts.codec.channels, parts.side, parts.side)
        self.image_px = parts.side * parts.codec.factor

    @property
    def is_pixel(self) -> bool:
        """Whether x is (a permutation of) the image itself, so that x0 lies in [-1, 1]."""
        return isinstance(self.codec, PixelCodec)

    @property
    def takes_camera(self) -> bool:
        """Whether the network itself is told camera and background."""
        return self.labels is not None

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """What the user should know about these prompts."""
        return self.text.warnings(prompts)

    def encode_text(self, prompts: Sequence[str]) -> Float[Tensor, "p n d"]:
        """Packed embeddings in float32; opaque outside the prior."""
        for module in self.text.modules():
            module.to(self.device)
        return self.text(prompts).float().to(self.device)

    def release_text(self) -> None:
        """Free the text encoders; `encode_text` reads them again if it is asked once more."""
        for module in self.text.modules():
            if isinstance(module, LazyEncoder):
                module.release()

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
        """Noise predictions, one per bundle, from one network call of b * len(told) rows."""
        return self.eps_of(self.fast or self.denoiser, self.labels, x_t, t, *told)

    def eps_of(
        self,
        denoiser: Denoiser,
        labels: Labels | None,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, " b"],
        *told: Told,
    ) -> tuple[Float[Tensor, "b c h w"], ...]:
        """Noise predictions of a network with this prior's inputs and outputs: its own, or a student's.

        Differentiable where autograd is on.
        """
        count = len(told)
        rows = Rows(
            x=x_t.to(self.dtype).repeat(count, 1, 1, 1),
            t=t.repeat(count),
            text=torch.cat([bundle.text for bundle in told]).to(self.dtype),
            labels=None if labels is None else labels(told, len(x_t)),
            image=_images([bundle.image for bundle in told], self.dtype),
            control=_controls([bundle.control for bundle in told], self.dtype),
        )
        output = self._call(denoiser, rows).to(x_t.dtype)[:, : x_t.shape[1]]
        a, s = self.schedule.alpha(t), self.schedule.sigma(t)
        return tuple(self._to_eps(part, x_t, a, s) for part in output.chunk(count))

    def take_notes(self) -> list[str]:
        """What the user was not told yet. Reads from the device whether the autoencoder's numbers were finite."""
        told = self.codec.settle() if isinstance(self.codec, Settling) else None
        notes, self.notes = [*self.notes, *([told] if told else [])], []
        return notes

    def student(self, *, rank: int, lr: float, convolutions: bool, stream: Stream) -> Student:
        """A LoRA on this network, see `sds3d.priors.student`."""
        from sds3d.priors.student import LoraStudent

        return LoraStudent(self, rank=rank, lr=lr, convolutions=convolutions, stream=stream)

    def _call(self, denoiser: Denoiser, rows: Rows) -> Tensor:
        """The network; on the CPU, without autograd, the rows are cut into one piece per thread.

        Convolutions this small gain little from threads inside an operator, and an OpenMP team that waits for a
        busy core is many times slower than independent single-thread calls.
        """
        whole = self.device.type != "cpu" or torch.is_grad_enabled() or self.views_per_object > 1
        if whole or denoiser is self.fast:  # a compiled network wants one shape
            return denoiser(rows)
        # Grad mode is a thread's own.
        return torch.cat(map_slices(torch.no_grad()(lambda part: denoiser(rows[part])), len(rows.x)))

    def _to_eps(self, output: Tensor, x_t: Tensor, a: Tensor, s: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return output
        if self.prediction == "v_prediction":
            return eps_from_v(x_t, output, a, s)
        if self.prediction == "flow":
            return eps_from_flow(x_t, output, s)
        return eps_from_x0(x_t, output, a, s)


def with_module(denoiser: Any, module: nn.Module) -> Any:
    """The same way of calling, with another network."""
    return replace(denoiser, module=module)


def _images(parts: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor | None:
    """Image embeddings of all bundles, zero (no image) where a bundle has none; None where no bundle has any."""
    given = next((part for part in parts if part is not None), None)
    if given is None:
        return None
    return torch.cat([torch.zeros_like(given) if part is None else part for part in parts]).to(dtype)


def _controls(parts: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor | None:
    """Control pictures of all bundles; PriorError where only some bundles have them."""
    given = [part for part in parts if part is not None]
    if not given:
        return None
    if len(given) != len(parts):
        raise PriorError("either all bundles of one call carry control pictures, or none does")
    return torch.cat(given).to(dtype)
