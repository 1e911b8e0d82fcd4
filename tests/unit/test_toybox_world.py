"""What must always hold for the toybox world: geometry, layers, colours and captions."""

import json

import numpy as np
import pytest

from sds3d.toybox.captions import (
    CANONICAL_FRACTION,
    VOCABULARY,
    caption,
    short_caption,
    split_words,
)
from sds3d.toybox.colors import COLOR_NAMES, COLOR_SYNONYMS, COLORS, JITTER, canonical_color, sample_rgb
from sds3d.toybox.held_out import choose_held_out, held_out_pairs, sample_colors
from sds3d.toybox.kinds import KIND_NAMES, KINDS, canonical_kind
from sds3d.toybox.paths import asset_path
from sds3d.toybox.shapes import MAIN, MAX_PRIMITIVES, TARGET_RADIUS, Builder, Toy
from sds3d.toybox.sheet import contact_sheet
from sds3d.toybox.views import VIEW_WORDS, camera_frames, make_views, sample_views, view_word
from sds3d.toybox.world import Layers, compose, render_layers, sample_toy

SIZE = 32
AROUND = np.arange(8) * 45.0


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def sphere_toy(shrink: float = 1.0) -> Toy:
    builder = Builder(generator())
    builder.ball((0.3, -0.2, 0.1), shrink, MAIN)
    return builder.finish("ball", 0)


@pytest.fixture(scope="module")
def zoo() -> Layers:
    """Every kind once, from eight azimuths, with geometry."""
    rng = generator(5)
    toys = [toy for kind in KIND_NAMES for toy in [sample_toy(rng, kind)] * len(AROUND)]
    views = make_views(np.tile(AROUND, len(KIND_NAMES)), 15.0)
    return render_layers(toys, views, SIZE, rng, with_geometry=True)


def test_there_are_twenty_kinds_and_twelve_colors() -> None:
    assert len(KIND_NAMES) == 20
    assert len(COLOR_NAMES) == 12
    assert all(
        canonical_kind(word) == kind.name for kind in KINDS.values() for word in (kind.name, *kind.synonyms)
    )
    assert all(canonical_color(word) == name for word, name in COLOR_SYNONYMS.items())


def test_same_seed_same_layers_whatever_the_threads() -> None:
    def render(threads: int) -> Layers:
        rng = generator(7)
        toys = [sample_toy(rng, KIND_NAMES[i % 20]) for i in range(24)]
        return render_layers(toys, sample_views(rng, 24), SIZE, rng, threads=threads)

    first, again, threaded = render(1), render(1), render(3)
    for name in ("main", "second", "fixed", "alpha"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
        np.testing.assert_array_equal(getattr(first, name), getattr(threaded, name))


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_toys_fit_their_bounding_sphere(kind: str) -> None:
    for seed in range(3):
        toy = sample_toy(generator(seed), kind)
        assert TARGET_RADIUS[0] <= toy.radius <= TARGET_RADIUS[1]
        assert toy.shape.shape[0] <= MAX_PRIMITIVES


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_silhouettes_keep_a_margin_from_the_nearest_camera(kind: str) -> None:
    rng = generator(1)
    toys = [sample_toy(rng, kind) for _ in range(16)]
    views = make_views(np.linspace(0.0, 337.5, 16), np.tile([-10.0, 20.0, 45.0, 80.0], 4), radius=3.1)
    alpha = render_layers(toys, views, 64, rng).alpha
    border = np.ones((64, 64), bool)
    border[1:-1, 1:-1] = False
    assert not alpha[:, border].any()
    assert (alpha.reshape(16, -1) > 0).mean(axis=1).min() > 0.05


def test_hits_stay_inside_the_toy_radius(zoo: Layers) -> None:
    views = make_views(np.tile(AROUND, len(KIND_NAMES)), 15.0)
    directions, eyes = pixel_rays(views, SIZE)
    assert zoo.depth is not None
    points = eyes + directions * zoo.depth[..., None]
    reach = np.linalg.norm(points, axis=-1)[zoo.depth > 0]
    assert reach.max() < TARGET_RADIUS[1] + 0.02


def pixel_rays(views, size: int):
    """World rays (n, H, W, 3) of unit depth along the view axis, and eyes (n, 1, 1, 3)."""
    frames = camera_frames(views).astype(np.float64)
    grid = (np.arange(size) + 0.5) / size * 2.0 - 1.0
    half = np.tan(np.radians(views.fov_deg) / 2.0)[:, None, None, None]
    u, v = grid[None, None, :, None] * half, -grid[None, :, None, None] * half
    eye, right, up, forward = (frames[:, k][:, None, None, :] for k in range(4))
    return forward + u * right + v * up, eye


def test_normals_are_unit_and_face_the_camera(zoo: Layers) -> None:
    assert zoo.normals is not None
    assert zoo.depth is not None
    hit = zoo.depth > 0
    normals = zoo.normals[hit]
    np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1.0, atol=1e-4)
    directions, _ = pixel_rays(make_views(np.tile(AROUND, len(KIND_NAMES)), 15.0), SIZE)
    assert (np.sum(normals * directions[hit], axis=-1) < 0.0).all()
    assert not zoo.normals[~hit].any()


