"""The judge reads fresh renders right, agrees with the closed forms of its parts, and refuses foreign files."""

import argparse
import json
import math

import numpy as np
import pytest
import torch

from sds3d.errors import InputError
from sds3d.mathx.predict import eps_from_x0
from sds3d.mathx.schedule import CosineSchedule
from sds3d.paths import data_dir
from sds3d.rng import Stream
from sds3d.toybox.captions import caption
from sds3d.toybox.colors import COLOR_NAMES
from sds3d.toybox.evaluate import SEEN, Marks, ask, contact_sheet, markdown, report_of, sample
from sds3d.toybox.held_out import held_out_pairs
from sds3d.toybox.judge import (
    AZIMUTH_BINS,
    WEIGHTS_FILE,
    JudgeNet,
    JudgeShape,
    Verdicts,
    azimuth_error_deg,
    decode_azimuth,
    has_front_table,
    load_judge,
    majority,
    parse_prompt,
    score_views,
)
from sds3d.toybox.kinds import KIND_NAMES, KINDS
from sds3d.toybox.pool import Pool
from sds3d.toybox.train_judge import (
    Trainer,
    augment,
    azimuth_target,
    measure,
    paint_examples,
    parse,
    quantise_blocks,
    save_judge,
)
from sds3d.toybox.views import make_views, sample_views
from sds3d.toybox.world import Views, render_layers, sample_toy

FRESH_SEED = 20_240_607


def pool_of(toys, views: Views, rng: np.random.Generator) -> Pool:
    layers = render_layers(toys, views, 64, rng)
    stacked = np.concatenate(
        [layers.main[..., None], layers.second[..., None], layers.fixed, layers.alpha[..., None]], axis=-1
    )
    meta = np.stack([[t.kind_index for t in toys], views.azimuth_deg, views.elevation_deg, views.radius], 1)
    return Pool(stacked, meta.astype(np.float32))


@pytest.fixture(scope="module")
def pool() -> Pool:
    rng = np.random.default_rng(FRESH_SEED)
    toys = [sample_toy(rng, KIND_NAMES[i % len(KIND_NAMES)]) for i in range(300)]
    return pool_of(toys, sample_views(rng, 300), rng)


@pytest.fixture(scope="module")
def judge():
    return load_judge("cpu")


@pytest.mark.parametrize("white_fraction", [0.0, 1.0])
def test_shipped_judge_reads_fresh_renders(judge, pool, white_fraction):
    examples = paint_examples(pool, np.random.default_rng(1), np.arange(300), white_fraction)
    result = measure(judge, examples)
    assert result["kind"] >= 0.97
    assert result["color"] >= 0.97
    assert result["azimuth_within_30"] >= 0.8


def test_shipped_judge_withstands_disturbed_pictures(judge, pool):
    rng = np.random.default_rng(2)
    examples = paint_examples(pool, rng, np.arange(300))
    disturbed = type(examples)(**{**vars(examples), "images": augment(examples.images, rng)})
    result = measure(judge, disturbed)
    assert result["kind"] >= 0.93
    assert result["color"] >= 0.93


def test_larger_pictures_are_resized_before_judging(judge, pool):
    images = paint_examples(pool, np.random.default_rng(3), np.arange(40)).images
    large = torch.nn.functional.interpolate(images, size=(256, 256), mode="bicubic").clamp(0, 1)
    small, big = judge(images), judge(large)
    assert sum(a == b for a, b in zip(small.kinds(), big.kinds(), strict=True)) >= 38
    assert sum(a == b for a, b in zip(small.colors(), big.colors(), strict=True)) >= 38


