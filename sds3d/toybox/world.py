"""The toybox world: sample toys and views, render them as layers, and colour the layers.

    rng = np.random.default_rng(0)
    toys = [sample_toy(rng, "mug"), sample_toy(rng, "dog")]
    layers = render_layers(toys, sample_views(rng, 2), 64, rng)
    images = compose(layers, main_rgb, second_rgb, background)

All randomness comes from the generators passed in.
"""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sds3d.toybox.kinds import KIND_INDEX, KINDS
from sds3d.toybox.march import Outputs, Tables, render_batch
from sds3d.toybox.shapes import MAX_PRIMITIVES, SLOT_FIXED, SLOT_MAIN, SLOT_SECOND, Builder, Toy
from sds3d.toybox.views import Views, camera_frames, make_views, sample_views, view_word

__all__ = [
    "Layers",
    "Toy",
    "Views",
    "compose",
    "make_views",
    "render_layers",
    "sample_toy",
    "sample_views",
    "view_word",
]

_CHUNK = 8  # images per thread task: small enough to balance, large enough to amortise the call


@dataclass(frozen=True, eq=False)
class Layers:
    """Colour-linear renders of n toys at H = W pixels.

    With colours c1 and c2 and a background, all sRGB in [0, 1], an image is
    ``main * c1 + second * c2 + fixed + (1 - alpha) * background`` after dividing the layers by 255.
    """

    main: NDArray[np.uint8]  # (n, H, W) coverage times shade of main-coloured surfaces
    second: NDArray[np.uint8]  # (n, H, W) likewise for the second colour
    fixed: NDArray[np.uint8]  # (n, H, W, 3) premultiplied shaded sRGB of fixed colours
    alpha: NDArray[np.uint8]  # (n, H, W) coverage
    depth: NDArray[np.float32] | None = None  # (n, H, W) metres along the view axis, 0 = no hit
    normals: NDArray[np.float32] | None = None  # (n, H, W, 3) unit, world frame, 0 = no hit


def sample_toy(rng: np.random.Generator, kind: str) -> Toy:
    """A random instance of a kind (a canonical name from ``KIND_NAMES``)."""
    builder = Builder(rng)
    KINDS[kind].build(builder)
    return builder.finish(kind, KIND_INDEX[kind])


def _sample_lights(rng: np.random.Generator, cameras: NDArray[np.float32]) -> NDArray[np.float32]:
    """Lights (n, 6): unit direction towards the light, then ambient, sky and diffuse weights.

    The light stands above and beside the camera, so the visible side is never in the dark; the
    weights sum to at most 1, so the shade never needs clipping.
    """
    n = cameras.shape[0]
    sideways = rng.uniform(0.15, 0.7, (n, 1)) * rng.choice([-1.0, 1.0], (n, 1))
    upward = rng.uniform(0.5, 1.0, (n, 1))
    direction = -cameras[:, 3] + sideways * cameras[:, 1] + upward * np.array([0.0, 1.0, 0.0])
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    ambient = rng.uniform(0.50, 0.56, (n, 1))
    sky = rng.uniform(0.06, 0.14, (n, 1))
    diffuse = 1.0 - ambient - sky - rng.uniform(0.0, 0.05, (n, 1))
    return np.concatenate([direction, ambient, sky, diffuse], axis=1).astype(np.float32)


