"""The nouns of sds3d: what flows between the stages of one optimisation step, and what each stage promises.

The way of one step (see `optimize.py`):

    CameraLaw -> Cameras --Scene.render--> Render.rgb --Prior.encode--> x
    (TimeLaw, NoiseSource) -> Draw --Draw.diffuse(x)--> x_t --Prior.eps--> eps
    Rule.residual(x, draw, condition) -> Residual --attach_gradient--> scene parameters

Axis letters, fixed once: b views, c prior channels, h w prior size, H W image size, n tokens or points,
d feature, v vertices, f faces, g gaussians.

World frame (as glTF): right-handed, +y up, the object's front faces +z, metres. Camera frame (OpenCV): x right,
y down, z forward. Colours are sRGB in [0, 1] unless a name says otherwise. Diffusion time t lies in [0, 1] for
every model family: 0 is clean, 1 is noise.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sds3d.moment import Moment
from sds3d.rng import Stream
from sds3d.transfer import upload


def _tensors_on(record: object, device: torch.device | str) -> dict[str, Any]:
    """The tensor fields of a record, on another device."""
    return {key: upload(value, device) for key, value in vars(record).items() if isinstance(value, Tensor)}


@dataclass(frozen=True, kw_only=True)
class Cameras:
    """b pinhole cameras that look at one scene; all share one image size."""

    c2w: Float[Tensor, "b 4 4"]  # camera (OpenCV axes) to world
    intrinsics: Float[Tensor, "b 3 3"]  # pixels; pixel centres at +0.5
    width_px: int
    height_px: int
    azimuth_deg: Float[Tensor, " b"]  # 0 = front (+z), 90 = +x: counter-clockwise seen from above
    elevation_deg: Float[Tensor, " b"]  # 0 = horizon, +90 = top
    radius: Float[Tensor, " b"]  # metres from the world origin
    fov_deg: Float[Tensor, " b"]  # vertical field of view

    def __len__(self) -> int:
        return self.c2w.shape[0]

    def to(self, device: torch.device | str) -> "Cameras":
        """The same cameras with their tensors on another device."""
        return replace(self, **_tensors_on(self, device))

    def resized(self, size_px: int) -> "Cameras":
        """The same cameras with square images of another size."""
        scale = torch.tensor([size_px / self.width_px, size_px / self.height_px, 1.0])
        intrinsics = self.intrinsics * scale.to(self.intrinsics)[None, :, None]
        return replace(self, intrinsics=intrinsics, width_px=size_px, height_px=size_px)


ShadingMode = Literal["albedo", "textureless", "lambertian", "pbr"]
Buffer = Literal["albedo", "normal"]  # pictures that a render holds only where they are asked for
KnownMaterial = tuple[float, float]  # metallic, roughness of a white surface


@dataclass(frozen=True, kw_only=True)
class Shading:
    """How the scene is lit and what stands behind it, chosen per step by the shading law."""

    mode: ShadingMode = "albedo"
    background: Float[Tensor, "b 3"] | None = None  # sRGB; None = the scene's own background, else black
    light: Float[Tensor, "b 3"] | None = None  # unit vectors towards the light, world frame
    ambient: float = 1.0  # shade = ambient + (1 - ambient) * max(0, n.l) for textureless and lambertian
    environment: str = ""  # pbr: a name of `ops/skies.py` or a lat-long file
    turn_deg: Float[Tensor, " b"] | None = None  # pbr: how far the environment is turned about +y; None = not
    intensity: float = 1.0  # pbr: factor on the environment
    specular: float = 1.0  # pbr: factor on the reflection of non-metals
    also: tuple[Buffer, ...] = ()  # what the render shall hold besides
    known_materials: tuple[KnownMaterial, ...] = ()  # pbr: what `Render.light` shall show, in this order

    @property
    def is_lit(self) -> bool:
        """Whether `rgb` shows the scene's own colours under a light."""
        return self.mode in ("lambertian", "pbr")

    def to(self, device: torch.device | str) -> "Shading":
        """The same shading with its tensors on another device."""
        return replace(self, **_tensors_on(self, device))


@dataclass(frozen=True, kw_only=True)
class Render:
    """What a scene shows to b cameras. All fields except `private` are differentiable."""

    rgb: Float[Tensor, "b 3 H W"]  # sRGB in [0, 1], composited over the background
    alpha: Float[Tensor, "b 1 H W"]  # [0, 1]
    depth: Float[Tensor, "b 1 H W"]  # alpha-weighted metres along the camera z axis; 0 where alpha = 0
    normal: Float[Tensor, "b 3 H W"] | None = None  # world frame, unit length where alpha > 0
    albedo: Float[Tensor, "b 3 H W"] | None = None  # `rgb` as it is without light, over the same background
    light: Float[Tensor, "b l H W"] | None = (
        None  # rgb of `Shading.known_materials` in the place of its own, sRGB over black; no gradient
    )
    private: object = None  # only the scene that made it may look inside


