"""Particles: several scenes under one rule, one of them per step."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sds3d import checkpoint
from sds3d.cameras.orbit import turntable_cameras
from sds3d.config.load import override_layers
from sds3d.errors import ConfigError
from sds3d.interfaces import Render, Shading
from sds3d.job import load_job
from sds3d.moment import Moment
from sds3d.optim import Optimizer, OptimizerConfig
from sds3d.rng import Stream, Streams
from sds3d.run import export, generate
from sds3d.scenes import SCENES, Particles, build_scene, particles_of
from sds3d.slices import Slice
from tests.toys import CanvasScene

CAMERAS, SHADING = turntable_cameras(2, 4), Shading()


def canvases(count: int) -> Particles:
    scenes = [CanvasScene() for _ in range(count)]
    for index, scene in enumerate(scenes):
        scene.image.data.fill_(index / count)
    return Particles(scenes)


def test_every_particle_is_shown_equally_often_and_the_stream_alone_decides() -> None:
    scene = canvases(4)
    picks = [scene.pick(Streams(7).stream("render", step)) for step in range(2000)]
    again = [scene.pick(Streams(7).stream("render", step)) for step in range(2000)]
    assert picks == again
    shares = torch.bincount(torch.tensor(picks), minlength=4) / 2000
    assert (shares - 0.25).abs().max() < 4 * (0.25 * 0.75 / 2000) ** 0.5


def test_a_step_changes_the_particle_it_shows_and_no_other() -> None:
    scene = canvases(3)
    optimizer = Optimizer(scene.groups(), OptimizerConfig())
    for step in range(12):
        before = [p.image.detach().clone() for p in scene.scenes]
        stream = Streams(0).stream("render", step)
        view = scene.render(CAMERAS, SHADING, stream)
        optimizer.step(view.rgb.sum(), Moment(step, 12))
        moved = [not torch.equal(a, p.image) for a, p in zip(before, scene.scenes, strict=True)]
        assert moved == [index == scene.pick(stream) for index in range(3)]


def test_without_gradients_the_shown_particle_answers() -> None:
    scene = canvases(3)
    scene.shown = 2
    with torch.no_grad():
        views = [scene.render(CAMERAS, SHADING, Stream(0, "preview", k)).rgb for k in range(5)]
    assert all(torch.equal(v, views[0]) for v in views)
    torch.testing.assert_close(views[0], torch.full_like(views[0], 2 / 3))


class Adapting(CanvasScene):
    """Swaps its parameter at every step, as densification does."""

    def adapt(self, view: Render, optimizer: object, step: int) -> None:
        assert view.private is None
        new = nn.Parameter(self.image.detach() + 1.0)
        rows = torch.arange(3)
        optimizer.replace("image", self.image, new, rows, torch.zeros(3, dtype=torch.bool))  # type: ignore[attr-defined]
        self.image = new


def test_adapting_reaches_the_optimiser_under_the_particles_name() -> None:
    scene = Particles([Adapting(), Adapting()])
    optimizer = Optimizer(scene.groups(), OptimizerConfig())
    stream = Streams(0).stream("render", 0)
    view = scene.render(CAMERAS, SHADING, stream)
    optimizer.step(view.rgb.sum(), Moment(0, 2))
    index = scene.pick(stream)
    scene.adapt(view, optimizer, 0)
    assert optimizer.params()[index] is scene.particle(index).image
    assert optimizer.params()[1 - index] is scene.particle(1 - index).image
    with pytest.raises(TypeError, match="not rendered by"):
        scene.penalties(replace(view, private=None))


def state(scene: nn.Module) -> dict[str, Tensor]:
    return dict(scene.state_dict())


@pytest.mark.parametrize("kind", sorted(SCENES))
def test_the_first_particle_is_the_scene_that_stands_alone(kind: str) -> None:
    config = SCENES[kind].Config()  # type: ignore[attr-defined]
    alone = build_scene(kind, config, Stream(0, "init"))
    together = build_scene(kind, config, Stream(0, "init"), particles=2)
    first, second = particles_of(together)
    assert particles_of(alone) == [alone]
    assert all(torch.equal(value, state(first)[name]) for name, value in state(alone).items())
    if kind != "voxel":  # starts from a fixed blob; its particles part with the first views
        assert any(not torch.equal(value, state(second)[name]) for name, value in state(alone).items())


def test_all_pieces_of_a_step_show_the_same_particle() -> None:
    scene = canvases(5)
    for step in range(20):
        whole = Streams(0).stream("render", step)
        picks = {scene.pick(part.stream(whole, per_view=16)) for part in Slice.whole(4).pieces(1, 1)}
        assert picks == {scene.pick(whole)}


def test_targets_and_edits_belong_to_one_scene() -> None:
    two = override_layers(["particles=2", "prompt=a red mug"])
    with pytest.raises(ConfigError, match=r"particles: got 2 with camera\.hold_steps = 3"):
        load_job("default", [*two, *override_layers(["camera.hold_steps=3"])]).config.validate()
    with pytest.raises(ConfigError, match=r"particles: got 2, but edit\.run"):
        load_job("toybox/sds", [*two, *override_layers(["edit.run=somewhere"])]).config.validate()
    load_job("toybox/vsd", two).config.validate()


def test_a_run_of_particles_exports_every_one_and_resumes(tmp_path: Path) -> None:
    words = [
        "particles=2",
        "prompt=a red mug",
        "steps=4",
        "preview.turntable_frames=0",
        "export.compare_views=0",
    ]
    words += [
        "export.cells_per_side=16",
        "export.texture_px=128",
        "camera.batch=2",
        "checkpoint.every_steps=2",
    ]
    job = load_job("toybox/vsd", override_layers(words)).config
    result = generate(job, tmp_path / "run")
    assert result.files["glb"].is_file()
    assert result.files["particle_1_glb"] == tmp_path / "run" / "particle_1" / "asset.glb"
    saved = checkpoint.load(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1])
    assert {name.split(".")[2] for name in saved.tensors if name.startswith("scene.scenes.")} == {"0", "1"}
    again = export(tmp_path / "run", ["stl"])
    assert again.files["particle_1_stl"].is_file()
