"""The optimisation loop: from a prompt's embedding to an optimised scene, one readable step at a time."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.cameras.light import ShadingLaw
from sds3d.cameras.orbit import turntable_cameras
from sds3d.cameras.sample import CameraLaw
from sds3d.config.option import option
from sds3d.config.ramp import Moment, Ramp
from sds3d.errors import CheckpointError, ConfigError, NonFiniteError
from sds3d.events.bus import Emit, StepDone
from sds3d.guidance.pixel_clip import clip_pixel_gradient
from sds3d.guidance.time import TimeLaw
from sds3d.interfaces import Cameras, Draw, Prior, Render, Rule, Scene, Shading, attach_gradient
from sds3d.optim import Optimizer, StepReport
from sds3d.priors.text import TextBank
from sds3d.rng import Streams

if TYPE_CHECKING:
    from sds3d.job import JobConfig

SKIPPED_STEPS_LIMIT = 50


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
    prior: Prior
    rule: Rule
    bank: TextBank
    camera: CameraLaw
    shading: ShadingLaw
    time: TimeLaw
    optimizer: Optimizer
    penalties: PenaltyConfig
    streams: Streams


@dataclass(frozen=True, kw_only=True)
class Held:
    """A clean target that several steps share: grad = weight (x - target)."""

    target: Float[Tensor, "b c h w"]
    weight: Float[Tensor, "b 1 1 1"]


class Loop:
    """A resumable optimisation run; `index` steps are done."""

    def __init__(
        self, parts: Parts, steps: int, *, stop_on_nonfinite: bool = False, log_every: int = 10
    ) -> None:
        self.parts, self.steps, self.index = parts, steps, 0
        self.stop_on_nonfinite, self.log_every = stop_on_nonfinite, log_every
        self.hold = parts.camera.config.hold_steps
        self.held: Held | None = None
        self.weights = parts.penalties.active()
        unknown = sorted(set(self.weights) - set(parts.scene.penalty_names))
        if unknown:
            raise ConfigError(
                f"penalties: {', '.join(unknown)} mean nothing to a {type(parts.scene).__name__}; "
                f"it knows {', '.join(parts.scene.penalty_names)}"
            )
        if self.hold > 1 and not parts.rule.has_target:
            raise ConfigError(
                f"camera.hold_steps = {self.hold} needs a guidance rule with a clean target; "
                f"{type(parts.rule).__name__} has none: use hold_steps 1 or guidance.kind sds"
            )

    def run(self, until: int, emit: Emit) -> None:
        """Optimise up to step `until` (at most `steps`), telling `emit` about every `log_every`-th step."""
        until = min(until, self.steps)
        while self.index < until:
            self.step(emit)

    def step(self, emit: Emit) -> None:
        """One step: views, render, guidance, penalties, update."""
        parts, now = self.parts, Moment(self.index, self.steps)
        shared = Moment(
            self.index - self.index % self.hold, self.steps
        )  # steps that hold a target share this
        cameras, shading = self.look(shared)
        view = parts.scene.render(
            cameras, shading, parts.streams.stream("render", now.step), progress=now.progress
        )
        clip = parts.optimizer.config.pixel_clip
        x = parts.prior.encode(view.rgb if clip is None else clip_pixel_gradient(view.rgb, clip))
        loss = attach_gradient(x, self.gradient(x.detach(), shared, cameras, shading))
        known = parts.scene.penalties(view) if self.weights else {}
        penalties = {name: known[name] for name in self.weights}  # scenes may compute them on look-up
        for name, ramp in self.weights.items():
            loss = loss + ramp.at(now) * penalties[name]
        report = parts.optimizer.step(loss, now)
        parts.scene.adapt(view, parts.optimizer, now.step)
        self.index += 1
        if self.stop_on_nonfinite and bool(report.skipped):
            raise NonFiniteError(f"step {now.step}: gradients are not finite (on_nonfinite: stop)")
        if self.index % self.log_every == 0 or self.index == self.steps:
            self.report(emit, view, report, penalties)

    def look(self, now: Moment) -> tuple[Cameras, Shading]:
        """Cameras and shading of a moment; a pure function of the seed and the moment."""
        parts = self.parts
        cameras = parts.camera.sample(now, parts.streams.stream("camera", now.step))
        shading = parts.shading.sample(now, cameras, parts.streams.stream("shading", now.step))
        return cameras.to(parts.prior.device), shading.to(parts.prior.device)

    def gradient(
        self, x: Float[Tensor, "b c h w"], now: Moment, cameras: Cameras, shading: Shading
    ) -> Float[Tensor, "b c h w"]:
        """The rule's gradient on x, or the pull towards the target that is being held."""
        if self.index != now.step and self.held is not None:
            return self.held.weight * (x - self.held.target)
        parts, stream = self.parts, self.parts.streams.stream("diffusion", now.step)
        t = parts.prior.schedule.snap(parts.time.sample(now, len(x), stream.fork("time")).to(x.device))
        noise = stream.fork("noise").normal(*x.shape, device=x.device)
        draw = Draw(t=t, noise=noise, schedule=parts.prior.schedule, stream=stream)
        residual = parts.rule.residual(x, draw, parts.bank.for_views(cameras, shading))
        if self.hold > 1 and residual.target is not None and residual.weight is not None:
            self.held = Held(target=residual.target, weight=residual.weight)
        return residual.grad

    def report(self, emit: Emit, view: Render, report: StepReport, penalties: Mapping[str, Tensor]) -> None:
        """Read numbers back from the device and pass them on."""
        nonfinite = int(self.parts.optimizer.nonfinite)
        log = {name: float(value.detach()) for name, value in penalties.items()}
        log["alpha_mean"] = float(view.alpha.detach().mean())
        emit(
            StepDone(
                step=self.index,
                steps=self.steps,
                grad_norm=float(report.grad_norm),
                log=log,
                nonfinite=nonfinite,
            )
        )
        if nonfinite >= SKIPPED_STEPS_LIMIT and nonfinite * 2 > self.index:
            raise NonFiniteError(
                f"{nonfinite} of {self.index} steps had non-finite gradients and were skipped; "
                "lower the learning rate or guidance.cfg_scale, or run with prior.dtype float32"
            )

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
        tensors |= {f"rule.{k}": v.detach().clone() for k, v in self.parts.rule.state_dict().items()}
        if self.held is not None:
            tensors |= {"held.target": self.held.target.clone(), "held.weight": self.held.weight.clone()}
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
            self.parts.rule.load_state_dict(part("rule."))
            self.parts.optimizer.load_state_dict(part("optimizer."))
            self.index = int(tensors["index"])
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"the checkpoint does not fit this configuration: {error}") from error
        held = part("held.")
        device = self.parts.prior.device
        self.held = Held(target=held["target"].to(device), weight=held["weight"].to(device)) if held else None


def build_loop(job: "JobConfig", device: torch.device) -> Loop:
    """Everything a job needs, loaded and wired; cross-field errors surface here, before the first step."""
    from sds3d.guidance import RULES
    from sds3d.guidance.time import TIME_LAWS
    from sds3d.priors import load_prior
    from sds3d.scenes import SCENES

    streams = Streams(job.seed)
    prior = load_prior(job.prior, device)
    scene = SCENES[job.scene.kind](job.scene.config, streams.stream("init")).to(device)
    parts = Parts(
        scene=scene,
        prior=prior,
        rule=RULES[job.guidance.kind](job.guidance.config, prior),
        bank=TextBank(prior, job.text(), job.negative_prompt, job.prompting),
        camera=CameraLaw(job.camera),
        shading=ShadingLaw(job.shading),
        time=TIME_LAWS[job.time.kind](job.time.config),
        optimizer=Optimizer(scene.groups(), job.optimizer),
        penalties=job.penalties,
        streams=streams,
    )
    return Loop(parts, job.steps, stop_on_nonfinite=job.on_nonfinite == "stop")
