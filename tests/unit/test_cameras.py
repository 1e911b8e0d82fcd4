"""Cameras, light and view-dependent prompts."""

import pytest
import torch

from sds3d.cameras.light import ShadingConfig, ShadingLaw
from sds3d.cameras.orbit import orbit_cameras, turntable_cameras
from sds3d.cameras.sample import CameraConfig, CameraLaw
from sds3d.config.ramp import Ramp
from sds3d.errors import ConfigError
from sds3d.interfaces import Shading
from sds3d.moment import Moment
from sds3d.priors.analytic import AnalyticPrior, Mixture
from sds3d.priors.text import (
    BACK,
    FRONT,
    OVERHEAD,
    SIDE,
    VIEW_WORDS,
    PromptingConfig,
    TextBank,
    perp_neg_mix,
    view_index,
)
from sds3d.rng import Stream
from sds3d.toybox.views import view_word

NOW = Moment(0, 100)


def cameras_at(azimuth: list[float], elevation: list[float], size_px: int = 64):
    count = len(azimuth)
    return orbit_cameras(
        torch.tensor(azimuth),
        torch.tensor(elevation),
        torch.full((count,), 3.3),
        torch.full((count,), 40.0),
        size_px,
    )


def project(cameras, point: torch.Tensor) -> torch.Tensor:
    w2c = torch.linalg.inv(cameras.c2w)
    seen = w2c[:, :3, :3] @ point + w2c[:, :3, 3]
    pixel = (cameras.intrinsics @ seen[..., None])[..., 0]
    return torch.cat([pixel[:, :2] / pixel[:, 2:], pixel[:, 2:]], dim=1)