@dataclass(frozen=True, kw_only=True)
class Told:
    """One bundle of what the prior is told about b views: one row of a batched network call."""

    text: Float[Tensor, "b n d"]  # opaque: only the prior that made it looks inside
    image: Float[Tensor, "b m e"] | None = None  # embedding of an image prompt; None beside others: no image
    control: Float[Tensor, "b q H W"] | None = None  # pictures in [0, 1] that steer the layout (ControlNet)
    cameras: Cameras | None = None
    background: Float[Tensor, "b 3"] | None = None


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What is known about b views. A None field means: this prior or run has no such condition.

    Enters: `negatives` and `negative_weights` by Perp-Neg, `cameras` and `background` by camera-conditioned
    priors, `extra` by rules that ask for prompts of their own (`Rule.prompts`), `image` by image-prompt rules,
    `source` by editing rules, `control` by priors with control networks. The null bundle keeps background and
    control (they are known, not asked for) but drops text and camera.
    """

    text: Float[Tensor, "b n d"]  # view-dependent
    null: Float[Tensor, "b n d"]  # the empty prompt
    negative: Float[Tensor, "b n d"] | None = None  # the negative prompt, where one is given
    plain: Float[Tensor, "b n d"] | None = None  # the prompt without view words
    prompt: str = ""  # in words, for rewards
    extra: Mapping[str, Float[Tensor, "b n d"]] = field(default_factory=dict)
    image: Float[Tensor, "b m e"] | None = None
    no_image: Float[Tensor, "b m e"] | None = None  # "no picture", for the bundles beside the image prompt
    source: Float[Tensor, "b c h w"] | None = (
        None  # x of the asset that is being edited, seen by these cameras
    )
    negatives: Float[Tensor, "b k n d"] | None = None  # view-dependent Perp-Neg negatives
    negative_weights: Float[Tensor, "b k"] | None = None
    cameras: Cameras | None = None
    background: Float[Tensor, "b 3"] | None = None
    control: Float[Tensor, "b q H W"] | None = (
        None  # goes with every bundle: the layout is known, not asked for
    )
    camera_always: bool = False  # multi-view priors are told the camera with the empty prompt too

    def as_text(self) -> Told:
        """Prompt, camera and background."""
        return self._tell(self.text, camera=True)

    def as_image(self) -> Told:
        """Prompt and image prompt, camera and background; ValueError where there is no image prompt."""
        if self.image is None:
            raise ValueError("this condition holds no image prompt")
        return replace(self._tell(self.text, camera=True), image=self.image)

    def as_null(self) -> Told:
        """Empty prompt, no camera."""
        return self._tell(self.null)

    def as_base(self) -> Told:
        """What classifier-free guidance moves away from: the negative prompt where given, else the null bundle."""
        return self._tell(self.null if self.negative is None else self.negative)

    def as_extra(self, name: str) -> Told:
        """A rule's own prompt with camera and background; KeyError for a name that the rule did not ask for."""
        return self._tell(self.extra[name], camera=True)

    def as_negative(self, index: int) -> Told:
        """The index-th Perp-Neg negative of every view (no camera: it would contradict the view word)."""
        if self.negatives is None:
            raise ValueError("this condition holds no Perp-Neg negatives")
        return self._tell(self.negatives[:, index])

    def _tell(self, text: Float[Tensor, "b n d"], *, camera: bool = False) -> Told:
        cameras = self.cameras if camera or self.camera_always else None
        return Told(
            text=text,
            image=self.no_image,
            control=self.control,
            cameras=cameras,
            background=self.background,
        )


