"""Antialiased silhouettes: what makes a rasterised image differentiable in the outline of a mesh.

Where the line between two neighbouring pixel centres crosses a visible silhouette edge at distance s (pixels) from the
centre of the nearer surface, colours blend: for s > 1/2 the surface takes the share s - 1/2 of the other pixel, for
s < 1/2 the other side takes the share 1/2 - s of its own. Steep edges act on horizontal pairs and flat edges on
vertical ones, so summed over an outline the blended coverage is its area and moves with it.

Source: Laine et al. 2020, Modular Primitives for High-Performance Differentiable Rendering, arXiv:2011.03277,
section 3.3. There the edges of the face under a pixel are tried, which misses outlines made of faces smaller than a
pixel; here all silhouette edges are walked instead, and in each pair of pixels the outermost visible one counts.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sds3d.ops.mesh_edges import MeshEdges
from sds3d.ops.mesh_raster import to_screen


@dataclass(frozen=True, kw_only=True)
class Crossings:
    """Silhouette edges between pixel centres: k pairs of neighbours and the edge points between them."""

    near: Int[Tensor, " k"]  # flat pixel (b H W) on the side of the surface
    far: Int[Tensor, " k"]  # its neighbour beyond the edge
    start: Int[Tensor, " k"]  # ends of the edge, flat (b v)
    end: Int[Tensor, " k"]
    along: Int[Tensor, " k"]  # 1: the pair is horizontal and the edge steep; 0: vertical and flat


def antialias(
    image: Float[Tensor, "b c H W"], clip: Float[Tensor, "b v 4"], crossings: Crossings
) -> Float[Tensor, "b c H W"]:
    """Blend the pixels at silhouettes; differentiable in the image and in `clip`."""
    b, channels, height, width = image.shape
    flat = image.permute(0, 2, 3, 1).reshape(-1, channels)
    # In float64, as the edges were found: in float32 the ends of a tiny edge may fall together.
    ends = clip.reshape(-1, 4).index_select(0, torch.cat([crossings.start, crossings.end])).double()
    (start, end), _ = to_screen(ends.view(2, -1, 4), (height, width))
    centre = _centres(crossings.near, width, height)
    at = crossings.along[:, None]
    u, u_start, u_end = (x.gather(1, at)[:, 0] for x in (centre, start, end))
    t, t_start, t_end = (x.gather(1, 1 - at)[:, 0] for x in (centre, start, end))
    crossing = t_start + (u - u_start) / (u_end - u_start) * (t_end - t_start)
    share = ((crossing - t).abs() - 0.5).to(image.dtype)
    step = share[:, None] * (flat.index_select(0, crossings.near) - flat.index_select(0, crossings.far))
    changed = torch.where(share > 0, crossings.far, crossings.near)
    return flat.index_add(0, changed, step).view(b, height, width, channels).permute(0, 3, 1, 2)


@torch.no_grad()
def find_crossings(
    clip: Float[Tensor, "b v 4"],
    faces: Int[Tensor, "f 3"],
    edges: MeshEdges,
    face_id: Int[Tensor, "b H W"],
    depth: Float[Tensor, "b H W"],
) -> Crossings:
    """Where visible silhouettes pass between neighbouring pixels.

    A silhouette edge has one face turned to the camera and one turned away, or one face only. It is visible in a
    pair of pixels where the pixel on its inner side shows a nearer face than the one beyond, which lies behind the
    edge. `depth` is 0 where no face is seen.
    """
    _, height, width = face_id.shape
    count = clip.shape[1]
    screen, inverse = to_screen(clip.double(), (height, width))
    view, edge, inner = _silhouettes(screen, inverse, faces.long(), edges)
    ends = edges.ends[edge]
    start, end, third = (screen[view, vertex] for vertex in (ends[:, 0], ends[:, 1], inner))
    slope = (end - start).abs()
    along = (slope[:, 1] >= slope[:, 0]).long()  # 1 = rows
    pick = along[:, None]
    u_start, u_end, u_third = (x.gather(1, pick)[:, 0] for x in (start, end, third))
    t_start, t_end, t_third = (x.gather(1, 1 - pick)[:, 0] for x in (start, end, third))
    lines = torch.tensor([width, height], device=clip.device)
    low, high = torch.minimum(u_start, u_end), torch.maximum(u_start, u_end)
    first = (low - 0.5).ceil().clamp(0, max(height, width)).long()
    last = torch.minimum((high - 0.5).ceil().clamp(0, max(height, width)).long(), lines[along])  # exclusive
    repeats = (last - first).clamp_min(0)
    item = torch.repeat_interleave(repeats)
    line = first[item] + torch.arange(len(item), device=clip.device) - (repeats.cumsum(0) - repeats)[item]
    slant = (t_end - t_start) / (u_end - u_start)
    share = ((line + 0.5) - u_start[item]) / (u_end - u_start)[item]
    crossing = t_start[item] + share * (t_end - t_start)[item]
    over_z = torch.lerp(inverse[view, ends[:, 0]][item], inverse[view, ends[:, 1]][item], share)
    before = (crossing - 0.5).floor().clamp(-1, max(height, width)).long()
    surface_before = (t_third < t_start + (u_third - u_start) * slant)[item]
    own = torch.where(surface_before, before, before + 1)
    other = torch.where(surface_before, before + 1, before)
    across = 1 - along[item]
    within = (before >= 0) & (before + 1 < lines[across])
    near, far = (_flat(view[item], line, t, along[item], height, width) for t in (own, other))
    near, far = near * within, far * within
    flat_face, flat_depth = face_id.reshape(-1), depth.reshape(-1).double()
    behind = torch.where(flat_face >= 0, flat_depth, torch.inf)
    visible = (
        within
        & (flat_face[near] >= 0)
        & (flat_face[near] != flat_face[far])
        & (behind[near] < behind[far])
        & (over_z * behind[far] > 1.0)
    ).nonzero()[:, 0]
    reach = (crossing - (own + 0.5)).abs()[visible]
    outermost = visible[_largest(near[visible] * 4 + _side(near, far)[visible], reach)]
    ends = ends[item[outermost]] + (view[item[outermost]] * count)[:, None]
    return Crossings(
        near=near[outermost],
        far=far[outermost],
        start=ends[:, 0],
        end=ends[:, 1],
        along=along[item[outermost]],
    )


def _silhouettes(
    screen: Tensor, inverse: Tensor, faces: Tensor, edges: MeshEdges
) -> tuple[Tensor, Tensor, Tensor]:
    """(view, edge, vertex opposite to the edge in the broader of its faces) of every silhouette edge."""
    points = screen[:, faces]
    ab, ac = points[:, :, 1] - points[:, :, 0], points[:, :, 2] - points[:, :, 0]
    area = ab[..., 0] * ac[..., 1] - ab[..., 1] * ac[..., 0]
    first, second = edges.faces[:, 0], edges.faces[:, 1].clamp_min(0)
    facing = area < 0
    border = edges.faces[:, 1] < 0
    turned = facing[:, first] ^ facing[:, second] ^ ~edges.agree
    ahead = (inverse[:, edges.ends] > 0).all(-1)
    view, edge = ((turned | border) & ahead).nonzero(as_tuple=True)
    broader = (area[view, first[edge]].abs() >= area[view, second[edge]].abs()) | border[edge]
    face = torch.where(broader, first[edge], second[edge])
    return view, edge, faces[face].sum(1) - edges.ends[edge].sum(1)


def _centres(pixel: Int[Tensor, " k"], width: int, height: int) -> Float[Tensor, "k 2"]:
    return torch.stack([pixel % width, pixel // width % height], 1).double() + 0.5


def _flat(view: Tensor, line: Tensor, across: Tensor, along: Tensor, height: int, width: int) -> Tensor:
    row, column = torch.where(along == 1, line, across), torch.where(along == 1, across, line)
    return (view * height + row) * width + column


def _side(near: Tensor, far: Tensor) -> Tensor:
    """0 to 3: where the neighbour lies."""
    step = far - near
    return (step > 0).long() + 2 * (step.abs() == 1).long()


def _largest(group: Int[Tensor, " k"], value: Float[Tensor, " k"]) -> Int[Tensor, " g"]:
    """Index of the largest value of every group; the first of equals."""
    order = value.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    sorted_group = group[order]
    first = torch.ones_like(sorted_group, dtype=torch.bool)
    first[1:] = sorted_group[1:] != sorted_group[:-1]
    return order[first]
