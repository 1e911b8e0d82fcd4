"""A stand-in loop and exporter with the real interfaces, so that a whole run takes a moment."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sds3d.exporting as exporting
import sds3d.run as run_module
from sds3d.asset import AssetReport
from sds3d.errors import ExportError, NonFiniteError
from sds3d.events.bus import StepDone
from sds3d.health import Signs
from sds3d.interfaces import Cameras, Material, ParamGroup, Render, Scene, Shading, Surface
from sds3d.job import CheckpointConfig, JobConfig, PreviewConfig
from sds3d.optimize import Loop
from sds3d.paths import write_atomic
from sds3d.recovery import Recovery
from sds3d.rng import Stream, Streams

FAST = JobConfig(
    prompt="a red mug",
    steps=20,
    device="cpu",
    checkpoint=CheckpointConfig(every_steps=5, keep=2),
    preview=PreviewConfig(every_s=1e6, size_px=32, turntable_frames=0),
)


class ToyScene(Scene):
    """One vector that no one can see."""

    def __init__(self) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(4))

    def render(self, cameras: Cameras, shading: Shading, rng: Stream, *, progress: float = 1.0) -> Render:
        size = (len(cameras), 1, cameras.height_px, cameras.width_px)
        return Render(
            rgb=torch.ones(size).expand(-1, 3, -1, -1), alpha=torch.ones(size), depth=torch.ones(size)
        )

    def groups(self) -> list[ParamGroup]:
        return [ParamGroup(name="x", params=[self.x], lr=1.0)]

    def surface(self, cells_per_side: int, *, iso_factor: float = 1.0) -> Surface:
        raise ExportError("no surface")

    def material(self, points: torch.Tensor) -> Material:
        raise ExportError("no material")


class ToyLoop(Loop):
    """A drunkard's walk of one vector; every step depends on all earlier ones and on its own random numbers."""

    alpha = 0.5
    signs = Signs(coverage=0.5, full_chroma=0.0, speckle=0.0)
    fail_at: int | None = None

    def __init__(self, job: JobConfig, device: torch.device) -> None:
        self.job, self.index, self.log_every = job, 0, 10
        self.recovery = Recovery()
        self.steps_taken: list[int] = []
        self.scene = ToyScene()
        self.parts: Any = SimpleNamespace(scene=self.scene, prior=SimpleNamespace(warnings=self.warnings))

    @property
    def x(self) -> torch.Tensor:
        return self.scene.x.data

    def warnings(self, prompts: list[str]) -> list[str]:
        return ["the prior does not know the word 'mug'"] if "mug" in prompts[0] else []

    def run(self, until: int, emit: Any) -> None:
        while self.index < min(until, self.job.steps):
            noise = Streams(self.job.seed).stream("toy", self.index).normal(4)
            self.scene.x.data = torch.sin(3 * self.x) + noise
            self.steps_taken.append(self.index)
            self.index += 1
            if self.index == self.fail_at:
                raise NonFiniteError(f"step {self.index}: gradients are not finite")
            emit(
                StepDone(
                    step=self.index,
                    steps=self.job.steps,
                    grad_norm=float(self.x.norm()),
                    log={"alpha_mean": self.alpha},
                )
            )

    def preview(
        self, size_px: int, count: int = 4, azimuth_deg: float = 0.0, elevation_deg: float = 15.0
    ) -> torch.Tensor:
        return torch.rand(count, 3, size_px, size_px, generator=torch.Generator().manual_seed(0))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"scene.x": self.x.clone(), "index": torch.tensor(self.index)}

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.scene.x.data, self.index = tensors["scene.x"].clone(), int(tensors["index"])


class ToyReport(AssetReport):
    """Says what was written, and no more."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        object.__setattr__(self, "files", files)

    def as_dict(self) -> dict[str, Any]:
        return {"mesh": {"faces": 12}, "fidelity": None}


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> list[ToyLoop]:
    """The loops that runs built, in order; exporting writes the vector as text."""
    built: list[ToyLoop] = []

    def build(
        job: JobConfig, device: torch.device, source: Scene | None = None, start: Scene | None = None
    ) -> ToyLoop:
        built.append(ToyLoop(job, device))
        return built[-1]

    def make(scene: Any, folder: Path, config: Any, metadata: Any) -> ToyReport:
        path = folder / "asset.stl"
        write_atomic(path, repr(next(scene.parameters()).tolist()).encode())
        return ToyReport({"stl": path})

    monkeypatch.setattr(run_module, "build_loop", build)
    monkeypatch.setattr(exporting, "make_asset", make)
    monkeypatch.setattr(run_module, "examine", lambda loop: loop.signs)
    return built
