"""The optimisation loop: from a prompt's embedding to an optimised scene, one readable step at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.cameras.light import ShadingLaw
from sds3d.cameras.orbit import turntable_cameras
from sds3d.cameras.sample import CameraLaw
from sds3d.economy import Economy, NoRoomError, with_room
from sds3d.errors import CheckpointError, ConfigError, NonFiniteError
from sds3d.events.bus import Emit, Warned
from sds3d.guide import Guide
from sds3d.interfaces import Cameras, Prior, Render, Scene, Shading
from sds3d.moment import Moment
from sds3d.optim import Optimizer, StepReport
from sds3d.parallel import Team
from sds3d.penalties import PenaltyConfig
from sds3d.priors.notices import notices
from sds3d.priors.text import TextBank
from sds3d.recovery import Advice, Recovery
from sds3d.rng import Streams
from sds3d.slices import Slice
from sds3d.watch import Watch

if TYPE_CHECKING:
    from sds3d.job import JobConfig

__all__ = ["Loop", "Parts", "PenaltyConfig", "Seen", "build_guide", "build_loop"]


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


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the views of a step leave when their gradients are there."""

    view: Render  # of the last piece
    values: Mapping[str, float | Tensor]  # means over the views, for the report


class Loop:
    """A resumable optimisation run; `index` steps are done.

    `economy` says how the views of a step are cut to fit into memory, `team` how they are dealt to processes.
    """

    economy, team = Economy(), Team()

    def __init__(
        self, parts: Parts, steps: int, *, stop_on_nonfinite: bool = False, log_every: int = 10
    ) -> None:
        self.parts, self.steps, self.index = parts, steps, 0
        self.stop_on_nonfinite, self.log_every = stop_on_nonfinite, log_every
        self.watch = Watch(stop=stop_on_nonfinite)
        self.recovery = Recovery()
        # On a CPU numbers can be read at every step; an accelerator would be waited for, so only reports read.
        self.reads_freely = parts.prior.device.type == "cpu"
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
        if self.recovery.remembered is None:
            self.recovery.remember(self.state_dict())
        while self.index < until:
            self.step(emit)

    def step(self, emit: Emit) -> None:
        """One step: views, render, guidance, penalties, update."""
        parts, now = self.parts, Moment(self.index, self.steps)
        if self.index % self.log_every == 0:
            for message in notices(parts.prior):
                emit(Warned(message=message))
        economize, undo = partial(self.economize, now, emit), parts.guide.begin()
        seen = with_room(lambda: self.gradients(now), undo, economize, self.team)
        self.team.add_gradients(parts.optimizer.params())
        report = parts.optimizer.update(now)
        advice = self.advice(report)
        if advice == "go on":
            parts.guide.settle(now, self.team)
            parts.scene.adapt(seen.view, parts.optimizer, now.step)
        else:
            undo()
            self.recover(now, advice, emit)
        parts.optimizer.lr_scale = self.recovery.lr_scale
        self.index += 1
        if self.index % self.log_every == 0 or self.index == self.steps:
            self.report(emit, seen, report)

    def advice(self, report: StepReport) -> Advice:
        """What to do after a step; where nothing was read, go on: the optimiser itself skips what is not finite."""
        due = (self.index + 1) % self.log_every == 0 or self.stop_on_nonfinite
        if not (due or self.reads_freely):
            return "go on"
        return self.recovery.after(not bool(report.skipped))

    def recover(self, now: Moment, advice: Advice, emit: Emit) -> None:
        """After a step that was not finite; raises NonFiniteError where the run stops at that."""
        if self.stop_on_nonfinite:
            raise NonFiniteError(f"step {now.step}: gradients are not finite (on_nonfinite: stop)")
        told = self.recovery.message(now.step + 1, advice)
        if told is not None:
            emit(Warned(message=told))
        if advice == "roll back" and self.recovery.remembered is not None:
            count = self.parts.optimizer.nonfinite.clone()
            self.restore(self.recovery.remembered)
            self.parts.optimizer.nonfinite = count
        self.parts.guide.forget()

    def gradients(self, now: Moment) -> Seen:
        """Leave the gradients of all views on the parameters, piece by piece; nothing else changes for good."""
        # Steps that hold a target share the moment at which it was made, and so its cameras and its draw.
        shared = Moment(self.index - self.index % self.parts.guide.hold, self.steps)
        cameras, shading = self.look(shared)
        self.parts.optimizer.clear()
        said: list[tuple[Slice, Mapping[str, float | Tensor]]] = []
        seen: Seen | None = None
        own, group = self.team.slice(len(cameras)), self.parts.camera.config.views_per_object
        for part in own.pieces(self.economy.micro_batch, group):
            seen = None  # the piece before makes room
            seen = self.piece(part, part.of(cameras), part.of(shading), now, shared)
            said.append((part, seen.values))
        assert seen is not None
        return Seen(view=seen.view, values=_means(said))

    def piece(self, part: Slice, cameras: Cameras, shading: Shading, now: Moment, shared: Moment) -> Seen:
        """Render some views, ask for guidance and penalties, and add their share to the gradients."""
        parts = self.parts
        stream = part.stream(
            parts.streams.stream("render", now.step), per_view=cameras.width_px * cameras.height_px
        )
        view = parts.scene.render(cameras, shading, stream, progress=now.progress)
        guidance = parts.guide(view, cameras, shading, now, shared, self.source(cameras, shading), part)
        loss = guidance.loss
        known = parts.scene.penalties(view) if self.weights else {}
        penalties = {name: known[name] for name in self.weights}  # scenes may compute them on look-up
        for name, ramp in self.weights.items():
            loss = loss + ramp.at(now) * penalties[name]
        for objective in (loss, guidance.aux_loss if parts.guide.learner is not None else None):
            if objective is not None:
                (objective if part.is_whole else part.share * objective).backward()
        values = {**penalties, **guidance.log, "alpha_mean": view.alpha.detach().mean()}
        return Seen(view=view, values={k: torch.as_tensor(v).detach() for k, v in values.items()})

    def economize(self, now: Moment, emit: Emit, lack: str) -> None:
        """Go on in smaller pieces from here on, and say so; NoRoomError where there are none."""
        camera, used = self.parts.camera, self.economy
        full_px = camera.size_px(now)
        views = len(self.team.slice(camera.config.batch))
        tighter = used.tighter(views, camera.config.views_per_object, full_px)
        where = (
            f"step {now.step + 1}: out of memory with {used.words()} at {used.size_px(full_px)} px ({lack})"
        )
        if tighter is None:
            raise NoRoomError(where)
        self.economy = tighter
        emit(Warned(message=f"{where}; going on with {tighter.words()}"))

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
        if self.economy.render_scale < 1.0:
            cameras = cameras.resized(self.economy.size_px(cameras.width_px))
        shading = parts.shading.sample(now, cameras, parts.streams.stream("shading", now.step))
        return cameras.to(parts.prior.device), shading.to(parts.prior.device)

    def report(self, emit: Emit, seen: Seen, report: StepReport) -> None:
        """Read numbers back from the device and pass them on."""
        learner = self.parts.guide.learner
        names = list(seen.values)
        means = self.team.total([float(seen.values[name]) for name in names])
        self.watch.report(
            emit,
            self.index,
            self.steps,
            norm=float(report.grad_norm),
            nonfinite=int(self.parts.optimizer.nonfinite),
            unlearned=0 if learner is None else int(learner.nonfinite),
            log=dict(zip(names, means, strict=True)),
        )

    @torch.no_grad()
    def preview(
        self, size_px: int, count: int = 4, azimuth_deg: float = 0.0, elevation_deg: float = 15.0
    ) -> Float[Tensor, "b 3 H W"]:
        """The scene from `count` azimuths, the first one given, on white, without touching any state."""
        cameras = turntable_cameras(count, size_px, elevation_deg, azimuth_deg=azimuth_deg)
        cameras = cameras.to(self.parts.prior.device)
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
        return tensors | {"index": torch.tensor(self.index), "recovery": self.recovery.as_tensor()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave, and remember it.

        Raises:
            CheckpointError: names or shapes do not fit this run's configuration.
        """
        self.restore(tensors)
        try:
            self.index = int(tensors["index"])
        except KeyError as error:
            raise CheckpointError(f"the checkpoint does not fit this configuration: {error}") from error
        if "recovery" in tensors:
            self.recovery.load(tensors["recovery"])
            self.parts.optimizer.lr_scale = self.recovery.lr_scale
        self.recovery.remember(tensors)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Scene, optimiser and guidance as in `state_dict`; the step counter stays. Raises as `load_state_dict`."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        try:
            self.parts.scene.load_state_dict(part("scene."))
            self.parts.optimizer.load_state_dict(part("optimizer."))
            self.parts.guide.load_state_dict(part("guide."))
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


def build_loop(
    job: "JobConfig", device: torch.device, source: Scene | None = None, start: Scene | None = None
) -> Loop:
    """Everything a job needs, loaded and wired.

    `source` is the asset to edit, from which the scene starts; `start` is the scene itself, already of the job's kind.
    """
    from sds3d.guidance.terms import buffers
    from sds3d.priors.control_pictures import known_materials
    from sds3d.scenes import build_scene

    guide = build_guide(job, device)
    if start is None:
        start = build_scene(job.scene.kind, job.scene.config, guide.streams.stream("init"), job.particles)
    scene = start.to(device)
    if source is not None:
        scene.load_state_dict(source.state_dict())
        source.to(device).eval().requires_grad_(False)
    parts = Parts(
        scene=scene,
        guide=guide,
        camera=CameraLaw(job.camera),
        shading=ShadingLaw(
            job.shading,
            also=buffers(guide.terms),
            known_materials=known_materials(guide.bank.conditions.controls),
        ),
        optimizer=Optimizer(scene.groups(), job.optimizer),
        penalties=job.penalties,
        streams=guide.streams,
        source=source,
    )
    loop = Loop(parts, job.steps, stop_on_nonfinite=job.on_nonfinite == "stop")
    loop.economy = Economy(micro_batch=job.camera.micro_batch)
    return loop


def _means(said: Sequence[tuple[Slice, Mapping[str, float | Tensor]]]) -> dict[str, float | Tensor]:
    """Values of all pieces, weighted by the shares of their views."""
    if len(said) == 1 and said[0][0].is_whole:
        return dict(said[0][1])
    return {name: sum((part.share * values[name] for part, values in said), 0.0) for name in said[0][1]}
