"""From a raw iso-surface to a closed, smooth, light mesh.

    drop_specks -> fill_holes -> orient_outward -> smooth -> decimate

Every step takes and returns a `Surface`. A raw surface from a density field is expected to agree in winding
within each piece, as marching cubes makes it; no step repairs a Moebius strip.
"""

from dataclasses import dataclass

import fast_simplification
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import csgraph

from sds3d.errors import ConfigError, NoSurfaceError
from sds3d.interfaces import Surface
from sds3d.mesh.checks import check_mesh
from sds3d.mesh.weld import same_places

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

MAX_EAR_EDGES = 300  # longer hole borders are closed by a fan at once: ear clipping takes quadratic time
# Settings of fast_simplification, tried in turn until the result is still closed: larger is faster and rougher.
AGGRESSIVENESS = (5.0, 7.0, 4.0)
UNTIE_ROUNDS = 6  # more than one, because a patch may tie a new knot


@dataclass(frozen=True, kw_only=True)
class MeshStats:
    """The manifold report of a surface."""

    vertices: int
    faces: int
    watertight: bool  # every edge joins exactly two faces that agree in winding
    border_edges: int  # edges with one face
    knotted_edges: int  # edges with three or more faces, or two that disagree in winding
    components: int
    euler: int  # vertices - edges + faces: 2 per sphere, 0 per torus (a mug with one handle is a torus)
    area: float  # square metres
    volume: float  # cubic metres, signed: positive if faces look outwards; means little unless watertight
    low: tuple[float, float, float]  # bounding box in metres
    high: tuple[float, float, float]


def measure(surface: Surface) -> MeshStats:
    """Count, weigh and check a surface."""
    vertices, faces = to_arrays(surface)
    used = np.unique(faces)
    edges = _Edges.of(faces)
    if len(used):
        low, high = vertices[used].min(0), vertices[used].max(0)
    else:
        low = high = np.zeros(3)
    return MeshStats(
        vertices=len(vertices),
        faces=len(faces),
        watertight=bool(len(faces)) and not edges.border.any() and not edges.knotted.any(),
        border_edges=int(edges.border.sum()),
        knotted_edges=int(edges.knotted.sum()),
        components=len(np.unique(_component_of(faces, len(vertices))[faces[:, 0]])) if len(faces) else 0,
        euler=len(used) - len(edges.border) + len(faces),
        area=float(_areas(vertices, faces).sum()),
        volume=float(_volumes(vertices, faces).sum()),
        low=(float(low[0]), float(low[1]), float(low[2])),
        high=(float(high[0]), float(high[1]), float(high[2])),
    )


def tidy(surface: Surface) -> Surface:
    """Weld vertices at the same place; remove faces with a repeated corner, faces given twice, unused vertices.

    Two faces on the same corners that look opposite ways are a folded sheet: both go, which leaves no crack. Faces
    whose corners lie on one line stay, because without them there would be one.
    """
    vertices, faces = to_arrays(surface)
    if len(faces) == 0:
        return to_surface(vertices[:0], faces)
    first, group = same_places(vertices)
    vertices, faces = vertices[first], group[faces]
    distinct = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])
    faces = faces[distinct]
    return _without_unused(vertices, _cancel_twins(faces))


def drop_specks(surface: Surface, min_frac: float) -> Surface:
    """Drop pieces smaller in area than `min_frac` of the largest, and cavities.

    A cavity is a closed piece that encloses emptiness: its volume has the other sign than that of the largest
    piece. Density fields are often hollow inside; nobody sees it, it costs faces and texture.
    """
    vertices, faces = to_arrays(surface)
    if len(faces) == 0:
        return surface
    piece = _component_of(faces, len(vertices))[faces[:, 0]]
    _, piece = np.unique(piece, return_inverse=True)
    area = np.bincount(piece, _areas(vertices, faces))
    volume = np.bincount(piece, _volumes(vertices, faces))
    edges = _Edges.of(faces)
    open_pieces = np.unique(piece[edges.first_face[edges.border]])
    closed = ~np.isin(np.arange(len(area)), open_pieces)
    largest = int(area.argmax())
    keep = (area >= min_frac * area[largest]) & ~(closed & closed[largest] & (volume * volume[largest] < 0))
    return _without_unused(vertices, faces[keep[piece]])


def orient_outward(surface: Surface) -> Surface:
    """Reverse all faces if the enclosed volume is negative."""
    vertices, faces = to_arrays(surface)
    if _volumes(vertices, faces).sum() < 0:
        faces = faces[:, ::-1]
    return to_surface(vertices, faces)


