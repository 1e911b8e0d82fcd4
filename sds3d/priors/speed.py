"""What makes a full-size prior fast: precision, memory layout, compilation. Nothing here changes what is computed.

The schedule's algebra stays in float32 whatever the network's precision: only the network's rows are cast.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers import AutoencoderTiny
from jaxtyping import Float
from torch import Tensor, nn

from sds3d.errors import PriorError
from sds3d.priors.layout import channels_last
from sds3d.priors.network import Denoiser, NetworkPrior, Rows, with_module
from sds3d.priors.vae_path import encoder_path

if TYPE_CHECKING:
    from sds3d.priors.config import PriorConfig
    from sds3d.priors.folder import PipelineFolder

CompileMode = Literal["off", "default", "max-autotune", "cudagraphs"]
# What torch.compile is told; the last two replay CUDA graphs, whose outputs live until the next replay.
_COMPILE: dict[str, dict[str, Any]] = {
    "default": {},
    "max-autotune": {"mode": "max-autotune"},
    "cudagraphs": {"mode": "reduce-overhead"},
}
# Attention that materialises its scores instead of calling scaled_dot_product_attention.
_LEGACY_ATTENTION = (
    "AttnProcessor",
    "AttnAddedKVProcessor",
    "SlicedAttnProcessor",
    "SlicedAttnAddedKVProcessor",
)


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, list[str]]:
    """The network's precision by its name in the config, and what the user should know about it.

    auto is bfloat16, or float16 on CUDA devices without it.

    Raises:
        PriorError: the device cannot compute in this precision.
    """
    if name == "auto":
        if supports(torch.bfloat16, device):
            return torch.bfloat16, []
        if device.type == "cuda" and supports(torch.float16, device):
            told = (
                f"{_name(device)} has no bfloat16: the prior runs in float16, whose largest number is 65504"
            )
            return torch.float16, [f"{told}; set prior.dtype=float32 where steps are skipped as not finite"]
        return torch.float32, [f"{_name(device)} has no half precision: the prior runs in float32"]
    dtype: torch.dtype = getattr(torch, name)
    if not supports(dtype, device):
        usable = [n for n in ("bfloat16", "float16", "float32") if supports(getattr(torch, n), device)]
        raise PriorError(
            f"prior.dtype: got {name}, which {_name(device)} cannot compute in; use auto or {' or '.join(usable)}"
        )
    return dtype, []


def supports(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether networks run in this precision on this device, in hardware where it is CUDA."""
    if dtype == torch.float32:
        return True
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return capability >= ((8, 0) if dtype == torch.bfloat16 else (5, 3))
    try:
        _probe(dtype, device)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _probe(dtype: torch.dtype, device: torch.device) -> None:
    """One of each of the operators that networks are made of."""
    x = torch.ones(1, 4, 4, 4, dtype=dtype, device=device)
    weight = torch.ones(4, 4, 3, 3, dtype=dtype, device=device)
    x = nn.functional.group_norm(nn.functional.conv2d(x, weight, padding=1), 2)
    tokens = x.flatten(2)
    nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"this {device.type.upper()}"


def tuned(
    prior: NetworkPrior,
    config: "PriorConfig",
    folder: "PipelineFolder | None" = None,
    tiny: AutoencoderTiny | None = None,
) -> NetworkPrior:
    """The prior with the settings of `config` on layout, encoder and compilation; changed in place.

    A tiny autoencoder is `tiny` where given, else looked for in `folder`.
    """
    module = channels_last(prior.denoiser.module)
    slow = legacy_attention(module)
    if slow:
        prior.notes.append(f"{', '.join(slow)}: this attention keeps all its scores in memory and is slow")
    prior.codec = encoder_path(prior, config, folder, tiny)
    if config.compile != "off":
        prior.fast = CompiledDenoiser(prior.denoiser, config.compile, prior.notes.append)
    return prior


def legacy_attention(module: nn.Module) -> list[str]:
    """Class names of attention processors that do not use scaled_dot_product_attention."""
    found = {type(getattr(part, "processor", None)).__name__ for part in module.modules()}
    return sorted(found.intersection(_LEGACY_ATTENTION))


class CompiledDenoiser:
    """A denoiser behind torch.compile with static shapes, for calls without autograd only.

    Each number of rows and size is compiled once, at its first call. Where that fails the plain network is used from
    then on, and `note` is told once. Students never get here: they are trained through the plain network.
    """

    def __init__(self, plain: Denoiser, mode: str, note: Callable[[str], None]) -> None:
        self.plain, self.note, self.mode = plain, note, mode
        self.replays = mode != "default" and next(plain.module.parameters()).is_cuda
        self.failed = False
        compiled: Any = torch.compile(plain.module, dynamic=False, **_COMPILE[mode])
        self._fast = with_module(plain, compiled)

    @property
    def module(self) -> nn.Module:
        """The plain network."""
        return self.plain.module

    def __call__(self, rows: Rows) -> Float[Tensor, "r k h w"]:
        """As the plain denoiser's."""
        if self.failed:
            return self.plain(rows)
        try:
            return self._call(rows)
        except torch.OutOfMemoryError:
            raise
        # Compilers fail in many ways: no C++ compiler, no Triton, an operator they do not know, a full disk.
        except (RuntimeError, ImportError, OSError, AttributeError, TypeError, AssertionError) as error:
            self.failed = True
            first = str(error).strip().partition("\n")[0]
            self.note(
                f"prior.compile={self.mode} failed, the network runs uncompiled ({type(error).__name__}: {first})"
            )
            return self.plain(rows)

    def _call(self, rows: Rows) -> Tensor:
        if not self.replays:
            return self._fast(rows)
        torch.compiler.cudagraph_mark_step_begin()
        return self._fast(rows).clone()