def test_verdicts_are_distributions_and_do_not_depend_on_the_batch(judge, pool):
    images = paint_examples(pool, np.random.default_rng(4), np.arange(12)).images
    whole, again = judge(images), judge(images)
    alone = judge(images[5:6])
    assert torch.equal(whole.kind_probs, again.kind_probs)
    assert torch.equal(whole.azimuth_deg, again.azimuth_deg)
    torch.testing.assert_close(whole.kind_probs[5:6], alone.kind_probs, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(whole.kind_probs.sum(1), torch.ones(12))
    torch.testing.assert_close(whole.color_probs.sum(1), torch.ones(12))
    assert bool(((whole.azimuth_deg >= 0) & (whole.azimuth_deg < 360)).all())
    assert bool(((whole.azimuth_conf > 0) & (whole.azimuth_conf <= 1)).all())


def test_views_of_one_toy_are_scored_against_the_prompt(judge):
    rng = np.random.default_rng(FRESH_SEED + 1)
    views = make_views(np.arange(8) * 45.0, 15.0)
    pool = pool_of([sample_toy(rng, "car")] * 8, views, rng)
    red = np.random.default_rng(0)
    while True:  # all eight in one colour: paint with the same generator state until every draw is red
        state = red.bit_generator.state
        picture = paint_examples(pool, red, np.arange(1), 1.0)
        if COLOR_NAMES[int(picture.color[0])] == "red":
            break
    images = []
    for row in range(8):
        red.bit_generator.state = state
        images.append(paint_examples(pool, red, np.array([row]), 1.0).images)
    images, azimuths = torch.cat(images), torch.arange(8) * 45.0
    right = score_views(judge, images, "a crimson automobile", azimuths)
    assert right.kind_ok is True
    assert right.color_ok is True
    assert right.kind_votes >= 0.875
    assert right.color_votes >= 0.875
    assert right.azimuth_ok_frac >= 0.75
    turned = score_views(judge, images, "a red car", azimuths + 90.0)
    assert turned.azimuth_ok_frac <= 0.25
    wrong = score_views(judge, images, "a blue mug", azimuths)
    assert wrong.kind_ok is False
    assert wrong.color_ok is False
    open_question = score_views(judge, images, "something nice")
    assert open_question.kind_ok is None
    assert open_question.color_votes is None
    assert open_question.azimuth_ok_frac is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red mug", ("red", "mug")),
        ("A crimson cup, back view", ("red", "mug")),
        ("a mug with a blue handle", (None, "mug")),
        ("a red mug with a blue handle", ("red", "mug")),
        ("a red and white car", ("red", "car")),
        ("a toy ice cream that is turquoise", ("cyan", "ice cream")),
        ("a rosy ice-cream", ("pink", "ice cream")),
        ("a grey doughnut on a plain background", ("gray", "donut")),
        ("an orange kettle", ("orange", "teapot")),
        ("a blue zebra", ("blue", None)),
        ("a sailboat", (None, "boat")),
        ("", (None, None)),
    ],
)
def test_prompt_parsing(text, expected):
    assert parse_prompt(text) == expected


def test_every_caption_of_the_grammar_is_parsed_back():
    rng = np.random.default_rng(0)
    for kind in KIND_NAMES:
        for main in COLOR_NAMES:
            for second in (None, "yellow" if main != "yellow" else "blue"):
                text = caption(rng, kind, main, second, "front view")
                assert parse_prompt(text) == (main, kind), text


def verdicts_of(kinds, colors) -> Verdicts:
    return Verdicts(
        kind_probs=torch.tensor(kinds, dtype=torch.float32),
        color_probs=torch.tensor(colors, dtype=torch.float32),
        azimuth_deg=torch.zeros(len(kinds)),
        azimuth_conf=torch.ones(len(kinds)),
    )


def one_vote(names, **probs):
    return [probs.get(name.replace(" ", "_"), 0.0) for name in names]


def test_majority_counts_views_and_breaks_ties_by_probability():
    unsure_mug = one_vote(KIND_NAMES, mug=0.5, dog=0.4)
    sure_dog = one_vote(KIND_NAMES, dog=1.0)
    red, blue = one_vote(COLOR_NAMES, red=0.6, blue=0.3), one_vote(COLOR_NAMES, blue=0.9)
    assert majority(verdicts_of([unsure_mug, unsure_mug, sure_dog], [red, red, blue])) == ("mug", "red")
    assert majority(verdicts_of([unsure_mug, sure_dog], [red, blue])) == ("dog", "blue")
    nobody = Verdicts(
        kind_probs=torch.zeros(0, len(KIND_NAMES)),
        color_probs=torch.zeros(0, len(COLOR_NAMES)),
        azimuth_deg=torch.zeros(0),
        azimuth_conf=torch.zeros(0),
    )
    with pytest.raises(ValueError, match="no views"):
        majority(nobody)