def test_sphere_depth_and_normals_match_the_closed_form() -> None:
    toy = sphere_toy()
    views = make_views([0.0, 77.0, 200.0], [0.0, 30.0, -10.0])
    layers = render_layers([toy] * 3, views, 64, generator(), with_geometry=True)
    directions, eyes = pixel_rays(views, 64)
    a = np.sum(directions**2, axis=-1)
    b = np.sum(directions * eyes, axis=-1)
    root = b**2 - a * (np.sum(eyes**2, axis=-1) - toy.radius**2)
    depth = np.where(root > 0.0, (-b - np.sqrt(np.maximum(root, 0.0))) / a, 0.0)
    clear = np.abs(root) > 0.02  # away from the silhouette, where hit or miss is not in doubt
    np.testing.assert_allclose(layers.depth[clear], depth[clear], atol=2e-4)
    inside = clear & (root > 0.0)
    points = (eyes + directions * depth[..., None])[inside] / toy.radius
    assert np.sum(points * layers.normals[inside], axis=-1).min() > 0.9999


def test_sphere_coverage_matches_the_disc_area() -> None:
    views = make_views(0.0, 0.0, radius=3.3)
    toy = sphere_toy()
    layers = render_layers([toy], views, 64, generator())
    tangent = np.tan(np.arcsin(toy.radius / 3.3)) / np.tan(np.radians(20.0))
    assert layers.alpha.mean() / 255.0 == pytest.approx(np.pi / 4.0 * tangent**2, rel=0.01)


def test_scaling_the_parts_does_not_change_the_toy() -> None:
    np.testing.assert_allclose(sphere_toy(1.0).params, sphere_toy(0.2).params, rtol=1e-6)


def test_layers_never_exceed_coverage(zoo: Layers) -> None:
    brightest = zoo.main.astype(int) + zoo.second + zoo.fixed.max(axis=-1)
    assert (brightest <= zoo.alpha.astype(int) + 2).all()


def test_shade_is_never_dark() -> None:
    rng = generator(2)
    toys = [sphere_toy()] * 64
    layers = render_layers(toys, sample_views(rng, 64), SIZE, rng)
    full = layers.alpha == 255
    assert layers.main[full].min() >= 0.45 * 255
    assert layers.main[full].max() > 0.9 * 255


def test_compose_is_linear_in_the_colors(zoo: Layers) -> None:
    n = zoo.main.shape[0]
    rng = generator(3)
    c1, c2, bg = (rng.uniform(0.0, 0.8, (n, 3)).astype(np.float32) for _ in range(3))
    zero = np.zeros((n, 3), np.float32)
    base = compose(zoo, zero, zero, zero)
    parts = [compose(zoo, c1, zero, zero), compose(zoo, zero, c2, zero), compose(zoo, zero, zero, bg)]
    total = base + sum(part - base for part in parts)
    np.testing.assert_allclose(compose(zoo, c1, c2, bg), total, atol=1e-5)
    np.testing.assert_allclose(base, zoo.fixed / 255.0, atol=1e-6)


def test_compose_stays_in_range_and_shows_the_background(zoo: Layers) -> None:
    n = zoo.main.shape[0]
    white = np.ones((n, 3), np.float32)
    image = compose(zoo, white, white, white)
    assert image.dtype == np.float32
    assert image.min() >= 0.0
    assert image.max() <= 1.0
    np.testing.assert_array_equal(image[zoo.alpha == 0], 1.0)


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_main_color_dominates_from_every_azimuth(kind: str) -> None:
    rng = generator(11)
    toys = [toy for _ in range(3) for toy in [sample_toy(rng, kind)] * 8]
    layers = render_layers(toys, make_views(np.tile(AROUND, 3), 15.0), 48, rng)
    main, second = (layer.sum(axis=(1, 2), dtype=int) for layer in (layers.main, layers.second))
    assert (main > second).all()
    assert (main > layers.fixed.max(axis=-1).sum(axis=(1, 2), dtype=int)).all()


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_two_instances_differ(kind: str) -> None:
    toys = [sample_toy(generator(seed), kind) for seed in range(2)]
    layers = render_layers(toys, make_views([30.0, 30.0], 20.0), SIZE, generator())
    assert np.abs(layers.alpha[0].astype(int) - layers.alpha[1]).max() > 60


def test_azimuth_zero_sees_the_front() -> None:
    toy = sample_toy(generator(), "snowman")
    fixed = render_layers([toy] * 2, make_views([0.0, 180.0], 0.0), 64, generator()).fixed.astype(int)
    carrot = (fixed[..., 0] > 100) & (fixed[..., 0] > 2 * fixed[..., 2]) & (fixed[..., 1] > 40)
    assert carrot[0].sum() >= 4
    assert carrot[1].sum() == 0


