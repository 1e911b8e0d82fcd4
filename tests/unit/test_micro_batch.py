"""Views in pieces: the gradient of the joint batch, and what happens where memory runs out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sds3d.config.ramp import Ramp
from sds3d.economy import Economy, NoRoomError, out_of_memory
from sds3d.events.bus import StepDone, Warned
from sds3d.guidance import CSD, SDS
from sds3d.guidance.asd import ASD
from sds3d.guidance.lmc import LMC
from sds3d.guidance.noise import FixedNoise
from sds3d.moment import Moment
from sds3d.optimize import Loop
from sds3d.rng import Stream
from sds3d.slices import Slice
from tests.windows import build, quiet

RULES: dict[str, Callable[[Any], Any]] = {
    "sds": lambda prior: SDS(SDS.Config(cfg_scale=3.0), prior),
    "sds, several steps with noise between": lambda prior: SDS(SDS.Config(target_steps=3, eta=1.0), prior),
    "sds, image space": lambda prior: SDS(SDS.Config(image_weight=0.3), prior),
    "csd": lambda prior: CSD(CSD.Config(), prior),
    "asd, one random gap per step": lambda prior: ASD(ASD.Config(), prior),
    "lmc, with a net of its own": lambda prior: LMC(LMC.Config(width=4), prior, Stream(0, "lmc")),
}


def gradient(loop: Loop) -> torch.Tensor:
    loop.parts.guide.begin()
    loop.gradients(Moment(loop.index, loop.steps))
    grad = loop.parts.scene.image.grad
    assert grad is not None
    return grad.clone()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("size", [1, 3])
def test_pieces_add_up_to_the_joint_gradient(name: str, size: int) -> None:
    whole, cut = build(rule=RULES[name]), build(rule=RULES[name])
    cut.economy = Economy(micro_batch=size)
    torch.testing.assert_close(gradient(cut), gradient(whole), rtol=1e-12, atol=1e-14)
    assert max(cut.parts.scene.asked) <= size
    learners = [loop.parts.guide.learner for loop in (whole, cut)]
    if learners[0] is not None:
        grads = [[p.grad for p in learner.params()] for learner in learners]
        assert any(g is not None for g in grads[0])
        for ours, joint in zip(grads[1], grads[0], strict=True):
            torch.testing.assert_close(ours, joint, rtol=1e-4, atol=1e-8)  # the net is float32


@pytest.mark.parametrize(
    "options",
    [
        {"hold": 3},
        {"hold": 3, "rule": RULES["sds, image space"]},
        {"noise": FixedNoise(FixedNoise.Config())},
        {"score_clamp": Ramp.constant(0.5)},
        {"pixel_clip": 0.01},
        {"rule": RULES["lmc, with a net of its own"]},
    ],
)
def test_a_run_in_pieces_is_the_run(options: dict[str, Any]) -> None:
    whole, cut = build(7, **options), build(7, **options)
    cut.economy = Economy(micro_batch=1)
    reports: list[list[StepDone]] = [[], []]
    for loop, seen in zip((whole, cut), reports, strict=True):
        loop.run(7, seen.append)
    tolerance = 1e-4 if whole.parts.guide.learner is not None else 1e-10
    states = [loop.state_dict() for loop in (whole, cut)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=tolerance, atol=tolerance, msg=name)
    (ours,), (joint,) = reports
    assert ours.log == pytest.approx(joint.log, rel=1e-3)


def test_a_hold_may_be_cut_while_it_lasts() -> None:
    whole, cut = build(6, hold=3), build(6, hold=3)
    whole.run(6, quiet)
    cut.run(2, quiet)
    cut.economy = Economy(micro_batch=3)
    cut.run(6, quiet)
    torch.testing.assert_close(cut.parts.scene.image, whole.parts.scene.image, rtol=1e-10, atol=1e-12)


def test_pieces_are_even_and_keep_groups_together() -> None:
    def sizes(size: int | None, multiple: int = 1, total: int = 8) -> list[int]:
        return [len(part) for part in Slice.whole(total).pieces(size, multiple)]

    assert (sizes(None), sizes(8), sizes(5), sizes(3), sizes(1)) == ([8], [8], [4, 4], [2, 3, 3], [1] * 8)
    assert (sizes(6, 4), sizes(1, 4), sizes(12, 4, 12)) == ([4, 4], [4, 4], [12])
    parts = Slice(4, 8, 8).pieces(2)
    assert [(part.start, part.stop, part.share) for part in parts] == [(4, 6, 0.25), (6, 8, 0.25)]


def test_a_sliced_stream_draws_rows_of_the_whole() -> None:
    whole, part = Stream(1, "a", 5), Slice(2, 4, 6)
    cut = part.stream(whole, per_view=10)
    assert torch.equal(cut.normal(2, 3), whole.normal(6, 3)[2:4])
    assert torch.equal(cut.uniform(20), whole.uniform(60)[20:40])
    assert torch.equal(cut.fork("x").normal(2, 1), whole.fork("x").normal(6, 1)[2:4])
    assert torch.equal(cut.uniform(1), whole.uniform(1))  # one number for all views
    assert torch.equal(cut.uniform(7, 2), whole.uniform(7, 2))
    assert torch.equal(cut.at(0).normal(2, 3), whole.at(0).normal(2, 3))
    assert Slice.whole(6).stream(whole) is whole


class Scarce:
    """A prior's `eps` with room for `rows` views; from step `since` on, where a loop is given."""

    def __init__(
        self, loop: Loop, rows: int, since: int = 0, error: type[Exception] = torch.OutOfMemoryError
    ):
        self.loop, self.rows, self.since, self.error = loop, rows, since, error
        self.eps = loop.parts.prior.eps
        loop.parts.prior.eps = self

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, *told: Any) -> tuple[torch.Tensor, ...]:
        if len(x_t) > self.rows and self.loop.index >= self.since:
            raise self.error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes")
        return self.eps(x_t, t, *told)


