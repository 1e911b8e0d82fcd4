"""Multiresolution hash encoding of points: reference (torch) | numba.

Level l interpolates features stored at the corners of a lattice with N_l cells per side,
N_l = round(N_min b^l) with b = (N_max / N_min)^(1 / (L - 1)). Lattices that fit into the table are stored
densely; finer ones share rows by the hash (x xor 2654435761 y xor 805459861 z) mod T.
Source: Mueller et al. 2022, Instant Neural Graphics Primitives, arXiv:2201.05989, section 3, eq. 2-4.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sds3d.ops import hashgrid_numba
from sds3d.ops.backend import backend_for
from sds3d.rng import Stream

_PRIMES = (1, 2654435761, 805459861)


@dataclass(frozen=True, kw_only=True)
class HashGridConfig:
    """Size of the encoding; the defaults suit 64 px renders on a CPU."""

    levels: int = 8
    log2_rows: int = 15  # rows of one hashed level
    features: int = 2  # per level
    coarsest_cells: int = 16  # per side
    finest_cells: int = 128


class HashGrid(nn.Module):
    """Trainable encoding of points in [0, 1]^3 into levels x features numbers.

    Differentiable with respect to the table on every backend. With respect to the points (analytic normals)
    only the reference is differentiable, twice if need be; points that require a gradient therefore select
    it.
    """

    def __init__(self, config: HashGridConfig, rng: Stream) -> None:
        super().__init__()
        self.config = config
        growth = (config.finest_cells / config.coarsest_cells) ** (1.0 / max(config.levels - 1, 1))
        levels, first = [], 0
        for index in range(config.levels):
            cells = round(config.coarsest_cells * growth**index)
            dense = (cells + 1) ** 3 <= 2**config.log2_rows
            size = (cells + 1) ** 3 if dense else 2**config.log2_rows
            levels.append((cells, first, size, dense))
            first += size
        self.levels: hashgrid_numba.Levels = tuple(levels)
        # U(-1e-4, 1e-4), section 4 of the paper
        self.table = nn.Parameter((rng.uniform(first, config.features) * 2 - 1) * 1e-4)

    @property
    def width(self) -> int:
        """Length of the encoding of one point."""
        return self.config.levels * self.config.features

    def forward(self, points: Float[Tensor, "n 3"], active: int | None = None) -> Float[Tensor, "n d"]:
        """Encode points in [0, 1]^3; features of levels from `active` on are zero, without gradient."""
        levels = self.levels[: self.config.levels if active is None else active]
        encoded = encode(points, self.table, levels)
        return nn.functional.pad(encoded, (0, self.width - encoded.shape[1]))


def encode(
    points: Float[Tensor, "n 3"], table: Float[Tensor, "rows f"], levels: hashgrid_numba.Levels
) -> Float[Tensor, "n d"]:
    """Interpolated features of the given levels, level-major: d = levels x f."""
    if backend_for(points) == "numba" and not points.requires_grad:
        return _Encode.apply(points, table, levels)
    return encode_reference(points, table, levels)


def encode_reference(
    points: Float[Tensor, "n 3"], table: Float[Tensor, "rows f"], levels: hashgrid_numba.Levels
) -> Float[Tensor, "n d"]:
    """The encoding in plain torch, on any device."""
    corners = torch.tensor([[c & 1, (c >> 1) & 1, c >> 2] for c in range(8)], device=points.device)
    encoded = [points.new_zeros(points.shape[0], 0)]
    for cells, first, size, dense in levels:
        scaled = points * cells
        cell = scaled.detach().floor().long().clamp(0, cells - 1)
        fraction = (scaled - cell)[:, None]  # n 1 3
        weight = torch.where(corners.bool(), fraction, 1 - fraction).prod(-1)  # n 8
        x, y, z = (cell[:, None] + corners).unbind(-1)
        if dense:
            row = x + (cells + 1) * (y + (cells + 1) * z)
        else:
            row = (x * _PRIMES[0] ^ y * _PRIMES[1] ^ z * _PRIMES[2]) & (size - 1)
        encoded.append((weight[..., None] * table[first + row]).sum(1))
    return torch.cat(encoded, 1)


class _Encode(torch.autograd.Function):
    """The numba twin; its gradient reaches the table only."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, table: Tensor, levels: hashgrid_numba.Levels) -> Tensor:
        positions = points.detach().to(table.dtype).contiguous()
        ctx.save_for_backward(positions)
        (ctx.rows, ctx.features), ctx.levels = table.shape, levels
        out = hashgrid_numba.encode(positions.numpy(), table.detach().numpy(), levels)
        return torch.from_numpy(out).permute(1, 0, 2).reshape(points.shape[0], len(levels) * table.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (positions,) = ctx.saved_tensors
        per_level = (
            grad.reshape(positions.shape[0], len(ctx.levels), ctx.features).permute(1, 0, 2).contiguous()
        )
        return (
            None,
            torch.from_numpy(
                hashgrid_numba.scatter(positions.numpy(), per_level.numpy(), ctx.rows, ctx.levels)
            ),
            None,
        )