@runtime_checkable
class NoiseSchedule(Protocol):
    """x_t = alpha(t) x + sigma(t) noise, with t in [0, 1]: 0 is clean, 1 is noise, for every family."""

    def alpha(self, t: Float[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]: ...

    def sigma(self, t: Float[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]: ...

    def snap(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The nearest t the network was trained on; idempotent."""
        ...


@dataclass(frozen=True, kw_only=True)
class Draw:
    """All randomness of one guidance step. A rule given the same draw returns the same numbers."""

    t: Float[Tensor, " b"]
    noise: Float[Tensor, "b c h w"]
    schedule: NoiseSchedule
    stream: Stream
    now: Moment = field(default_factory=lambda: Moment(0, 1))

    @property
    def alpha(self) -> Float[Tensor, "b 1 1 1"]:
        """The signal level at t."""
        return self.schedule.alpha(self.t)

    @property
    def sigma(self) -> Float[Tensor, "b 1 1 1"]:
        """The noise level at t."""
        return self.schedule.sigma(self.t)

    def diffuse(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """alpha(t) x + sigma(t) noise."""
        return self.alpha * x + self.sigma * self.noise

    def fork(self, index: int) -> "Draw":
        """The same t with fresh, independent noise."""
        stream = self.stream.fork(str(index))
        noise = stream.normal(*self.noise.shape, device=self.noise.device).to(self.noise)
        return replace(self, noise=noise, stream=stream)


@runtime_checkable
class Prior(Protocol):
    """A frozen 2D diffusion model seen as eps-prediction. Latent or pixel space, eps / v / x0 / flow: hidden here."""

    device: torch.device
    shape: tuple[int, int, int]  # (c, h, w) of x
    image_px: int  # side of the RGB image that encode() resizes to

    @property
    def schedule(self) -> NoiseSchedule: ...

    def encode_text(self, prompts: Sequence[str]) -> Float[Tensor, "p n d"]: ...

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """What the user should know about these prompts, e.g. words outside a closed vocabulary."""
        ...

    def encode(self, rgb: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Differentiable; resizes to `image_px` and maps [0, 1] sRGB to the space of x."""
        ...

    def decode(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Back to sRGB; may leave [0, 1] a little."""
        ...

    def eps(
        self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], *told: Told
    ) -> tuple[Float[Tensor, "b c h w"], ...]:
        """Noise predictions, one per bundle, from one batched network call without gradient."""
        ...


@dataclass(frozen=True, kw_only=True)
class Residual:
    """What a rule says about x. `grad` is d(objective)/dx per view; the scene descends it."""

    grad: Float[Tensor, "b c h w"]
    target: Float[Tensor, "b c h w"] | None = None  # clean image the rule pulls towards, if the rule has one
    weight: Float[Tensor, "b 1 1 1"] | None = None  # grad = weight * (x - target) where target is given
    image_target: Float[Tensor, "b 3 P P"] | None = (
        None  # adds image_weight (rgb - image_target) in image space
    )
    image_weight: float = 0.0
    aux_loss: Float[Tensor, ""] | None = None  # for the rule's own parameters (student, corrective net)
    log: Mapping[str, float | Tensor] = field(
        default_factory=dict
    )  # scalars; read only when a step is reported


@dataclass(frozen=True, kw_only=True)
class ParamGroup:
    """Parameters that share one learning rate; the optimiser's unit."""

    name: str
    params: Sequence[nn.Parameter]
    lr: float


Need = Literal["student", "image prompt", "flow", "source"]


@dataclass(frozen=True, kw_only=True)
class RuleInfo:
    """What `sds3d methods` says about a rule."""

    title: str
    paper: str  # "Poole et al. 2022, arXiv:2209.14988"
    passes: str  # prior evaluations per view and step, e.g. "2", "4-8"
    state: str = "none"  # what it learns or keeps besides the scene
    experimental: bool = False  # reconstructed from an abstract, or coefficients not published
    needs: tuple[Need, ...] = ()  # what the run must offer, refused before any model loads


class Rule(nn.Module, ABC):
    """A score-distillation rule. Subclasses are final: a variant is a new file or a wrapper, never an override.

    A stateless rule is its nested `Config`, its `info` and its `residual`. `has_target` says that residuals carry a
    clean target, which a run may hold for several steps.
    """

    info: ClassVar[RuleInfo]
    has_target: bool = False

    def __init__(self, config: Any, prior: Prior, stream: Stream | None = None) -> None:
        """`stream` seeds the initial values of the rule's own parameters."""
        super().__init__()
        self.config, self.prior = config, prior

    @abstractmethod
    def residual(self, x: Float[Tensor, "b c h w"], draw: Draw, cond: Condition) -> Residual:
        """The gradient on x (already detached) for this draw."""

    @classmethod
    def needs(cls, config: Any) -> tuple[Need, ...]:
        """What a run with this config must offer; wrappers add the needs of the rules inside."""
        return cls.info.needs

    def prompts(self) -> Mapping[str, str]:
        """Extra prompts by name, for `Condition.extra`; "{prompt}" stands for the run's prompt."""
        return {}

    def groups(self) -> Sequence[ParamGroup]:
        """The rule's own trainable parameters; they learn from `Residual.aux_loss`."""
        return ()


class NoiseSource(nn.Module, ABC):
    """Where the noise of a step comes from: fresh, fixed, or attached to the surface. Buffers go to checkpoints."""

    @abstractmethod
    def sample(
        self, shape: tuple[int, int, int, int], view: "Render", cameras: Cameras, now: Moment, stream: Stream
    ) -> Float[Tensor, "b c h w"]:
        """Noise for the views of this step, N(0, 1) per element. Called once per step, in order."""


class Reward(Protocol):
    """Scores images against a prompt; need not be differentiable."""

    def __call__(self, images: Float[Tensor, "b 3 H W"], prompt: str) -> Float[Tensor, " b"]: ...


class Student(nn.Module, ABC):
    """A trainable noise predictor that follows the distribution of rendered images (VSD's phi)."""

    @abstractmethod
    def eps(
        self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], *told: Told
    ) -> tuple[Float[Tensor, "b c h w"], ...]:
        """Noise predictions, one per bundle, from one batched call; differentiable where autograd is on."""

    @abstractmethod
    def groups(self) -> Sequence[ParamGroup]:
        """Its trainable parameters."""


@runtime_checkable
class Teacher(Protocol):
    """A prior that can give a student: a trainable predictor that equals it at the start."""

    def student(self, *, rank: int, lr: float, convolutions: bool, stream: Stream) -> Student:
        """A LoRA of this rank (convolutions adapted too where asked); `stream` seeds its initial values."""
        ...


@dataclass(frozen=True, kw_only=True)
class Surface:
    """A triangle mesh in world coordinates, counter-clockwise seen from outside."""

    vertices: Float[Tensor, "v 3"]  # metres
    faces: Int[Tensor, "f 3"]


@dataclass(frozen=True, kw_only=True)
class Material:
    """glTF metallic-roughness material at n points."""

    base_color: Float[Tensor, "n 3"]  # sRGB in [0, 1]
    metallic: Float[Tensor, "n 1"]
    roughness: Float[Tensor, "n 1"]
    bump: Float[Tensor, "n 3"] | None = (
        None  # world frame, added to the unit normal; its part along the normal means nothing
    )


@runtime_checkable
class Optimizer(Protocol):
    """The part of the optimiser that a scene may use to keep its state in step with changed parameters."""

    def replace(
        self, name: str, old: nn.Parameter, new: nn.Parameter, gather: Int[Tensor, " m"], fresh: Tensor
    ) -> None:
        """Swap `old` for `new` in group `name`.

        Row i of Adam's moments becomes row gather[i] of the old ones, or zero where the boolean `fresh[i]` is set.
        """
        ...


class Scene(nn.Module, ABC):
    """Something that can be rendered, optimised, and turned into a textured surface."""

    penalty_names: tuple[str, ...] = ()
    needs_start: ClassVar[bool] = (
        False  # cannot begin from nothing: a run of it starts from another run's scene
    )
    takes_environment: ClassVar[bool] = False  # renders shading mode "pbr"

    @abstractmethod
    def render(self, cameras: Cameras, shading: Shading, rng: Stream, *, progress: float = 1.0) -> Render:
        """Render b views. `progress` in [0, 1] is the fraction of the run done (coarse-to-fine, band masks)."""

    @abstractmethod
    def groups(self) -> Sequence[ParamGroup]:
        """All trainable parameters with their learning rates."""

    def adapt(self, view: Render, optimizer: Optimizer, step: int) -> None:
        """After the optimiser step: densify, prune, refresh occupancy. Deterministic given the step."""
        return

    @abstractmethod
    def surface(self, cells_per_side: int, *, iso_factor: float = 1.0) -> Surface:
        """The scene's surface at `iso_factor` times an iso value that is chosen from the field.

        Raises ExportError when there is none.
        """

    @abstractmethod
    def material(self, points: Float[Tensor, "n 3"]) -> Material:
        """Material at points on (or near) the surface."""

    def penalties(self, view: Render) -> Mapping[str, Float[Tensor, ""]]:
        """Differentiable regularisers by name, each a scalar mean, unweighted."""
        return {}


def attach_gradient(x: Float[Tensor, "b c h w"], grad: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Scalar whose derivative with respect to x is grad / b; its value means nothing and is never logged as a loss.

    The only place where a rule meets autograd.
    """
    return (x * grad.detach()).sum() / x.shape[0]
