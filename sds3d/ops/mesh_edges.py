"""Edges of a triangle mesh: which faces meet at each, from one sort."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MeshEdges:
    """Every edge once. An edge with more than two faces appears once per face, as if each were a border."""

    ends: Int[Tensor, "e 2"]  # vertices, in the direction of the first face
    faces: Int[Tensor, "e 2"]  # the second is -1 at a border
    agree: Bool[Tensor, " e"]  # the two faces run the edge in opposite directions, as they should

    def inner(self) -> "MeshEdges":
        """Only the edges with two faces."""
        keep = self.faces[:, 1] >= 0
        return MeshEdges(ends=self.ends[keep], faces=self.faces[keep], agree=self.agree[keep])


def mesh_edges(faces: Int[Tensor, "f 3"], vertices: int) -> MeshEdges:
    """The edges of faces over so many vertices."""
    faces = faces.long()
    start, end = faces.reshape(-1), faces.roll(-1, 1).reshape(-1)
    key, order = (torch.minimum(start, end) * vertices + torch.maximum(start, end)).sort()
    differs = torch.ones(len(key) + 1, dtype=torch.bool, device=key.device)
    differs[1:-1] = key[1:] != key[:-1]
    opens, closes = differs[:-1], differs[1:]  # the half-edge is the first, the last of its edge
    # A pair: opens, does not close, and the next one closes.
    pair = torch.zeros_like(opens)
    pair[:-1] = opens[:-1] & ~closes[:-1] & closes[1:]
    second = torch.zeros_like(pair)
    second[1:] = pair[:-1]
    first = (~second).nonzero()[:, 0]
    paired = pair[first]
    half, other = order[first], order[(first + 1).clamp_max(len(order) - 1)]
    return MeshEdges(
        ends=torch.stack([start[half], end[half]], 1),
        faces=torch.stack([half // 3, torch.where(paired, other // 3, -1)], 1),
        agree=paired & (start[half] == end[other]),
    )
