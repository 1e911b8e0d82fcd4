"""Marching tetrahedra on a body-centred cubic lattice: a closed triangle mesh from signed distances, differentiable.

The lattice has n^3 cells with a vertex at every corner and every centre. Two centres that share a cell face and one
edge of that face span a tetrahedron: four per face, all alike, with dihedral angles of 60 and 90 degrees only, so
triangles come out rounder than from split cubes. The outermost layer is held outside, so the surface is always closed.

Sources: Shen et al. 2021, Deep Marching Tetrahedra (DMTet), arXiv:2111.04276, section 3.1; the lattice: Labelle and
Shewchuk 2007, Isosurface Stuffing, section 2.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sds3d.ops.mesh_edges import MeshEdges, mesh_edges

SAFE_OFFSET_CELLS = 0.2  # vertices that move less than this along each axis turn no tetrahedron inside out
_OUTSIDE_CELLS = 0.1  # the least distance that the outermost layer is given
_RIM = 0.02  # how near to its ends an edge is cut
# Even orders of four vertices: they keep the orientation of a tetrahedron.
_ONE_APART = ((0, 1, 2, 3), (1, 0, 3, 2), (2, 0, 1, 3), (3, 0, 2, 1))
_TWO_APART = ((0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 1, 2), (1, 2, 0, 3), (1, 3, 2, 0), (2, 3, 0, 1))


@dataclass(frozen=True, kw_only=True)
class TetSurface:
    """The zero level of signed distances on tetrahedra; faces counter-clockwise seen from outside."""

    vertices: Float[Tensor, "v 3"]
    faces: Int[Tensor, "f 3"]
    edges: Int[Tensor, "v 2"]  # the lattice vertices that each vertex lies between
    tets: Int[Tensor, "t 4"]  # the tetrahedra that the surface passes through

    def mesh_edges(self) -> MeshEdges:
        """The edges of the triangles."""
        return mesh_edges(self.faces, len(self.vertices))


@dataclass(frozen=True)
class TetLattice:
    """n cells per side of a cube of +- `half_extent` metres; vertices are the corners, then the centres, axes x y z."""

    cells: int
    half_extent: float

    @property
    def cell_m(self) -> float:
        """Side of a cell."""
        return 2 * self.half_extent / self.cells

    @property
    def corners(self) -> int:
        """How many of the vertices are corners."""
        return (self.cells + 1) ** 3

    @property
    def count(self) -> int:
        """Number of vertices."""
        return self.corners + self.cells**3

    def positions(self, device: torch.device | str = "cpu") -> Float[Tensor, "v 3"]:
        """Where the vertices are."""
        corner = torch.linspace(-self.half_extent, self.half_extent, self.cells + 1, device=device)
        centre = 0.5 * (corner[1:] + corner[:-1])
        grids = [
            torch.stack(torch.meshgrid(a, a, a, indexing="ij"), -1).view(-1, 3) for a in (corner, centre)
        ]
        return torch.cat(grids)

    def border(self, device: torch.device | str = "cpu") -> Bool[Tensor, " v"]:
        """The outermost layer: corners on the cube's surface, centres of the cells that touch it."""
        masks = []
        for n in (self.cells + 1, self.cells):
            mask = torch.ones(n, n, n, dtype=torch.bool, device=device)
            mask[1:-1, 1:-1, 1:-1] = False
            masks.append(mask.view(-1))
        return torch.cat(masks)

    def closed(
        self, sdf: Float[Tensor, " v"], border: Bool[Tensor, " v"] | None = None
    ) -> Float[Tensor, " v"]:
        """The same signed distances with the outermost layer held outside."""
        border = self.border(sdf.device) if border is None else border
        return torch.where(border, sdf.clamp_min(_OUTSIDE_CELLS * self.cell_m), sdf)

    def active_tets(self, inside: Bool[Tensor, " v"]) -> Int[Tensor, "t 4"]:
        """The tetrahedra with vertices on both sides, positively oriented."""
        n = self.cells
        corner = inside[: self.corners].view(n + 1, n + 1, n + 1)
        centre = inside[self.corners :].view(n, n, n)
        found = [self._across(axis, corner, centre) for axis in range(3)]
        tets = torch.cat(found)
        count = inside[tets].sum(1)
        return tets[(count > 0) & (count < 4)]

    def _across(self, axis: int, corner: Tensor, centre: Tensor) -> Tensor:
        """Tetrahedra around the line from every centre to the next one along an axis, where signs differ."""
        n = self.cells
        second, third = (axis + 1) % 3, (axis + 2) % 3
        # The four corners of the face between, counter-clockwise seen against the axis.
        ring = ((0, 0), (1, 0), (1, 1), (0, 1))
        layer = corner.narrow(axis, 1, n - 1)
        values = [layer.narrow(second, a, n).narrow(third, b, n) for a, b in ring]
        values += [centre.narrow(axis, 0, n - 1), centre.narrow(axis, 1, n - 1)]
        some, every = values[0], values[0]
        for value in values[1:]:
            some, every = some | value, every & value
        cell = (some & ~every).nonzero()
        step = torch.eye(3, dtype=cell.dtype, device=cell.device)
        ids = [
            _number(cell, n) + self.corners,
            _number(cell + step[axis], n) + self.corners,
            *(_number(cell + step[axis] + a * step[second] + b * step[third], n + 1) for a, b in ring),
        ]
        near, far, *around = ids
        tets = [torch.stack([near, far, around[i], around[(i + 1) % 4]], 1) for i in range(4)]
        return torch.cat(tets)


