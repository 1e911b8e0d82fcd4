"""Which vertices of a mesh lie at one and the same place."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]


def same_places(vertices: Floats) -> tuple[Ints, Ints]:
    """(first, group) of points (v, 3): the first vertex of every distinct place, in order, and the place of each."""
    if len(vertices) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    order = np.lexsort(vertices.T)  # stable: the first of equal ones comes first
    new = np.ones(len(order), dtype=bool)
    new[1:] = (vertices[order[1:]] != vertices[order[:-1]]).any(axis=1)
    group = np.zeros(len(order), np.int64)
    group[order] = new.cumsum() - 1
    first = order[new]
    appearance = np.argsort(first, kind="stable")
    rank = np.zeros(len(appearance), np.int64)
    rank[appearance] = np.arange(len(appearance))
    return first[appearance], rank[group]
