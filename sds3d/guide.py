"""Guidance of one run: from a render to a loss whose gradient the scene descends.

A `Guide` owns everything between the render and the gradient: prior, rules, prompts, times, noise, and the
optimiser of what the rules themselves learn.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sds3d.config.ramp import Ramp
from sds3d.errors import ConfigError
from sds3d.guidance.pixel_clip import clip_pixel_gradient
from sds3d.guidance.terms import Sees, Term
from sds3d.guidance.time import TimeLaw
from sds3d.held import Held, joined
from sds3d.interfaces import (
    Cameras,
    Draw,
    NoiseSource,
    Prior,
    Render,
    Residual,
    Rule,
    Shading,
    attach_gradient,
)
from sds3d.moment import Moment
from sds3d.ops.depth_normals import depth_normals
from sds3d.optim import Optimizer, OptimizerConfig
from sds3d.parallel import Team
from sds3d.priors.control_pictures import control_pictures
from sds3d.priors.text import TextBank
from sds3d.rng import Streams
from sds3d.slices import Slice
from sds3d.transfer import upload

LEARNER = OptimizerConfig(lr_factor=Ramp.constant(1.0), betas=(0.9, 0.99))


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """What guidance says about one render."""

    loss: Float[Tensor, ""]  # only its gradient means something
    aux_loss: Float[Tensor, ""] | None = None
    log: Mapping[str, float | Tensor] = field(default_factory=dict)


class Guide:
    """Asks the rules about renders; `hold` steps share one residual with a clean target."""

    def __init__(
        self,
        *,
        prior: Prior,
        terms: tuple[Term, ...],
        bank: TextBank,
        time: TimeLaw,
        noise: NoiseSource,
        streams: Streams,
        hold: int = 1,
        pixel_clip: float | None = None,
        score_clamp: Ramp | None = None,
    ) -> None:
        self.prior, self.terms, self.bank, self.time = prior, terms, bank, time
        self.noise, self.streams, self.hold = noise, streams, hold
        self.pixel_clip, self.score_clamp = pixel_clip, score_clamp
        self.rules = nn.ModuleList(term.rule for term in terms)
        groups = [
            replace(group, name=f"{index}.{group.name}")
            for index, term in enumerate(terms)
            for group in term.rule.groups()
        ]
        self.learner = Optimizer(groups, LEARNER) if groups else None
        self.held: dict[int, Held] = {}  # of all views
        self._made: dict[int, list[Held]] = {}  # of this step's pieces so far
        for term in terms:
            _refuse_hold(term.rule, hold)
            _refuse_latent(term, prior)

    def __call__(
        self,
        view: Render,
        cameras: Cameras,
        shading: Shading,
        now: Moment,
        shared: Moment,
        source: Callable[[], Render] | None = None,
        part: Slice | None = None,
    ) -> Guidance:
        """The guidance on a render taken at `now`; steps with the same `shared` moment hold one target.

        `source` renders the asset that is edited; it is asked only at steps that ask a rule. `part` says which of the
        step's views these are (None: all): then losses are means over these views alone. Targets of pieces
        are held from `settle` on.
        """
        part = Slice.whole(len(cameras)) if part is None else part
        fresh = shared == now or not self.held
        draw: Draw | None = None
        original: Render | None = None
        seen: dict[Sees, Tensor] = {}
        shown: dict[Sees, Tensor] = {}
        loss = view.rgb.new_zeros(())
        aux: Tensor | None = None
        log: dict[str, float | Tensor] = {}
        for index, term in enumerate(self.terms):
            if not term.acts(shared) or (term.sees == "shaded" and not shading.is_lit):
                continue
            if term.sees not in seen:
                shown[term.sees] = self.image(view, term.sees)
                seen[term.sees] = self.encoded(shown[term.sees], term.sees)
            x = seen[term.sees]
            if fresh or index not in self.held:
                draw = self.draw(view, x, cameras, shared, part) if draw is None else draw
                known = None
                if source is not None:
                    original = source() if original is None else original
                    known = self.encoded(self.image(original, term.sees), term.sees).detach()
                cond = self.bank.for_views(cameras, shading, known, self.control(view, cameras))
                residual = term.rule.residual(x.detach(), for_term(draw, index), cond)
                self._hold(index, residual, part)
            else:
                residual = self.held[index].of(part).pull(x.detach())
            loss = loss + term.weight.at(now) * self._attach(x, shown[term.sees], residual, now)
            if residual.aux_loss is not None:
                aux = residual.aux_loss if aux is None else aux + residual.aux_loss
            log |= {f"{name}{index or ''}": value for name, value in residual.log.items()}
        return Guidance(loss=loss, aux_loss=aux, log=log)

    def image(self, view: Render, sees: Sees) -> Float[Tensor, "b c H W"]:
        """What the prior is shown of a render: a picture, or for `normal_latent` normals times alpha, and alpha."""
        if sees in ("normal", "normal_latent"):
            if view.normal is None:
                raise ConfigError(f"guidance: a term sees {sees}, but this scene renders no normals")
            if sees == "normal_latent":
                return torch.cat([view.alpha * view.normal, view.alpha], 1)
            return view.alpha * (0.5 * view.normal + 0.5) + 0.5 * (1.0 - view.alpha)
        picture = view.albedo if sees == "albedo" else view.rgb
        if picture is None:
            raise ConfigError("guidance: a term sees albedo, but this scene renders none; use sees: rgb")
        return picture if self.pixel_clip is None else clip_pixel_gradient(picture, self.pixel_clip)

    def encoded(self, image: Float[Tensor, "b c H W"], sees: Sees) -> Float[Tensor, "b q h w"]:
        """The picture as the prior's x. Normals as latents are only resized (Fantasia3D, arXiv:2303.13873)."""
        if sees != "normal_latent":
            return self.prior.encode(image)
        size = self.prior.shape[1:]
        return F.interpolate(image, size=size, mode="bilinear", antialias=image.shape[-1] > size[-1])

    def control(self, view: Render, cameras: Cameras) -> Float[Tensor, "b q H W"] | None:
        """The scene's own geometry as the prior's control networks see it, without gradient; None without them."""
        kinds = self.bank.conditions.controls
        if not kinds:
            return None
        if not {"normal", "dreammat"}.isdisjoint(kinds) and view.normal is None:
            # Scenes render normals only where shading needs them.
            view = replace(view, normal=depth_normals(view.depth.detach(), view.alpha.detach(), cameras))
        return control_pictures(view, cameras, kinds)

    def draw(self, view: Render, x: Tensor, cameras: Cameras, now: Moment, part: Slice | None = None) -> Draw:
        """The randomness of a step, for all terms: a pure function of seed, step, and the noise source's state.

        It is drawn for all views of the step and cut to those of `part` (None: these are all).
        """
        part = Slice.whole(len(x)) if part is None else part
        whole = self.streams.stream("diffusion", now.step)
        stream = part.stream(whole)
        times = self.time.sample(now, part.total, whole.fork("time"))
        t = upload(times[part.rows], x.device)
        shape = (x.shape[0], x.shape[1], x.shape[2], x.shape[3])
        noise = self.noise.sample(shape, view, cameras, now, stream.fork("noise"))
        return Draw(
            t=self.prior.schedule.snap(t),
            noise=upload(noise, x.device, x.dtype),
            schedule=self.prior.schedule,
            stream=stream,
            now=now,
        )

    def learn(self, aux_loss: Float[Tensor, ""] | None, now: Moment) -> None:
        """Let the rules' own parameters take a step; where their loss is not finite nothing changes."""
        if self.learner is not None and aux_loss is not None:
            self.learner.step(aux_loss, now)

    def begin(self) -> Callable[[], None]:
        """Before the pieces of a step; the answer undoes what they changed, should the step not come about."""
        self._made = {}
        if self.learner is not None:
            self.learner.clear()
        before = {name: value.detach().clone() for name, value in self.noise.state_dict().items()}
        held = dict(self.held)

        def undo() -> None:
            self.noise.load_state_dict(before)
            self.held = held
            self.begin()

        return undo

    def forget(self) -> None:
        """Drop held targets; the next step asks the rules anew."""
        self.held = {}

    def settle(self, now: Moment, team: Team) -> None:
        """After all pieces of a step: hold their targets, and let the rules' own parameters take a step.

        Where their gradients are not finite nothing changes.
        """
        for index, pieces in sorted(self._made.items()):
            self.held[index] = joined(pieces, team)
        self._made = {}
        if self.learner is None:
            return
        team.add_gradients(self.learner.params())
        if any(p.grad is not None for p in self.learner.params()):
            self.learner.update(now)

    def limited(self, grad: Float[Tensor, "b c h w"], now: Moment) -> Float[Tensor, "b c h w"]:
        """The gradient clamped elementwise, where the run asks for it."""
        if self.score_clamp is None:
            return grad
        limit = self.score_clamp.at(now)
        return grad.clamp(-limit, limit)

    def _attach(self, x: Tensor, shown: Tensor, residual: Residual, now: Moment) -> Float[Tensor, ""]:
        loss = attach_gradient(x, self.limited(residual.grad, now))
        if residual.image_target is not None and shown.shape[1] == residual.image_target.shape[1]:
            size = residual.image_target.shape[-2:]
            shrinks = shown.shape[-1] > size[-1]
            rgb = F.interpolate(shown, size=size, mode="bilinear", antialias=shrinks)
            away = residual.image_weight * (rgb.detach() - residual.image_target)
            loss = loss + attach_gradient(rgb, away)
        return loss

    def _hold(self, index: int, residual: Residual, part: Slice) -> None:
        held = Held.from_residual(residual) if self.hold > 1 else None
        if held is None:
            return
        if part.is_whole:
            self.held[index] = held
        else:
            self._made.setdefault(index, []).append(held)

    def state_dict(self) -> dict[str, Tensor]:
        """Rules, noise source, learner and held targets, as tensors by name."""
        tensors = {f"rule.{k}": v.detach().clone() for k, v in self.rules.state_dict().items()}
        tensors |= {f"noise.{k}": v.detach().clone() for k, v in self.noise.state_dict().items()}
        if self.learner is not None:
            tensors |= {f"learner.{k}": v for k, v in self.learner.state_dict().items()}
        for index, held in self.held.items():
            for name, value in vars(held).items():
                if value is not None:
                    tensors[f"held.{index}.{name}"] = torch.as_tensor(value).clone()
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave; KeyError or RuntimeError where names or shapes do not fit."""
        self.rules.load_state_dict(_part(tensors, "rule."))
        self.noise.load_state_dict(_part(tensors, "noise."))
        if self.learner is not None:
            self.learner.load_state_dict(_part(tensors, "learner."))
        self.held = {}
        held = _part(tensors, "held.")
        for index in sorted({int(key.partition(".")[0]) for key in held}):
            values = {k: v.to(self.prior.device) for k, v in _part(held, f"{index}.").items()}
            weight = float(values.pop("image_weight"))
            self.held[index] = Held(**values, image_weight=weight)


def for_term(draw: Draw, index: int) -> Draw:
    """The draw of one term: the same time and noise, a random stream of its own."""
    return draw if index == 0 else replace(draw, stream=draw.stream.fork(f"term{index}"))


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _refuse_latent(term: Term, prior: Prior) -> None:
    if term.sees == "normal_latent" and prior.shape[0] != 4:
        raise ConfigError(
            f"guidance: sees: normal_latent needs a prior with latents of 4 channels, this one has {prior.shape[0]}; "
            "use sees: normal"
        )


def _refuse_hold(rule: Rule, hold: int) -> None:
    if hold > 1 and not rule.has_target:
        raise ConfigError(
            f"camera.hold_steps = {hold} needs a guidance rule with a clean target; "
            f"{type(rule).__name__} has none: use hold_steps 1 or guidance.kind sds"
        )