def extract(lattice: TetLattice, positions: Float[Tensor, "v 3"], sdf: Float[Tensor, " v"]) -> TetSurface:
    """The surface of signed distances (negative inside) on a lattice whose vertices may have moved.

    Differentiable in both. Give `sdf` through `lattice.closed` for a closed surface.
    """
    tets = lattice.active_tets(sdf.detach() < 0)
    return march_tets(positions, sdf, tets)


def march_tets(
    positions: Float[Tensor, "v 3"], sdf: Float[Tensor, " v"], tets: Int[Tensor, "t 4"]
) -> TetSurface:
    """One or two triangles in every tetrahedron that the zero level passes through.

    A vertex lies on the edge (a, b) at (p_a s_b - p_b s_a) / (s_b - s_a), but never nearer to an end than a fiftieth
    of the edge, so that no triangle is without size; the gradient is that of the formula. Tetrahedra must be
    positively oriented (det(b - a, c - a, d - a) > 0) and share whole faces; then the surface has no crack.
    """
    inside = sdf.detach()[tets] < 0
    powers = torch.tensor([1, 2, 4, 8], device=tets.device)
    code = (inside * powers).sum(1)
    triangles, counts = (table.to(tets.device) for table in _tables())
    used = counts[code]
    owner = torch.repeat_interleave(used)
    second = torch.zeros_like(owner)
    second[1:] = (owner[1:] == owner[:-1]).long()
    corner = triangles[code[owner], second]  # f 3 corners 2 ends
    ends = tets[owner[:, None, None], corner].sort(-1).values
    key = ends[..., 0] * len(sdf) + ends[..., 1]
    unique, faces = torch.unique(key, return_inverse=True)
    edges = torch.stack([unique // len(sdf), unique % len(sdf)], 1)
    a, b = edges.unbind(1)
    value_a, value_b = sdf.index_select(0, a)[:, None], sdf.index_select(0, b)[:, None]
    share = value_a / (value_a - value_b)
    share = share + (share.clamp(_RIM, 1 - _RIM) - share).detach()
    vertices = torch.lerp(positions.index_select(0, a), positions.index_select(0, b), share)
    return TetSurface(vertices=vertices, faces=faces, edges=edges, tets=tets)


@lru_cache(maxsize=1)
def _tables() -> tuple[Tensor, Tensor]:
    """Per sign pattern (bit i: vertex i inside): up to two triangles, corners as tet edges (16 2 3 2); their number."""
    triangles = torch.zeros(16, 2, 3, 2, dtype=torch.int64)
    count = torch.zeros(16, dtype=torch.int64)
    for i, j, k, m in _ONE_APART:
        outward = [(i, j), (i, k), (i, m)]
        triangles[1 << i, 0] = torch.tensor(outward)
        triangles[15 - (1 << i), 0] = torch.tensor(outward[::-1])
        count[1 << i] = count[15 - (1 << i)] = 1
    for i, j, k, m in _TWO_APART:
        quad = [(i, k), (i, m), (j, m), (j, k)]
        triangles[(1 << i) | (1 << j)] = torch.tensor([quad[:3], [quad[0], quad[2], quad[3]]])
        count[(1 << i) | (1 << j)] = 2
    return triangles, count


def _number(cell: Int[Tensor, "c 3"], n: int) -> Int[Tensor, " c"]:
    return (cell[:, 0] * n + cell[:, 1]) * n + cell[:, 2]