def test_azimuth_coding_round_trips():
    azimuth = torch.arange(0.0, 360.0, 1.0)
    target = azimuth_target(azimuth)
    torch.testing.assert_close(target.sum(1), torch.ones(360))
    decoded, confidence = decode_azimuth(target)
    assert float(azimuth_error_deg(decoded, azimuth).max()) < 0.2
    torch.testing.assert_close(confidence, torch.ones(360))


def test_two_far_modes_are_not_averaged():
    probs = torch.zeros(1, AZIMUTH_BINS)
    probs[0, 0], probs[0, 12] = 0.6, 0.4
    azimuth, confidence = decode_azimuth(probs)
    assert float(azimuth_error_deg(azimuth, torch.zeros(1))) < 1e-3
    assert float(confidence) == pytest.approx(0.6)


def test_azimuth_error_is_a_circle_metric():
    a, b = torch.tensor([359.0, 10.0, 90.0]), torch.tensor([1.0, 350.0, 270.0])
    torch.testing.assert_close(azimuth_error_deg(a, b), torch.tensor([2.0, 20.0, 180.0]))
    torch.testing.assert_close(azimuth_error_deg(b, a), azimuth_error_deg(a, b))


def test_block_quantisation_is_bounded_by_half_its_steps():
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    strength = torch.tensor([1e-6, 0.02])
    out = quantise_blocks(images, strength)
    torch.testing.assert_close(out[0], images[0], rtol=0, atol=1e-4)
    steps = 0.02 * (1.0 + torch.arange(8.0)[:, None] + torch.arange(8.0)[None])
    bound = float((steps / 2).square().sum())  # per block, by Parseval
    blocks = (out[1] - images[1]).reshape(3, 8, 8, 8, 8).square().sum((2, 4))
    assert float(blocks.max()) <= bound * 1.01
    assert float(blocks.max()) > 0


def tiny_options(folder) -> argparse.Namespace:
    return parse(["--work", str(folder), "--images", "960", "--batch", "16", "--lr", "3e-3"])


def test_training_reduces_the_loss_and_resumes(tmp_path, pool):
    small = Pool(pool.layers[:16], pool.meta[:16])
    options = tiny_options(tmp_path)
    trainer = Trainer(options)
    batch = paint_examples(small, np.random.default_rng(0), np.arange(16), 1.0)
    losses = [trainer.update(batch, 60) for _ in range(18)]
    assert losses[-1] < 0.7 * losses[0]
    trainer.save()
    resumed = Trainer(options)
    assert resumed.step == 18
    assert resumed.update(batch, 60) == pytest.approx(trainer.update(batch, 60), rel=1e-4)
    loaded = load_judge("cpu", tmp_path / "judge")
    assert len(loaded(batch.images)) == 16


def test_training_data_are_a_function_of_the_seed(pool):
    first, second = (paint_examples(pool, np.random.default_rng(7), np.arange(8)) for _ in range(2))
    for key in vars(first):
        assert torch.equal(getattr(first, key), getattr(second, key))
    a, b = (augment(first.images, np.random.default_rng(8)) for _ in range(2))
    assert torch.equal(a, b)
    assert float(a.min()) >= 0
    assert float(a.max()) <= 1


def test_azimuth_is_not_asked_of_kinds_without_a_front():
    table = has_front_table()
    assert [name for name, on in zip(KIND_NAMES, table.tolist(), strict=True) if on] == [
        name for name in KIND_NAMES if KINDS[name].has_front
    ]


def test_shipped_files_are_small_and_self_describing():
    folder = data_dir("assets") / "judge"
    assert (folder / WEIGHTS_FILE).stat().st_size <= 5_000_000
    assert json.loads((folder / "config.json").read_text())["kinds"] == list(KIND_NAMES)
    assert (folder / "README.md").is_file()


