"""How a rule's student learns: what it is told about views, and its denoising loss."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.config.option import option
from sds3d.errors import ConfigError
from sds3d.interfaces import Cameras, Condition, Draw, NoiseSchedule, Prior, Student, Teacher, Told
from sds3d.rng import Stream

Target = Literal["noise", "v", "x0"]


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The trainable copy of the prior and how it learns."""

    rank: int = option(4, help="rank of the LoRA", ge=1, le=256)
    convolutions: bool = option(
        False, help="adapt the convolutions of residual blocks too, for UNets with little attention"
    )
    lr: float = option(1e-4, help="its learning rate (Adam)", ge=0.0)
    target: Target = option("noise", help="what its mean squared error is measured on")
    batch: int | None = option(
        None, help="noisy images it learns from per step, dealt round the views; null = one per view", ge=1
    )
    camera_dropout: float = option(0.1, help="share of its steps without a camera", ge=0.0, le=1.0)
    text_dropout: float = option(
        0.0, help="share of its steps with the empty prompt and no camera", ge=0.0, le=1.0
    )


def student_of(prior: Prior, config: StudentConfig, stream: Stream | None) -> Student:
    """A student of this prior, equal to it at the start.

    Raises:
        ConfigError: the prior cannot give one.
    """
    if not isinstance(prior, Teacher):
        raise ConfigError(
            f"guidance: this rule trains a student, which a {type(prior).__name__} cannot give; "
            "use a UNet prior such as prior.name=toybox"
        )
    return prior.student(
        rank=config.rank,
        lr=config.lr,
        convolutions=config.convolutions,
        stream=stream or Stream(0, "student"),
    )


def told_student(cond: Condition, *, camera: bool = True) -> Told:
    """What a student is told: the prompt without view words, so that only the camera speaks of the view."""
    text = cond.text if cond.plain is None else cond.plain
    cameras = cond.cameras if camera else None
    return Told(text=text, cameras=cameras, background=cond.background, control=cond.control)


def denoising_loss(
    student: Student,
    x: Float[Tensor, "b c h w"],
    told: Told,
    schedule: NoiseSchedule,
    stream: Stream,
    target: Target = "noise",
) -> Float[Tensor, ""]:
    """Mean of c(t) (eps_student(x_t, t) - noise)^2, t uniform over the schedule, fresh noise, one t per image.

    c = 1 measures the error of the noise, 1 / alpha^2 that of v (or of a flow's velocity), (sigma / alpha)^2 that of
    x0. `x` must carry no gradient. Networks that predict x0 or v should learn on what they predict: the noise they
    imply at small t is their own error times alpha / sigma.
    """
    # Not quite 0 and 1: there the student would learn from a clean image, or x0 would be divided by alpha = 0.
    t = 0.001 + 0.998 * stream.fork("t").uniform(len(x), 1, device=x.device)[:, 0].to(x)
    t = schedule.snap(t)
    a, s = schedule.alpha(t), schedule.sigma(t)
    noise = stream.fork("noise").normal(*x.shape, device=x.device).to(x)
    (eps,) = student.eps(a * x + s * noise, t, told)
    scale = {"noise": torch.ones_like(a), "v": 1.0 / a, "x0": s / a}[target]
    return (scale * (eps - noise)).square().mean()


def student_loss(
    student: Student, config: StudentConfig, x: Float[Tensor, "b c h w"], draw: Draw, cond: Condition
) -> Float[Tensor, ""]:
    """The denoising loss on the renders of this step, with prompt or camera dropped in some of the steps."""
    stream = draw.stream.fork("student")
    told = told_student(cond, camera=float(stream.fork("camera").uniform(1)) >= config.camera_dropout)
    if float(stream.fork("text").uniform(1)) < config.text_dropout:
        told = cond.as_null()
    if config.batch is not None and config.batch != len(x):
        # Different views at every step where there are fewer images than views.
        first = int(stream.fork("first").uniform(1) * len(x))
        rows = (first + torch.arange(config.batch, device=x.device)) % len(x)
        x, told = x[rows], _rows(told, rows)
    return denoising_loss(student, x, told, draw.schedule, stream, config.target)


def _rows(told: Told, rows: Tensor) -> Told:
    """The bundle of some of the views."""

    def pick(value: Any) -> Any:
        if isinstance(value, Cameras):
            tensors: dict[str, Any] = {k: v[rows] for k, v in vars(value).items() if isinstance(v, Tensor)}
            return replace(value, **tensors)
        return value[rows] if isinstance(value, Tensor) else value

    return Told(**{spec.name: pick(getattr(told, spec.name)) for spec in fields(told)})
