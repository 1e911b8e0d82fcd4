"""A pool of rendered layers on disk, made once and recoloured anew at every use.

Rendering is the costly part of the world and colouring is linear (see `world.compose`), so training reads shapes
from this pool and paints them with fresh colours each time. The pool is a pure function of its seed and size.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sds3d.rng import derive_seed
from sds3d.toybox.kinds import KIND_NAMES
from sds3d.toybox.world import render_layers, sample_toy, sample_views

CHUNK = 1024
LAYER_CHANNELS = 6  # main, second, fixed r g b, alpha
META_FIELDS = 4  # kind index, azimuth_deg, elevation_deg, radius


@dataclass(frozen=True)
class Pool:
    """`layers` (n, px, px, 6) uint8 and `meta` (n, 4) float32, both memory-mapped."""

    layers: NDArray[np.uint8]
    meta: NDArray[np.float32]

    def __len__(self) -> int:
        return self.meta.shape[0]


def _render_chunk(
    seed: int, chunk: int, image_px: int, threads: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    rng = np.random.Generator(np.random.PCG64(derive_seed(seed, "pool", chunk)))
    kinds = rng.permutation(np.arange(CHUNK) % len(KIND_NAMES))
    toys = [sample_toy(rng, KIND_NAMES[kind]) for kind in kinds]
    views = sample_views(rng, CHUNK)
    layers = render_layers(toys, views, image_px, rng, threads=threads)
    stacked = np.concatenate(
        [layers.main[..., None], layers.second[..., None], layers.fixed, layers.alpha[..., None]], axis=-1
    )
    meta = np.stack([kinds, views.azimuth_deg, views.elevation_deg, views.radius], axis=1).astype(np.float32)
    return stacked, meta


def open_pool(folder: Path, images: int, image_px: int, seed: int, threads: int = 1) -> Pool:
    """The pool in `folder`, rendered as far as needed; an interrupted rendering goes on where it stopped.

    `images` is rounded up to whole chunks of 1024. A folder that holds a pool of another seed or size is refused.
    """
    chunks = -(-images // CHUNK)
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / "pool.json"
    header = {"seed": seed, "image_px": image_px, "chunks": chunks}
    state = json.loads(stamp.read_text()) if stamp.exists() else {**header, "done": 0}
    if {key: state[key] for key in header} != header:
        raise ValueError(f"{folder} holds another pool ({state}); asked for {header}: give another folder")
    count = chunks * CHUNK
    mode = "r+" if (folder / "layers.npy").exists() else "w+"
    layers = np.lib.format.open_memmap(
        folder / "layers.npy", mode, np.uint8, (count, image_px, image_px, LAYER_CHANNELS)
    )
    meta = np.lib.format.open_memmap(folder / "meta.npy", mode, np.float32, (count, META_FIELDS))
    for chunk in range(state["done"], chunks):
        part = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        layers[part], meta[part] = _render_chunk(seed, chunk, image_px, threads)
        stamp.write_text(json.dumps({**header, "done": chunk + 1}))
    return Pool(layers, meta)