def fill_holes(surface: Surface) -> Surface:
    """Close every border loop: by clipping ears where that makes a clean patch, else by a fan round its centre."""
    vertices, faces = to_arrays(surface)
    edges = _Edges.of(faces)
    if not edges.border.any():
        return surface
    taken = {(int(a), int(b)) for a, b in edges.ends}
    patches: list[tuple[int, int, int]] = []
    centres: list[Floats] = []
    for loop in _border_loops(edges):
        triangles, rest = _clip_ears(vertices, loop, taken)
        patches += triangles
        if rest:
            hub = len(vertices) + len(centres)
            centres.append(vertices[rest].mean(0))
            patches += [(rest[i], rest[(i + 1) % len(rest)], hub) for i in range(len(rest))]
    closed = np.concatenate(
        [faces, np.array(patches, np.int64).reshape(-1, 3)]
    )  # knotted borders form no loop
    return to_surface(np.concatenate([vertices, *[c[None] for c in centres]]), closed)


def smooth(surface: Surface, rounds: int, *, shrink: float = 0.5, grow: float = -0.53) -> Surface:
    """Taubin smoothing: each round moves vertices towards their neighbours' mean, then a little more back.

    v += shrink * L v; v += grow * L v, with L the umbrella operator. Takes off marching-cubes staircases (about 5
    rounds) and keeps the volume to about a percent, unlike plain Laplacian smoothing.
    Source: Taubin, A signal processing approach to fair surface design, SIGGRAPH 1995.
    """
    vertices, faces = to_arrays(surface)
    if rounds <= 0 or len(faces) == 0:
        return surface
    ends = _Edges.of(faces).ends
    ends = np.concatenate([ends, ends[:, ::-1]])
    adjacency = sparse.csr_matrix((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(len(vertices),) * 2)
    degree = np.maximum(np.asarray(adjacency.sum(1)).reshape(-1, 1), 1.0)
    for _ in range(rounds):
        for step in (shrink, grow):
            vertices = vertices + step * (adjacency @ vertices / degree - vertices)
    return to_surface(vertices, faces)


def decimate(surface: Surface, max_faces: int) -> Surface:
    """About `max_faces` faces by quadric edge collapses; a closed surface stays closed and outward.

    A collapse may pinch a thin wall, so that an edge has four faces; such knots are cut out and patched (`untie`).
    Should that fail at every setting, the first result is returned: the budget holds, and `measure` tells the rest.
    """
    if max_faces < 4:
        raise ConfigError(f"decimate: {max_faces} faces asked for; a closed surface has at least 4")
    vertices, faces = to_arrays(surface)
    if len(faces) <= max_faces:
        return surface
    was_closed = measure(surface).watertight
    unit, shift = _unit_of(vertices)
    results = []
    for aggressiveness in AGGRESSIVENESS:
        points, triangles = fast_simplification.simplify(
            (vertices - shift) / unit, faces.astype(np.int32), target_count=max_faces, agg=aggressiveness
        )
        points = points.astype(np.float64) * unit + shift
        smaller = tidy(to_surface(points, triangles.astype(np.int64)))
        results.append(orient_outward(untie(smaller) if was_closed else smaller))
        enough = len(results[-1].faces) <= max_faces * 1.02
        if enough and (not was_closed or measure(results[-1]).watertight):
            return results[-1]
    return results[0]


def _unit_of(vertices: Floats) -> tuple[float, Floats]:
    """(unit, shift) that bring vertices to a size of about 1 near the origin: the errors of collapses are absolute.

    The unit is a power of two and the shift zero unless the object lies beside the origin, so that nothing is rounded
    without need.
    """
    low, high = vertices.min(0), vertices.max(0)
    middle, reach = (low + high) / 2.0, float((high - low).max()) / 2.0
    if reach == 0.0:
        return 1.0, np.zeros(3)
    beside = float(np.abs(middle).max()) > reach
    return 2.0 ** float(np.ceil(np.log2(reach))), middle if beside else np.zeros(3)


def untie(surface: Surface) -> Surface:
    """Cut out the faces at knotted edges and close the holes, until every edge has two faces (or rounds run out)."""
    for _ in range(UNTIE_ROUNDS):
        vertices, faces = to_arrays(surface)
        edges = _Edges.of(faces)
        if not (edges.knotted.any() or edges.border.any()):
            break
        at_knot = edges.knotted[edges.of_face].any(axis=1)
        surface = tidy(fill_holes(_without_unused(vertices, faces[~at_knot])))
    return surface


def clean(
    surface: Surface, *, max_faces: int | None = None, min_frac: float = 0.02, smooth_rounds: int = 5
) -> Surface:
    """The whole way from a raw iso-surface to the mesh that is unwrapped, or to that before it is decimated (None).

    Raises NoSurfaceError if nothing is left, ExportError if vertices are not finite.
    """
    if len(surface.faces):
        check_mesh(surface.vertices, surface.faces, "clean: the scene's surface")
    surface = drop_specks(tidy(surface), min_frac)
    surface = orient_outward(fill_holes(surface))
    if len(surface.faces) == 0:
        raise NoSurfaceError("clean: the scene's surface has no faces; the scene is empty at its iso value")
    fine = smooth(surface, smooth_rounds)
    return fine if max_faces is None else decimate(fine, max_faces)


def vertex_normals(surface: Surface) -> torch.Tensor:
    """Unit normals (v, 3) float32: faces' normals weighted by their angle at the vertex, +y where there is none."""
    vertices, faces = to_arrays(surface)
    corners = vertices[faces]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-300)
    total = np.zeros_like(vertices)
    for corner in range(3):
        ahead = _unit(corners[:, (corner + 1) % 3] - corners[:, corner])
        behind = _unit(corners[:, (corner + 2) % 3] - corners[:, corner])
        angle = np.arccos(np.clip((ahead * behind).sum(1), -1.0, 1.0))
        for axis in range(3):
            total[:, axis] += np.bincount(faces[:, corner], angle * normal[:, axis], minlength=len(vertices))
    length = np.linalg.norm(total, axis=1, keepdims=True)
    unit = np.where(length > 1e-12, total / np.maximum(length, 1e-12), np.array([0.0, 1.0, 0.0]))
    return torch.from_numpy(unit.astype(np.float32))


