"""The optimisation loop: from a prompt's embedding to an optimised scene, one readable step at a time."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.cameras.light import ShadingLaw
from sds3d.cameras.orbit import turntable_cameras
from sds3d.cameras.sample import CameraLaw
from sds3d.config.option import option
from sds3d.config.ramp import Ramp
from sds3d.errors import CheckpointError, ConfigError, NonFiniteError
from sds3d.events.bus import Emit, StepDone, Warned
from sds3d.guide import Guide
from sds3d.interfaces import Cameras, Prior, Render, Scene, Shading
from sds3d.moment import Moment
from sds3d.optim import Optimizer, StepReport
from sds3d.priors.text import TextBank
from sds3d.rng import Streams

if TYPE_CHECKING:
    from sds3d.job import JobConfig

SKIPPED_STEPS_LIMIT = 50
EXPLODING_FACTOR = 1e3  # a gradient norm this many times its usual value is reported


@dataclass(frozen=True, kw_only=True)
class PenaltyConfig:
    """Weights of the scene's regularisers; the guidance gradient is a sum over the elements of x, per view."""

    opacity: Ramp = option(Ramp.constant(0.0), help="mean alpha: keeps space empty", ge=0.0)
    entropy: Ramp = option(
        Ramp.constant(0.0), help="binary entropy of alpha: solid or empty, no haze", ge=0.0
    )
    orientation: Ramp = option(
        Ramp.constant(0.0), help="normals that face away from the camera (Ref-NeRF)", ge=0.0
    )
    distortion: Ramp = option(Ramp.constant(0.0), help="spread of density along rays (mip-NeRF 360)", ge=0.0)
    tv_density: Ramp = option(Ramp.constant(0.0), help="total variation of density", ge=0.0)
    tv_color: Ramp = option(Ramp.constant(0.0), help="total variation of colour", ge=0.0)
    scale: Ramp = option(Ramp.constant(0.0), help="mean size of Gaussians", ge=0.0)
    anisotropy: Ramp = option(Ramp.constant(0.0), help="needle-like Gaussians", ge=0.0)

    def active(self) -> dict[str, Ramp]:
        """Weights that are not zero throughout."""
        ramps = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        return {name: ramp for name, ramp in ramps.items() if ramp.start != 0.0 or ramp.end != 0.0}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything a run is made of."""

    scene: Scene
    guide: Guide
    camera: CameraLaw
    shading: ShadingLaw
    optimizer: Optimizer
    penalties: PenaltyConfig
    streams: Streams
    source: Scene | None = None  # the asset that is being edited, frozen

    @property
    def prior(self) -> Prior:
        """The frozen model that guides."""
        return self.guide.prior


class Loop:
    """A resumable optimisation run; `index` steps are done."""

    def __init__(
        self, parts: Parts, steps: int, *, stop_on_nonfinite: bool = False, log_every: int = 10
    ) -> None:
        self.parts, self.steps, self.index = parts, steps, 0
        self.stop_on_nonfinite, self.log_every = stop_on_nonfinite, log_every
        self.usual_norm: float | None = None  # slow average of the gradient norm, on a log scale
        self.weights = parts.penalties.active()
        unknown = sorted(set(self.weights) - set(parts.scene.penalty_names))
        if unknown:
            raise ConfigError(
                f"penalties: {', '.join(unknown)} mean nothing to a {type(parts.scene).__name__}; "
                f"it knows {', '.join(parts.scene.penalty_names)}"
            )

    def run(self, until: int, emit: Emit) -> None:
        """Optimise up to step `until` (at most `steps`), telling `emit` about every `log_every`-th step."""
        until = min(until, self.steps)
        while self.index < until:
            self.step(emit)

    def step(self, emit: Emit) -> None:
        """One step: views, render, guidance, penalties, update."""
        parts, now = self.parts, Moment(self.index, self.steps)
        # Steps that hold a target share the moment at which it was made, and so its cameras and its draw.
        shared = Moment(self.index - self.index % parts.guide.hold, self.steps)
        cameras, shading = self.look(shared)
        stream = parts.streams.stream("render", now.step)
        view = parts.scene.render(cameras, shading, stream, progress=now.progress)
        guidance = parts.guide(view, cameras, shading, now, shared, self.source(cameras, shading))
        loss = guidance.loss
        known = parts.scene.penalties(view) if self.weights else {}
        penalties = {name: known[name] for name in self.weights}  # scenes may compute them on look-up
        for name, ramp in self.weights.items():
            loss = loss + ramp.at(now) * penalties[name]
        report = parts.optimizer.step(loss, now)
        parts.guide.learn(guidance.aux_loss, now)
        parts.scene.adapt(view, parts.optimizer, now.step)
        self.index += 1
        if self.stop_on_nonfinite and bool(report.skipped):
            raise NonFiniteError(f"step {now.step}: gradients are not finite (on_nonfinite: stop)")
        if self.index % self.log_every == 0 or self.index == self.steps:
            self.report(emit, view, report, {**penalties, **guidance.log})

    def source(self, cameras: Cameras, shading: Shading) -> Callable[[], Render] | None:
        """How to render the asset that is being edited with the same cameras, if there is one."""
        scene, stream = self.parts.source, self.parts.streams.stream("source")
        if scene is None:
            return None
        return torch.no_grad()(lambda: scene.render(cameras, shading, stream))

    def look(self, now: Moment) -> tuple[Cameras, Shading]:
        """Cameras and shading of a moment; a pure function of the seed and the moment."""
        parts = self.parts
        cameras = parts.camera.sample(now, parts.streams.stream("camera", now.step))
        shading = parts.shading.sample(now, cameras, parts.streams.stream("shading", now.step))
        return cameras.to(parts.prior.device), shading.to(parts.prior.device)

    def report(
        self, emit: Emit, view: Render, report: StepReport, values: Mapping[str, float | Tensor]
    ) -> None:
        """Read numbers back from the device and pass them on."""
        learner = self.parts.guide.learner
        nonfinite = int(self.parts.optimizer.nonfinite)
        unlearned = 0 if learner is None else int(learner.nonfinite)
        norm = float(report.grad_norm)
        log = {name: float(torch.as_tensor(value).detach()) for name, value in values.items()}
        log["alpha_mean"] = float(view.alpha.detach().mean())
        emit(
            StepDone(
                step=self.index, steps=self.steps, grad_norm=norm, log=log, nonfinite=nonfinite + unlearned
            )
        )
        if self.stop_on_nonfinite and unlearned:
            raise NonFiniteError(
                f"step {self.index}: the rule's own loss is not finite (on_nonfinite: stop); lower its learning rate"
            )
        for count, what in ((nonfinite, "gradients"), (unlearned, "losses of the rule's own parameters")):
            if count >= SKIPPED_STEPS_LIMIT and count * 2 > self.index:
                raise NonFiniteError(
                    f"{count} of {self.index} steps had non-finite {what} and were skipped; "
                    "lower the learning rate or guidance.cfg_scale, or run with prior.dtype float32"
                )
        self._watch(emit, norm)

    def _watch(self, emit: Emit, norm: float) -> None:
        """Warn, or stop where the run says so, when the gradient norm leaves its usual range by far."""
        if not 0.0 < norm < math.inf:
            return
        usual = self.usual_norm
        if usual is not None and norm > EXPLODING_FACTOR * usual:
            message = (
                f"step {self.index}: the gradient norm {norm:.3g} is over {EXPLODING_FACTOR:g} times "
                f"its usual {usual:.3g}"
            )
            if self.stop_on_nonfinite:
                raise NonFiniteError(f"{message} (on_nonfinite: stop)")
            emit(Warned(message=message))
        self.usual_norm = norm if usual is None else usual**0.9 * norm**0.1

    @torch.no_grad()
    def preview(self, size_px: int, count: int = 4, elevation_deg: float = 15.0) -> Float[Tensor, "b 3 H W"]:
        """The scene from `count` azimuths on white, without touching any state."""
        cameras = turntable_cameras(count, size_px, elevation_deg).to(self.parts.prior.device)
        white = torch.ones(count, 3, device=self.parts.prior.device)
        stream = self.parts.streams.stream("preview", self.index)
        view = self.parts.scene.render(
            cameras, Shading(background=white), stream, progress=self.index / self.steps
        )
        return view.rgb.clamp(0.0, 1.0)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that step `index` depends on, as tensors by name."""
        tensors = {f"scene.{k}": v.detach().clone() for k, v in self.parts.scene.state_dict().items()}
        tensors |= {f"optimizer.{k}": v for k, v in self.parts.optimizer.state_dict().items()}
        tensors |= {f"guide.{k}": v for k, v in self.parts.guide.state_dict().items()}
        tensors["index"] = torch.tensor(self.index)
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            CheckpointError: names or shapes do not fit this run's configuration.
        """

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        try:
            self.parts.scene.load_state_dict(part("scene."))
            self.parts.optimizer.load_state_dict(part("optimizer."))
            self.parts.guide.load_state_dict(part("guide."))
            self.index = int(tensors["index"])
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"the checkpoint does not fit this configuration: {error}") from error


def build_guide(job: "JobConfig", device: torch.device, hold: int | None = None) -> Guide:
    """Prior, rules, prompts, times and noise of a job; cross-field errors surface here, before the first step.

    `hold` overrides the number of steps that share one target.
    """
    from sds3d.guidance.noise import NOISES
    from sds3d.guidance.terms import build_terms, extra_prompts
    from sds3d.guidance.time import TIME_LAWS
    from sds3d.priors import load_prior

    streams = Streams(job.seed)
    prior = load_prior(job.prior, device)
    terms = build_terms(job.guidance, prior, streams.stream("rules"))
    return Guide(
        prior=prior,
        terms=terms,
        bank=TextBank(prior, job.text(), job.negative_prompt, job.prompting, extra_prompts(terms)),
        time=TIME_LAWS[job.time.kind](job.time.config),
        noise=NOISES[job.noise.kind](job.noise.config),
        streams=streams,
        hold=job.camera.hold_steps if hold is None else hold,
        pixel_clip=job.optimizer.pixel_clip,
        score_clamp=job.optimizer.score_clamp,
    )


def build_loop(job: "JobConfig", device: torch.device, source: Scene | None = None) -> Loop:
    """Everything a job needs, loaded and wired; `source` is the asset to edit, from which the scene starts."""
    from sds3d.scenes import SCENES

    guide = build_guide(job, device)
    scene = SCENES[job.scene.kind](job.scene.config, guide.streams.stream("init")).to(device)
    if source is not None:
        scene.load_state_dict(source.state_dict())
        source.to(device).eval().requires_grad_(False)
    parts = Parts(
        scene=scene,
        guide=guide,
        camera=CameraLaw(job.camera),
        shading=ShadingLaw(job.shading),
        optimizer=Optimizer(scene.groups(), job.optimizer),
        penalties=job.penalties,
        streams=guide.streams,
        source=source,
    )
    return Loop(parts, job.steps, stop_on_nonfinite=job.on_nonfinite == "stop")