@pytest.mark.parametrize(
    ("error", "rows", "size"), [(torch.OutOfMemoryError, 2, 2), (RuntimeError, 1, 1), (MemoryError, 2, 2)]
)
def test_running_out_of_memory_goes_on_in_pieces(error: type[Exception], rows: int, size: int) -> None:
    short, expected = build(9, hold=3), build(9, hold=3)
    Scarce(short, rows, since=3, error=error)
    events: list[Any] = []
    short.run(9, events.append)
    expected.run(3, quiet)
    expected.economy = Economy(micro_batch=size)
    expected.run(9, quiet)
    for name, value in expected.state_dict().items():
        assert torch.equal(short.state_dict()[name], value), name
    warned = [event.message for event in events if isinstance(event, Warned)]
    assert len(warned) == (1 if size == 2 else 2)
    assert warned[0].startswith("step 4: out of memory with all views at once at 64 px")
    assert warned[0].endswith("going on with 2 views at a time")
    assert short.economy == Economy(micro_batch=size)


def test_smaller_renders_come_after_the_last_piece() -> None:
    loop = build(3)
    render, seen = loop.parts.scene.render, []

    def limited(cameras: Any, *words: Any, **named: Any) -> Any:
        seen.append((len(cameras), cameras.width_px))
        if cameras.width_px > 32:
            raise torch.OutOfMemoryError("no room")
        return render(cameras, *words, **named)

    loop.parts.scene.render = limited
    loop.run(3, quiet)
    assert seen[:4] == [(4, 64), (2, 64), (1, 64), (1, 32)]
    assert loop.economy == Economy(micro_batch=1, render_scale=0.5)
    assert loop.index == 3


def test_when_nothing_is_left_the_state_is_that_of_the_last_step() -> None:
    loop = build(5)
    loop.run(2, quiet)
    before = loop.state_dict()
    Scarce(loop, rows=0)
    with pytest.raises(NoRoomError, match=r"step 3: out of memory with 1 view at a time.* at 32 px"):
        loop.run(5, quiet)
    for name, value in loop.state_dict().items():
        assert torch.equal(before[name], value), name


def test_other_errors_are_no_lack_of_memory() -> None:
    loop = build(5)
    Scarce(loop, rows=0, error=ValueError)
    with pytest.raises(ValueError, match="allocate"):
        loop.run(1, quiet)
    assert out_of_memory(RuntimeError("shape mismatch")) is None
    assert (
        out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"))
        == "CUDA out of memory. Tried"
    )


def test_groups_of_views_are_not_parted() -> None:
    assert Economy().tighter(8, 4, 64) == Economy(micro_batch=4)
    assert Economy(micro_batch=4).tighter(8, 4, 64) == Economy(micro_batch=4, render_scale=0.5)
    assert Economy(micro_batch=1, render_scale=0.5).tighter(8, 1, 64) is None
    assert Economy(micro_batch=3).both(Economy(micro_batch=2, render_scale=0.5)) == Economy(
        micro_batch=2, render_scale=0.5
    )
    assert Economy.of(Economy(micro_batch=2).as_dict() | {"other": 1}) == Economy(micro_batch=2)