def test_foreign_or_missing_judges_are_refused(tmp_path):
    with pytest.raises(InputError, match="no usable judge"):
        load_judge("cpu", tmp_path)
    shape = JudgeShape((4, 4, 4, 4), 2, 8)
    save_judge(JudgeNet(shape), shape, tmp_path)
    load_judge("cpu", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "kinds": ["mug"]}))
    with pytest.raises(InputError, match="kinds"):
        load_judge("cpu", tmp_path)


def test_judge_refuses_other_than_rgb_batches(judge):
    with pytest.raises((ValueError, TypeError)):  # TypeError where shapes are checked on entry
        judge(torch.zeros(3, 64, 64))


class OnePicturePrior:
    """The optimal denoiser of a single picture: DDIM must return that picture from any noise."""

    schedule = CosineSchedule()
    device = torch.device("cpu")
    shape = (3, 4, 4)
    image_px = 4

    def __init__(self, picture: torch.Tensor) -> None:
        self.picture, self.calls = picture, []

    def eps(self, x, t, *told):
        self.calls.append((len(told), [bundle.cameras is None for bundle in told]))
        a, s = self.schedule.alpha(t), self.schedule.sigma(t)
        return tuple(eps_from_x0(x, self.picture.expand_as(x), a, s) for _ in told)

    def encode(self, rgb):
        return rgb * 2 - 1

    def decode(self, x):
        return (x + 1) / 2

    def encode_text(self, prompts):
        return torch.zeros(len(prompts), 1, 1)

    def warnings(self, prompts):
        return []


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_sampler_recovers_the_only_picture_of_a_prior(cfg):
    picture = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(1, 3, 4, 4)
    prior = OnePicturePrior(picture)
    text = torch.zeros(2, 1, 1)
    noise = Stream(0, "noise").normal(2, 3, 4, 4).double()
    out = sample(prior, text, text, noise, cfg, 8, None, torch.ones(2, 3))
    torch.testing.assert_close(out, ((picture + 1) / 2).expand(2, -1, -1, -1), rtol=0, atol=1e-6)
    assert {rows for rows, _ in prior.calls} == {1 if cfg == 1.0 else 2}
    assert len(prior.calls) == 8


def test_questions_are_spread_evenly_and_keep_the_splits_apart():
    questions = ask(np.random.default_rng(0), 200)
    seen = [q for q in questions if q.split == SEEN]
    counts = [sum(q.kind == kind for q in seen) for kind in KIND_NAMES]
    assert max(counts) - min(counts) <= 1
    assert len(seen) == 140
    for q in questions:
        assert ((q.color, q.kind) in held_out_pairs()) == (q.split != SEEN)
        assert parse_prompt(q.prompt) == (q.color, q.kind)
    assert questions == ask(np.random.default_rng(0), 200)


def test_report_counts_right_answers():
    questions = ask(np.random.default_rng(1), 60)
    kinds = [q.kind for q in questions]
    colors = [q.color for q in questions]
    perfect = report_of(questions, Marks(kinds, colors, [0.0] * 60))
    assert all(perfect["bars_met"].values())
    assert perfect["mistaken"] == {}
    half_wrong = report_of(questions, Marks(kinds, colors, [0.0 if i % 2 else 180.0 for i in range(60)]))
    assert half_wrong["bars_met"]["seen azimuth"] is False
    nothing = report_of(questions, Marks(["none"] * 60, colors, [math.inf] * 60))
    assert nothing["splits"][SEEN]["kind"] == 0.0
    assert nothing["splits"][SEEN]["color"] == 1.0
    text = markdown({"samples": 60, "steps": 4, "seed": 0, "no_camera": False, "cfg": {"2": perfect}})
    assert "| 2 | seen | 42 | 100.0 | 100.0 | 100.0 | 0.0 deg |" in text


def test_contact_sheet_frames_mistakes():
    sheet = contact_sheet(torch.zeros(3, 3, 8, 8), [False, True, False], columns=2, edge=1)
    assert sheet.size == (20, 20)
    assert sheet.getpixel((10, 0)) == (255, 0, 0)
    assert sheet.getpixel((0, 0)) == (255, 255, 255)
    assert sheet.getpixel((5, 5)) == (0, 0, 0)