def test_azimuth_ninety_looks_from_plus_x() -> None:
    toy = sample_toy(generator(), "mug")  # its handle is at +x
    layers = render_layers([toy] * 3, make_views([0.0, 90.0, 270.0], 0.0), 64, generator())
    front, facing, hidden = layers.second.astype(int)
    columns = np.flatnonzero(front.any(axis=0))
    assert columns.min() > 32  # to the right of the image centre, seen from the front
    assert facing.any()
    assert not hidden.any()


def test_overhead_camera_sees_the_top() -> None:
    layers = render_layers([sphere_toy()], make_views(0.0, 90.0), SIZE, generator(), with_geometry=True)
    np.testing.assert_allclose(layers.normals[0, SIZE // 2, SIZE // 2], [0.0, 1.0, 0.0], atol=0.05)


@pytest.mark.parametrize(
    ("azimuth", "elevation", "word"),
    [
        (0, 15, "front view"),
        (44, 0, "front view"),
        (-44, 0, "front view"),
        (330, 50, "front view"),
        (90, 0, "side view"),
        (-90, 0, "side view"),
        (135, 0, "side view"),
        (136, 0, "back view"),
        (540, 10, "back view"),
        (0, 51, "overhead view"),
    ],
)
def test_view_words(azimuth: float, elevation: float, word: str) -> None:
    assert view_word(azimuth, elevation) == word


def test_sampled_views_cover_their_ranges() -> None:
    views = sample_views(generator(), 4000)
    assert (views.elevation_deg > 50.0).mean() == pytest.approx(0.15, abs=0.03)
    assert views.elevation_deg.min() >= -10.0
    assert views.elevation_deg.max() <= 80.0
    assert ((views.radius >= 3.1) & (views.radius <= 3.5)).all()
    assert set(views.words()) == set(VIEW_WORDS)


def test_held_out_pairs_are_the_stored_choice() -> None:
    stored = json.loads(asset_path("held_out.json").read_text(encoding="utf-8"))
    assert [tuple(pair) for pair in stored] == choose_held_out()
    assert len(stored) >= 0.1 * len(KIND_NAMES) * len(COLOR_NAMES)
    pairs = held_out_pairs()
    assert {("purple", "mug"), ("blue", "mushroom"), ("pink", "car"), ("cyan", "duck")} <= pairs
    assert ("red", "mug") not in pairs
    for kind in KIND_NAMES:
        assert 1 <= sum(kind == other for _, other in pairs) <= 2
    for color in COLOR_NAMES:
        assert 2 <= sum(color == other for other, _ in pairs) <= 3


def test_held_out_pairs_are_never_sampled() -> None:
    rng = generator()
    named = 0
    for index in range(20_000):
        kind = KIND_NAMES[index % 20]
        main, second = sample_colors(rng, kind)
        assert (main, kind) not in held_out_pairs()
        assert second != main
        named += second is not None
    assert named / 20_000 == pytest.approx(0.4, abs=0.02)


def test_colors_stay_near_their_base() -> None:
    rng = generator()
    for name, base in COLORS.items():
        for _ in range(50):
            rgb = sample_rgb(rng, name)
            assert ((rgb >= 0.0) & (rgb <= 1.0)).all()
            assert np.abs(rgb - base).max() <= JITTER + 1e-6
            if name in ("white", "gray", "black"):
                assert rgb.max() == rgb.min()


def test_captions_use_only_the_vocabulary() -> None:
    rng = generator()
    canonical = 0
    for index in range(6000):
        kind = KIND_NAMES[index % 20]
        main, second = sample_colors(rng, kind)
        view = (None, *VIEW_WORDS)[index % 5]
        text = caption(rng, kind, main, second, view)
        assert set(split_words(text)) <= set(VOCABULARY)
        assert view is None or text.endswith(f", {view}")
        assert second is None or second in split_words(text)
        assert KINDS[kind].part in split_words(text) or second is None
        canonical += text.split(",")[0] == short_caption(kind, main, second)
    assert canonical / 6000 == pytest.approx(CANONICAL_FRACTION, abs=0.06)
    assert len(VOCABULARY) == len(set(VOCABULARY)) < 160


def test_canonical_captions_are_grammatical() -> None:
    assert short_caption("mug", "red") == "a red mug"
    assert short_caption("mug", "orange", "blue") == "an orange mug with a blue handle"
    assert short_caption("chair", "blue", "yellow") == "a blue chair with yellow legs"
    assert short_caption("ice cream", "pink", "orange") == "a pink ice cream with an orange cone"


def test_contact_sheet_has_a_row_per_kind() -> None:
    sheet = contact_sheet(["mug", "dog"], generator(), instances=1, size_px=16)
    assert sheet.size == (240, 48)


def test_mismatched_inputs_are_refused() -> None:
    toy = sphere_toy()
    with pytest.raises(ValueError, match="1 toys but 2 views"):
        render_layers([toy], make_views([0.0, 1.0], 0.0), SIZE, generator())
    with pytest.raises(ValueError, match="primitives"):
        Builder(generator()).finish("nothing", 0)