def _pack(toys: Sequence[Toy]) -> tuple[NDArray[np.int64], Tables]:
    """Primitive counts (n,) and the renderer's tables, padded to (n, MAX_PRIMITIVES, ...)."""
    n, most = len(toys), MAX_PRIMITIVES
    tables = Tables(
        code=np.zeros((n, most, 2), np.int32),
        solid=np.zeros((n, most, 8), np.float32),
        pose=np.zeros((n, most, 3, 3), np.float32),
        center=np.zeros((n, most, 3), np.float32),
        paint=np.zeros((n, most, 5), np.float32),
    )
    counts = np.zeros(n, np.int64)
    for row, toy in enumerate(toys):
        p = counts[row] = toy.shape.shape[0]
        tables.code[row, :p, 0] = toy.shape
        tables.code[row, :p, 1] = toy.cut
        tables.solid[row, :p, :5] = toy.params
        tables.solid[row, :p, 5:] = toy.extent
        tables.pose[row, :p] = toy.rotation
        tables.center[row, :p] = toy.center
        tables.paint[row, :p, 0] = np.where(toy.slot == SLOT_MAIN, toy.tint[:, 0], 0.0)
        tables.paint[row, :p, 1] = np.where(toy.slot == SLOT_SECOND, toy.tint[:, 0], 0.0)
        tables.paint[row, :p, 2:] = np.where((toy.slot == SLOT_FIXED)[:, None], toy.tint, 0.0)
    return counts, tables


def render_layers(
    toys: Sequence[Toy],
    views: Views,
    size_px: int,
    rng: np.random.Generator,
    threads: int = 1,
    with_geometry: bool = False,
) -> Layers:
    """Render toy i from view i as (n, size_px, size_px) layers.

    ``rng`` draws the lighting only; the result does not depend on ``threads``. Colour layers are
    anti-aliased; depth and normals, computed on request, belong to the pixel-centre rays.
    """
    n = len(toys)
    if n != len(views):
        raise ValueError(f"{n} toys but {len(views)} views")
    if n == 0:
        raise ValueError("nothing to render")
    cameras = camera_frames(views)
    counts, packed = _pack(toys)
    tan_half_fov = np.tan(np.radians(views.fov_deg) / 2.0).astype(np.float32)
    lights = _sample_lights(rng, cameras)
    side = (n, size_px, size_px)
    geometry = side if with_geometry else (n, 0, 0)
    out = Outputs(
        main=np.zeros(side, np.uint8),
        second=np.zeros(side, np.uint8),
        fixed=np.zeros((*side, 3), np.uint8),
        alpha=np.zeros(side, np.uint8),
        depth=np.zeros(geometry, np.float32),
        normals=np.zeros((*geometry, 3), np.float32),
    )

    def render(start: int) -> None:
        part = slice(start, start + _CHUNK)
        render_batch(
            counts[part],
            Tables._make(array[part] for array in packed),
            cameras[part],
            tan_half_fov[part],
            lights[part],
            Outputs._make(array[part] for array in out),
        )

    starts = range(0, n, _CHUNK)
    if threads <= 1:
        for start in starts:
            render(start)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(render, starts))
    if not with_geometry:
        return Layers(out.main, out.second, out.fixed, out.alpha)
    return Layers(*out)


def compose(
    layers: Layers,
    main_rgb: NDArray[np.floating],
    second_rgb: NDArray[np.floating],
    background: NDArray[np.floating],
) -> NDArray[np.float32]:
    """Images (n, H, W, 3) in [0, 1] from layers and sRGB colours (n, 3) in [0, 1]."""

    def paint(layer: NDArray[np.float32], rgb: NDArray[np.floating]) -> NDArray[np.float32]:
        return layer[..., None] * np.asarray(rgb, np.float32)[:, None, None, :]

    unit = np.float32(1.0 / 255.0)
    image = layers.fixed * unit
    image += paint(layers.main * unit, main_rgb)
    image += paint(layers.second * unit, second_rgb)
    image += paint(1.0 - layers.alpha * unit, background)
    # Only the rounding of the uint8 layers can exceed 1, by a grey level or so.
    return np.minimum(image, 1.0, out=image)


def main(argv: Sequence[str] | None = None) -> int:
    """Write a contact sheet of all kinds as a PNG."""
    parser = argparse.ArgumentParser(description="Render a contact sheet of the toybox kinds.")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), help="kinds to show")
    args = parser.parse_args(argv)
    from sds3d.toybox.sheet import contact_sheet

    contact_sheet(args.kinds, np.random.default_rng(args.seed)).save(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
