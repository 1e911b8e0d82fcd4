"""What a text encoder says, as one tensor per prompt.

Outside a prior's own files an embedding is opaque: it is picked by view, blended (Perp-Neg), cached and handed back.
Tokens, the pooled vector and the padding mask of a model travel as rows of the same width, so that all of this works
on every family alike.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Sizes of one model's embedding: `tokens` rows of width `width`, then pooled, then mask."""

    tokens: int
    width: int
    pooled: int = 0  # entries of the pooled vector; 0 = none
    masked: bool = False

    @property
    def rows(self) -> int:
        """Rows of a packed embedding."""
        return self.tokens + self._rows(self.pooled) + self._rows(self.tokens * self.masked)

    def pack(
        self,
        tokens: Float[Tensor, "p n d"],
        pooled: Float[Tensor, "p e"] | None = None,
        mask: Bool[Tensor, "p n"] | None = None,
    ) -> Float[Tensor, "p m d"]:
        """One float32 tensor; ValueError where a part is missing or has another size."""
        expected = (self.tokens, self.width)
        if tuple(tokens.shape[1:]) != expected:
            raise ValueError(f"tokens: got {tuple(tokens.shape[1:])}, expected {expected}")
        if (pooled is None) != (self.pooled == 0) or (mask is None) == self.masked:
            raise ValueError("pooled and mask must be given exactly where the packing has them")
        further = [self._as_rows(flat.float()) for flat in (pooled, mask) if flat is not None]
        return torch.cat([tokens.float(), *further], dim=1)

    def tokens_of(self, packed: Float[Tensor, "r m d"]) -> Float[Tensor, "r n d"]:
        """The token embeddings."""
        return packed[:, : self.tokens]

    def pooled_of(self, packed: Float[Tensor, "r m d"]) -> Float[Tensor, "r e"]:
        """The pooled vector."""
        start = self.tokens
        return packed[:, start : start + self._rows(self.pooled)].flatten(1)[:, : self.pooled]

    def mask_of(self, packed: Float[Tensor, "r m d"]) -> Bool[Tensor, "r n"]:
        """True at real tokens; where embeddings were blended, at the tokens of any of them."""
        start = self.tokens + self._rows(self.pooled)
        return packed[:, start:].flatten(1)[:, : self.tokens] > 0.0

    def _rows(self, entries: int) -> int:
        return math.ceil(entries / self.width)

    def _as_rows(self, flat: Float[Tensor, "p e"]) -> Float[Tensor, "p k d"]:
        rows = self._rows(flat.shape[1])
        return F.pad(flat, (0, rows * self.width - flat.shape[1])).unflatten(1, (rows, self.width))