def test_rotations_are_proper_and_the_origin_is_in_the_middle() -> None:
    cameras = cameras_at([0.0, 77.0, 200.0, -30.0], [0.0, 45.0, -20.0, 90.0])
    rotation = cameras.c2w[:, :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(4, 3, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(4))
    torch.testing.assert_close(
        project(cameras, torch.zeros(3)), torch.tensor([[32.0, 32.0, 3.3]]).expand(4, 3), rtol=0, atol=1e-4
    )


def test_the_front_camera_stands_on_plus_z_with_x_to_the_right_and_y_up() -> None:
    front = cameras_at([0.0], [0.0])
    torch.testing.assert_close(front.c2w[0, :3, 3], torch.tensor([0.0, 0.0, 3.3]))
    assert project(front, torch.tensor([0.5, 0.0, 0.0]))[0, 0] > 32.0
    assert project(front, torch.tensor([0.0, 0.5, 0.0]))[0, 1] < 32.0
    side = cameras_at([90.0], [0.0])
    torch.testing.assert_close(side.c2w[0, :3, 3], torch.tensor([3.3, 0.0, 0.0]), rtol=0, atol=1e-5)


def test_field_of_view_reaches_the_image_edge() -> None:
    camera = cameras_at([0.0], [0.0])
    edge = 3.3 * torch.tan(torch.deg2rad(torch.tensor(20.0)))
    torch.testing.assert_close(
        project(camera, torch.tensor([0.0, float(edge), 0.0]))[0, 1], torch.tensor(0.0), rtol=0, atol=1e-3
    )


def test_resized_cameras_see_the_same() -> None:
    camera = cameras_at([33.0], [20.0])
    point = torch.tensor([0.3, -0.2, 0.4])
    small, large = project(camera, point), project(camera.resized(128), point)
    torch.testing.assert_close(2.0 * small[:, :2], large[:, :2], rtol=1e-5, atol=1e-4)


def test_every_batch_has_one_azimuth_per_sector() -> None:
    law = CameraLaw(CameraConfig(batch=4))
    for step in range(20):
        azimuth = law.sample(NOW, Stream(3, "camera", step)).azimuth_deg.sort().values
        gaps = torch.cat([azimuth.diff(), azimuth[:1] + 360.0 - azimuth[-1:]])
        assert gaps.max() < 180.0


def test_camera_ranges_and_overhead_share() -> None:
    law = CameraLaw(CameraConfig(batch=200, overhead_frac=0.3))
    cameras = law.sample(NOW, Stream(0, "camera"))
    overhead = cameras.elevation_deg >= 50.0
    assert 0.2 < overhead.float().mean() < 0.4
    assert (cameras.elevation_deg[~overhead] <= 45.0).all()
    assert (cameras.elevation_deg >= -10.0).all()
    assert ((cameras.radius >= 3.1) & (cameras.radius <= 3.5)).all()


def test_views_of_an_object_are_evenly_spaced_and_share_the_rest() -> None:
    law = CameraLaw(CameraConfig(batch=12, views_per_object=4, fov_deg=(30.0, 60.0), overhead_frac=0.5))
    cameras = law.sample(NOW, Stream(0, "camera"))
    azimuth = cameras.azimuth_deg.unflatten(0, (3, 4))
    torch.testing.assert_close(azimuth.diff(dim=1) % 360.0, torch.full((3, 3), 90.0), rtol=0, atol=1e-3)
    assert len({round(float(first) % 90.0, 3) for first in azimuth[:, 0]}) == 3
    assert ((azimuth >= 0.0) & (azimuth < 360.0)).all()
    for shared in (cameras.elevation_deg, cameras.radius, cameras.fov_deg):
        objects = shared.unflatten(0, (3, 4))
        assert (objects == objects[:, :1]).all()
        assert objects[:, 0].unique().numel() == 3
    torch.testing.assert_close(
        cameras.c2w[:, :3, 3].norm(dim=1), cameras.radius, rtol=1e-5, atol=1e-5
    )  # the matrices belong to these numbers


def test_groups_of_views_start_at_every_azimuth_over_the_steps() -> None:
    law = CameraLaw(CameraConfig(batch=4, views_per_object=4))
    first = torch.stack([law.sample(NOW, Stream(0, "camera", step)).azimuth_deg[0] for step in range(200)])
    assert torch.histc(first, 4, 0.0, 360.0).min() > 30


def test_widening_moves_the_first_view_of_an_object_only() -> None:
    law = CameraLaw(CameraConfig(batch=4, views_per_object=4, widen=Ramp(start=0.0, end=1.0)))
    first = law.sample(Moment(0, 100), Stream(0, "camera"))
    torch.testing.assert_close(first.azimuth_deg, torch.tensor([0.0, 90.0, 180.0, 270.0]), rtol=0, atol=1e-4)


def test_a_batch_of_no_whole_objects_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch: got 6, expected a multiple of views_per_object = 4"):
        CameraConfig(batch=6, views_per_object=4)


def test_progressive_widening_starts_at_the_front() -> None:
    law = CameraLaw(CameraConfig(batch=8, widen=Ramp(start=0.0, end=1.0)))
    first = law.sample(Moment(0, 100), Stream(0, "camera"))
    torch.testing.assert_close(first.azimuth_deg, torch.zeros(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(first.elevation_deg, torch.full((8,), 15.0))
    half = law.sample(Moment(50, 100), Stream(0, "camera", 50))
    assert half.azimuth_deg.abs().max() <= 90.0


def test_cameras_are_a_pure_function_of_the_stream() -> None:
    law = CameraLaw(CameraConfig())
    a, b, c = (law.sample(NOW, Stream(0, "camera", step)) for step in (5, 5, 6))
    assert torch.equal(a.c2w, b.c2w)
    assert not torch.equal(a.c2w, c.c2w)


def test_render_size_follows_its_ramp_in_steps_of_eight() -> None:
    law = CameraLaw(CameraConfig(render_px=Ramp(start=32.0, end=64.0)))
    sizes = [law.size_px(Moment(step, 100)) for step in range(100)]
    assert sizes[0] == 32
    assert sizes[-1] == 64
    assert all(size % 8 == 0 for size in sizes)


def test_shading_modes_occur_with_their_frequencies() -> None:
    law = ShadingLaw(ShadingConfig(lit=Ramp.constant(0.75), textureless_frac=0.5))
    cameras = cameras_at([0.0], [0.0])
    modes = [law.sample(NOW, cameras, Stream(0, "shading", k)).mode for k in range(2000)]
    for mode, share in (("albedo", 0.25), ("textureless", 0.375), ("lambertian", 0.375)):
        assert modes.count(mode) / 2000 == pytest.approx(share, abs=0.04)


def test_light_is_a_unit_vector_and_backgrounds_are_plain() -> None:
    law = ShadingLaw(ShadingConfig(lit=Ramp.constant(1.0), white_frac=0.5))
    shading = law.sample(NOW, turntable_cameras(300, 8), Stream(0, "shading"))
    torch.testing.assert_close(shading.light.norm(dim=1), torch.ones(300))
    white = (shading.background == 1.0).all(1).float().mean()
    assert 0.4 < white < 0.6
    assert (
        ShadingLaw(ShadingConfig(background="scene"))
        .sample(NOW, turntable_cameras(2, 8), Stream(0, "s"))
        .background
        is None
    )


@pytest.mark.parametrize(
    ("azimuth", "elevation", "view"),
    [
        (0.0, 0.0, FRONT),
        (44.9, 0.0, FRONT),
        (45.1, 0.0, SIDE),
        (134.9, 0.0, SIDE),
        (135.1, 0.0, BACK),
        (180.0, 0.0, BACK),
        (224.9, 0.0, BACK),
        (270.0, 0.0, SIDE),
        (0.0, 49.9, FRONT),
        (0.0, 50.1, OVERHEAD),
    ],
)
def test_view_words_agree_with_the_captions_of_the_training_world(
    azimuth: float, elevation: float, view: int
) -> None:
    assert int(view_index(cameras_at([azimuth], [elevation]), PromptingConfig())[0]) == view
    assert view_word(azimuth, elevation) == VIEW_WORDS[view]


@pytest.mark.parametrize(
    ("azimuth", "expected"),
    [
        (0.0, ((FRONT, -0.0001), (SIDE, -1.574))),
        (90.0, ((SIDE, -0.0005), (FRONT, -1.5735))),
        (180.0, ((SIDE, -0.394), (FRONT, -1.967))),
    ],
)
def test_perp_neg_weights_at_known_azimuths(azimuth: float, expected) -> None:
    mix = perp_neg_mix(torch.tensor([azimuth]), torch.tensor([False]))
    pairs = zip(mix.negatives[0].tolist(), mix.weights[0].tolist(), strict=True)
    for (view, weight), (known_view, known) in zip(pairs, expected, strict=True):
        assert view == known_view
        assert weight == pytest.approx(known, abs=2e-3)


def test_perp_neg_positive_prompt_is_continuous() -> None:
    def share(azimuth: float) -> dict[int, float]:
        mix = perp_neg_mix(torch.tensor([azimuth]), torch.tensor([False]))
        return {int(mix.first): float(mix.share), int(mix.second): 1 - float(mix.share)}

    before, after = share(89.999), share(90.001)
    assert before[SIDE] == pytest.approx(after[SIDE], abs=1e-3)


def bank(config: PromptingConfig) -> TextBank:
    names = [f"a cat, {word}" for word in VIEW_WORDS] + ["a cat", "", "fog"]
    prior = AnalyticPrior({name: Mixture.gaussian(torch.zeros(3, 2, 2), 1.0) for name in names})
    return TextBank(prior, "a cat", "fog", config)


def test_text_bank_tells_each_view_its_word_and_the_negative_prompt() -> None:
    cameras = cameras_at([0.0, 90.0, 180.0, 0.0], [0.0, 0.0, 0.0, 70.0])
    cond = bank(PromptingConfig()).for_views(cameras, Shading())
    assert cond.text[:, 0].argmax(1).tolist() == [0, 1, 2, 3]
    assert cond.null[:, 0].argmax(1).tolist() == [5] * 4
    assert cond.as_base().text[:, 0].argmax(1).tolist() == [6] * 4
    assert cond.plain[:, 0].argmax(1).tolist() == [4] * 4
    assert cond.as_null().cameras is None
    assert cond.as_base().cameras is None
    assert cond.as_text().cameras is not None


def test_text_bank_without_views_or_camera() -> None:
    config = PromptingConfig(view_dependent=False, camera_condition=False)
    cond = bank(config).for_views(cameras_at([0.0, 90.0], [0.0, 0.0]), Shading())
    assert cond.text[:, 0].argmax(1).tolist() == [4, 4]
    assert cond.as_text().cameras is None


def test_perp_neg_bundles_belong_to_their_views() -> None:
    azimuths = [10.0, 100.0, 175.0, 30.0]
    cameras = cameras_at(azimuths, [0.0, 0.0, 0.0, 80.0])
    whole = bank(PromptingConfig(perp_neg=True)).for_views(cameras, Shading())
    for i, azimuth in enumerate(azimuths):
        single = bank(PromptingConfig(perp_neg=True)).for_views(
            cameras_at([azimuth], [cameras.elevation_deg[i].item()]), Shading()
        )
        torch.testing.assert_close(whole.text[i], single.text[0])
        torch.testing.assert_close(whole.negatives[i], single.negatives[0])
        torch.testing.assert_close(whole.negative_weights[i], single.negative_weights[0])
    assert whole.negative_weights[3].abs().max() == 0.0
