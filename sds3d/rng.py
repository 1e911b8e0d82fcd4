"""Named, counter-based random streams: the only source of randomness in the package.

Every draw is a pure function of (seed, stream name, counter). Nothing has to be saved to resume a run: the
generator of step k is made anew from k, so a resumed run draws exactly what the uninterrupted run would have.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from sds3d.transfer import upload


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts, stable across processes, platforms and Python versions."""
    text = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class Stream:
    """One independent source of randomness, fixed by (seed, name, counter)."""

    seed: int
    name: str
    counter: int = 0

    def at(self, counter: int) -> "Stream":
        """The same stream at another counter (usually the step)."""
        return Stream(self.seed, self.name, counter)

    def fork(self, name: str) -> "Stream":
        """An independent child stream at the same counter."""
        return Stream(self.seed, f"{self.name}/{name}", self.counter)

    def torch_generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh torch generator; two calls give generators that draw the same numbers."""
        generator = torch.Generator(device=device)
        generator.manual_seed(derive_seed(self.seed, self.name, self.counter))
        return generator

    def numpy_generator(self) -> np.random.Generator:
        """A fresh numpy generator; two calls give generators that draw the same numbers."""
        return np.random.Generator(np.random.PCG64(derive_seed(self.seed, self.name, self.counter)))

    def normal(self, *shape: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Standard normal float32 tensor, drawn on the CPU so that every device sees the same numbers."""
        return upload(torch.randn(*shape, generator=self.torch_generator()), device)

    def uniform(self, *shape: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Uniform [0, 1) float32 tensor, drawn on the CPU so that every device sees the same numbers."""
        return upload(torch.rand(*shape, generator=self.torch_generator()), device)


@dataclass(frozen=True)
class Streams:
    """The streams of one run, all derived from one seed."""

    seed: int

    def stream(self, name: str, counter: int = 0) -> Stream:
        """The stream of this name, e.g. "camera", "shading", "render", "diffusion", "init"."""
        return Stream(self.seed, name, counter)
