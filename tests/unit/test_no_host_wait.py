"""Between reports a step never waits for the device, except where this file says so."""

from importlib import import_module
from pathlib import Path

import pytest
import torch

from sds3d.cameras.light import ShadingLaw
from sds3d.cameras.orbit import turntable_cameras
from sds3d.cameras.sample import CameraLaw
from sds3d.config.load import override_layers
from sds3d.interfaces import Told
from sds3d.job import JobConfig, load_job
from sds3d.optim import Optimizer
from sds3d.optimize import Loop, Parts, PenaltyConfig, build_guide
from sds3d.priors import PriorConfig, open_prior
from sds3d.priors.blank import blank_prior
from tests.host_reads import DeviceTensors, device_tensors
from tests.toys import CanvasScene

CPU = torch.device("cpu")
# Rules whose number of network calls depends on drawn times, and the one that is told scores.
DECLARED = {"guidance/trajectory.py", "guidance/reward.py"}
FOLDER = Path(__file__).parents[2] / "configs" / "toybox"
QUICK = ("asd", "cds", "csd", "ism", "reward", "rfds", "sds", "vsd")
METHODS = [
    pytest.param(path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)
    for path in sorted(FOLDER.glob("*.yaml"))
    if "stages:" not in path.read_text()
]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDS3D_THREADS", "1")


def loop_of(job: JobConfig, monkeypatch: pytest.MonkeyPatch) -> Loop:
    """A latent model of the toy size and a canvas; what scenes do on a device is their own backend's business."""
    prior = blank_prior("sd21", PriorConfig(dtype="float32"), CPU, toy=True)
    monkeypatch.setattr("sds3d.priors.load_prior", lambda config, device: prior)
    guide = build_guide(job, CPU)
    scene = CanvasScene(64)
    parts = Parts(
        scene=scene,
        guide=guide,
        camera=CameraLaw(job.camera),
        shading=ShadingLaw(job.shading),
        optimizer=Optimizer(scene.groups(), job.optimizer),
        penalties=PenaltyConfig(),
        streams=guide.streams,
        source=CanvasScene(64),
    )
    loop = Loop(parts, job.steps, log_every=100)
    loop.reads_freely = False  # as on an accelerator
    return loop


def watched_steps(loop: Loop, steps: int) -> DeviceTensors:
    """The waits of some steps after the first, which builds the optimiser's state and reports nothing."""
    loop.run(1, lambda event: None)
    prior, parts = loop.parts.prior, loop.parts
    held = [*prior.denoiser.module.parameters(), *prior.codec.vae.parameters(), prior.schedule.alphas_cumprod]
    held += [*parts.scene.parameters(), *parts.guide.rules.parameters(), parts.guide.bank.views]
    with device_tensors(t.detach() for t in held) as found:
        loop.run(1 + steps, lambda event: None)
    return found


def test_what_is_counted() -> None:
    inside, outside = torch.rand(3), torch.rand(3)
    with device_tensors([inside]) as found:
        float(outside.sum())
        (inside * outside)[0] = 1.0
        assert not found.waits
        float((inside + 1).sum())
        inside[inside > 0.5] *= 2.0
        inside.tolist()
    assert sum(found.waits.values()) >= 3


@pytest.mark.parametrize("settings", [(), ("prompting.perp_neg=true",), ("optimizer.max_grad_norm=1",)])
def test_a_step_of_plain_sds_never_waits(settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    layers = override_layers(["prompt=a red mug", "steps=9", "guidance.clip_x0=false", *settings])
    job = load_job("toybox/sds", layers).config
    found = watched_steps(loop_of(job, monkeypatch), 2)
    assert len(found.storages) > 1000  # it saw the step
    assert not found.waits


@pytest.mark.parametrize("method", METHODS)
def test_rules_wait_only_where_declared(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if method == "cfd":
        pytest.skip("surface noise is drawn by numba on the host")
    layers = override_layers(["prompt=a red mug", "steps=9", "camera.batch=2", "camera.hold_steps=1"])
    found = watched_steps(loop_of(load_job(f"toybox/{method}", layers).config, monkeypatch), 1)
    assert {place.partition(":")[0] for place in found.waits} <= DECLARED, found.waits
    if method in ("sds", "csd", "nfsd", "vsd", "asd", "hifa", "rfds", "cds"):
        assert not found.waits


@pytest.mark.parametrize(
    "family", ["deepfloyd", "flux", "mvdream", "pixart", "sana", "sd3", "sdxl", "stable_diffusion"]
)
def test_no_family_waits(family: str, tmp_path: Path) -> None:
    make = getattr(import_module(f"tests.tiny.{family}"), f"make_{family}")
    prior = open_prior(make(tmp_path / family), PriorConfig(dtype="float32"), CPU)
    views = max(2, prior.views_per_object)
    x, t = torch.rand(views, *prior.shape), torch.full((views,), 0.5)
    rgb = torch.rand(views, 3, prior.image_px, prior.image_px, requires_grad=True)
    cameras = turntable_cameras(views, 64) if prior.views_per_object > 1 else None
    told = Told(text=prior.encode_text(["a red mug"] * views), cameras=cameras)
    prior.eps(x, t, told)
    modules = [prior.denoiser.module, *([] if prior.is_pixel else [prior.codec.vae])]
    held = [part for module in modules for part in (*module.parameters(), *module.buffers())]
    held += [value for value in vars(prior.schedule).values() if isinstance(value, torch.Tensor)]
    held += [x, t, rgb, told.text, *([] if cameras is None else [cameras.c2w, cameras.azimuth_deg])]
    with device_tensors(value.detach() for value in held) as found:
        prior.eps(x, prior.schedule.snap(t), told, told)
        prior.encode(rgb).sum().backward()
    assert len(found.storages) > len(held)
    assert not found.waits