def to_arrays(surface: Surface) -> tuple[Floats, Ints]:
    """Vertices (v, 3) float64 and faces (f, 3) int64 of a surface."""
    vertices = surface.vertices.detach().cpu().double().numpy()
    return vertices, surface.faces.detach().cpu().numpy().astype(np.int64)


def to_surface(vertices: Floats, faces: Ints) -> Surface:
    """A float32 surface of arrays."""
    return Surface(
        vertices=torch.from_numpy(np.ascontiguousarray(vertices, dtype=np.float32)),
        faces=torch.from_numpy(np.ascontiguousarray(faces, dtype=np.int64)),
    )


@dataclass(frozen=True)
class _Edges:
    """The undirected edges of a mesh."""

    ends: Ints  # (e, 2), lower vertex first
    first_face: Ints  # (e,) the first face at the edge
    border: NDArray[np.bool_]  # (e,) one face only
    knotted: NDArray[np.bool_]  # (e,) more than two faces, or two that disagree in winding
    directed: Ints  # (border edges, 2) border edges in the direction of their face
    of_face: Ints  # (f, 3) edge numbers of each face

    @classmethod
    def of(cls, faces: Ints) -> "_Edges":
        directed = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
        face = np.tile(np.arange(len(faces)), 3)
        base = int(faces.max(initial=0)) + 1
        keys = directed.min(1) * base + directed.max(1)
        key, first, group = np.unique(keys, return_index=True, return_inverse=True)
        ends = np.stack([key // base, key % base], axis=1)
        count = np.bincount(group, minlength=len(ends))
        forward = np.bincount(group, directed[:, 0] < directed[:, 1], minlength=len(ends))
        border = count == 1
        knotted = (count > 2) | ((count == 2) & (forward != 1))
        of_face = group.reshape(3, len(faces)).T
        return cls(ends, face[first], border, knotted, directed[first[border]], of_face)


def _cancel_twins(faces: Ints) -> Ints:
    """Each set of corners once: in the majority's winding, or not at all if the windings balance."""
    spun = np.take_along_axis(faces, (faces.argmin(1)[:, None] + np.arange(3)) % 3, axis=1)
    winding = np.where(spun[:, 1] < spun[:, 2], 1, -1)
    _, first, group = np.unique(np.sort(faces, axis=1), axis=0, return_index=True, return_inverse=True)
    balance = np.bincount(group.reshape(-1), winding, minlength=len(first))
    kept, sense = first[balance != 0], balance[balance != 0]
    flip = np.sign(sense) != winding[kept]
    faces = np.where(flip[:, None], faces[kept][:, ::-1], faces[kept])
    return faces[np.argsort(kept)]


def _component_of(faces: Ints, vertex_count: int) -> Ints:
    """A piece number for every vertex."""
    ends = np.concatenate([faces[:, :2], faces[:, 1:]])
    links = sparse.coo_matrix(
        (np.ones(len(ends), np.int8), (ends[:, 0], ends[:, 1])), shape=(vertex_count,) * 2
    )
    return csgraph.connected_components(links, directed=False)[1].astype(np.int64)


def _areas(vertices: Floats, faces: Ints) -> Floats:
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    return 0.5 * np.linalg.norm(np.cross(b - a, c - a), axis=1)


def _volumes(vertices: Floats, faces: Ints) -> Floats:
    """Signed volumes of the tetrahedra from the vertices' mean to each face."""
    if len(faces) == 0:
        return np.zeros(0)
    a, b, c = (vertices[faces[:, i]] - vertices.mean(0) for i in range(3))
    return (a * np.cross(b, c)).sum(1) / 6.0


def _without_unused(vertices: Floats, faces: Ints) -> Surface:
    used, compact = np.unique(faces, return_inverse=True)
    return to_surface(vertices[used], compact.reshape(faces.shape).astype(np.int64))


def _border_loops(edges: _Edges) -> list[list[int]]:
    """Border edges chained to loops, each in the direction that closes the hole (against its faces)."""
    onward: dict[int, list[int]] = {}
    for start, end in edges.directed[:, ::-1].tolist():
        onward.setdefault(start, []).append(end)
    loops = []
    while onward:
        path = [next(iter(onward))]
        while path[-1] in onward:
            ends = onward[path[-1]]
            following = ends.pop()
            if not ends:
                del onward[path[-1]]
            if following in path:
                # A border that touches itself: what lies between is a loop of its own.
                at = path.index(following)
                loops.append(path[at:])
                del path[at + 1 :]
            else:
                path.append(following)
    return [loop for loop in loops if len(loop) >= 3]


def _clip_ears(
    vertices: Floats, loop: list[int], taken: set[tuple[int, int]]
) -> tuple[list[tuple[int, int, int]], list[int]]:
    """Triangles that close a loop without new vertices, and the rest of the loop that has no valid ear left.

    An ear is a convex corner (seen along the loop's mean normal) that holds no other corner of the loop and whose
    new edge is not in the mesh yet (`taken`, extended here): an edge with three faces would be worse than a hub.
    """
    if len(loop) > MAX_EAR_EDGES:
        return [], loop
    flat = _flatten(vertices[loop])
    left = list(range(len(loop)))
    triangles: list[tuple[int, int, int]] = []
    while len(left) > 3:
        ear = next((i for i in range(len(left)) if _is_ear(flat, loop, left, i, taken)), None)
        if ear is None:
            return triangles, [loop[i] for i in left]
        before, tip, after = (left[(ear + step) % len(left)] for step in (-1, 0, 1))
        triangles.append((loop[before], loop[tip], loop[after]))
        taken.add((min(loop[before], loop[after]), max(loop[before], loop[after])))
        del left[ear]
        left = left[ear:] + left[:ear]  # go on beside the ear: even patches instead of slivers
    return [*triangles, (loop[left[0]], loop[left[1]], loop[left[2]])], []


def _is_ear(flat: Floats, loop: list[int], left: list[int], i: int, taken: set[tuple[int, int]]) -> bool:
    before, tip, after = left[i - 1], left[i], left[(i + 1) % len(left)]
    first, second = sorted((loop[before], loop[after]))
    if (first, second) in taken:
        return False
    a, b, c = flat[before], flat[tip], flat[after]
    if _turn(a, b, c) <= 0:
        return False
    others = flat[[j for j in left if j not in (before, tip, after)]]
    inside = (_turn(a, b, others) >= 0) & (_turn(b, c, others) >= 0) & (_turn(c, a, others) >= 0)
    return not inside.any()


def _turn(a: Floats, b: Floats, c: Floats) -> Floats | np.floating:
    """Twice the signed area of (a, b, c); positive if counter-clockwise."""
    return (b[..., 0] - a[..., 0]) * (c[..., 1] - a[..., 1]) - (b[..., 1] - a[..., 1]) * (
        c[..., 0] - a[..., 0]
    )


def _flatten(points: Floats) -> Floats:
    """Coordinates (n, 2) of a loop in its mean plane, counter-clockwise (Newell's normal)."""
    normal = _unit(np.cross(points, np.roll(points, -1, 0)).sum(0)[None])[0]
    helper = np.eye(3)[np.abs(normal).argmin()]
    across = _unit(np.cross(helper, normal)[None])[0]
    return np.stack([points @ across, points @ np.cross(normal, across)], axis=1)


def _unit(vectors: Floats) -> Floats:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-300)
