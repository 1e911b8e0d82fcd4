"""`JobConfig`: everything a run depends on, as one frozen record; see `configs/default.yaml` for its YAML."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch

from sds3d.asset import AssetConfig
from sds3d.cameras.light import ShadingConfig
from sds3d.cameras.sample import CameraConfig
from sds3d.config.dump import config_hash
from sds3d.config.load import Resolved, file_layers, find_config, resolve
from sds3d.config.option import Chosen, kinds, option
from sds3d.config.tree import Table
from sds3d.convert import StartConfig
from sds3d.errors import ConfigError, InputError
from sds3d.guidance.noise import NOISES
from sds3d.guidance.terms import guidance_needs, guidance_table, term_configs
from sds3d.guidance.time import TIME_LAWS
from sds3d.optim import OptimizerConfig
from sds3d.optimize import PenaltyConfig
from sds3d.priors import PriorConfig, missing_offer, needed_views, prior_offers
from sds3d.priors.control_pictures import known_materials
from sds3d.priors.text import PromptingConfig
from sds3d.scenes import SCENES

# A run resumed with other values here still takes the same steps.
_NOT_IN_HASH = ("device", "memory", "checkpoint", "preview", "export", "on_collapse", "max_reseeds")


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What a run may take, and whether it is fitted into that before it starts."""

    limit_gb: float | None = option(
        None, help="GiB that the device gives this process at most; null = what is free", ge=0.01
    )
    plan: Literal["auto", "none"] = option(
        "auto",
        help="auto = estimate before the run, save where needed and refuse what cannot fit; none = just start",
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state of a run goes to disk."""

    every_steps: int = option(100, help="steps between checkpoints", ge=1)
    keep: int = option(2, help="how many of the last checkpoints stay on disk", ge=1)


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """The picture that is refreshed while a run goes on, and the video at its end."""

    every_s: float = option(5.0, help="seconds between previews", ge=0.0)
    size_px: int = option(256, help="width of preview.png in pixels", ge=32, le=2048)
    views: int = option(4, help="sides of the scene in preview.png, tiled row by row", ge=1, le=36)
    turn_deg: float = option(
        0.0, help="by how much these sides turn from picture to picture", ge=-180.0, le=180.0
    )
    turntable_px: int = option(256, help="side of turntable.mp4 and of a contact sheet tile", ge=32, le=2048)
    turntable_frames: int = option(48, help="frames of turntable.mp4; 0 = no video", ge=0, le=1000)


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """Editing: the run starts from another run's asset, and rules that compare (dds, pds) see it."""

    run: str | None = option(
        None, help="run folder of the asset to edit; its scene settings must fit", path=True
    )


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """One run: prompt to asset."""

    prompt: str | None = option(None, help="what to make; usually given on the command line")
    negative_prompt: str = option("", help="what to steer away from")
    seed: int = option(0, help="fixes every random number of the run", ge=0, le=2**53)
    steps: int = option(500, help="optimisation steps", ge=1, le=10_000_000)
    device: Literal["auto", "cpu", "cuda"] = option("auto", help="auto = cuda where there is one")
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    prompting: PromptingConfig = field(default_factory=PromptingConfig)
    scene: Chosen = kinds(SCENES, next(iter(SCENES)), help="what is optimised")
    particles: int = option(
        1, help="scenes that are optimised together, one per step in turn (VSD)", ge=1, le=16
    )
    guidance: Chosen = kinds(guidance_table, "sds", help="the score-distillation rule, or mix for several")
    time: Chosen = kinds(TIME_LAWS, "uniform", help="which diffusion times the steps use")
    noise: Chosen = kinds(NOISES, "fresh", help="where the noise of a step comes from")
    camera: CameraConfig = field(default_factory=CameraConfig)
    shading: ShadingConfig = field(default_factory=ShadingConfig)
    penalties: PenaltyConfig = field(default_factory=PenaltyConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    on_nonfinite: Literal["recover", "stop"] = option(
        "recover",
        help="at a step whose gradients are not finite: undo it and go on more slowly, or end the run",
    )
    on_collapse: Literal["report", "reseed", "stop"] = option(
        "report",
        help="when the scene is empty, opaque, saturated or two-faced: say so, begin again, or end the run",
    )
    max_reseeds: int = option(2, help="with on_collapse reseed: how many other seeds are tried", ge=0, le=100)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    edit: EditConfig = field(default_factory=EditConfig)
    start: StartConfig = field(default_factory=StartConfig)
    export: AssetConfig = field(default_factory=AssetConfig)

    def text(self) -> str:
        """The prompt; raises ConfigError where it is missing or blank."""
        if self.prompt is None or not self.prompt.strip():
            raise ConfigError('prompt: empty; say what to make, e.g. sds3d generate "a red mug"')
        return self.prompt

    def validate(self, *, source_given: bool = False) -> None:
        """Checks across fields, before anything is loaded or written; `source_given`: there is something to edit.

        Raises:
            ConfigError or InputError, with a message for the user.
        """
        self.text()
        pick_device(self.device)
        known = SCENES[self.scene.kind].penalty_names
        active = [spec.name for spec in fields(self.penalties) if spec.name in self.penalties.active()]
        unknown = [name for name in active if name not in known]
        if unknown:
            raise ConfigError(
                f"penalties.{unknown[0]}: a {self.scene.kind!r} scene has no such penalty. "
                f"It has {', '.join(known) or 'none'}; set this weight to 0."
            )
        self._check_needs(source_given or self.edit.run is not None)
        self._check_views()
        self._check_light()
        self._check_particles()
        self._check_start()
        if self.preview.turntable_px % 2:
            raise ConfigError(
                f"preview.turntable_px: got {self.preview.turntable_px}, expected an even number"
            )
        for name in ("elevation_deg", "azimuth_deg", "overhead_deg", "radius", "fov_deg"):
            low, high = getattr(self.camera, name)
            if low > high:
                raise ConfigError(f"camera.{name}: got [{low}, {high}], expected the smaller value first")

    def _check_particles(self) -> None:
        """Targets and edits belong to one scene."""
        if self.particles > 1 and self.camera.hold_steps > 1:
            raise ConfigError(
                f"particles: got {self.particles} with camera.hold_steps = {self.camera.hold_steps}; a held target "
                "belongs to one scene, so set camera.hold_steps=1"
            )
        if self.particles > 1 and self.edit.run is not None:
            raise ConfigError(
                f"particles: got {self.particles}, but edit.run edits one scene; set particles=1"
            )

    def _check_start(self) -> None:
        """Some scenes need one; it is one scene, and not edited at the same time."""
        start = self.start
        if SCENES[self.scene.kind].needs_start and start.run is None and start.mesh is None:
            raise ConfigError(
                f"scene.kind: a {self.scene.kind!r} scene starts from another run; set start.run to its folder, "
                "start.mesh to a mesh file, or make it a stage (configs with stages:)"
            )
        given = [name for name in ("run", "mesh") if getattr(start, name) is not None]
        if len(given) > 1:
            raise ConfigError("start.run: cannot be combined with start.mesh; remove one of them")
        if given and (self.edit.run is not None or self.particles > 1):
            other = "edit.run" if self.edit.run is not None else "particles"
            raise ConfigError(f"start.{given[0]}: cannot be combined with {other}; remove one of them")

    def _check_needs(self, source_given: bool) -> None:
        """Refuse rules that ask for what this run does not offer."""
        asked = guidance_needs(self.guidance)
        offered = prior_offers(self.prior)
        for need, kind in asked.items():
            if need == "source":
                if not source_given:
                    raise ConfigError(
                        f"guidance.kind {kind!r} edits an existing asset: set edit.run to the folder of a finished run"
                    )
            elif need not in offered:
                raise ConfigError(f"guidance.kind {kind!r} {missing_offer(need, self.prior.name)}")
        if self.prior.image_prompt is not None and "image prompt" not in asked:
            raise ConfigError(
                f"prior.image_prompt: guidance.kind {self.guidance.kind!r} looks at no picture; use guidance.kind "
                "isd (with variate 0 it is SDS with the picture), or remove the setting"
            )

    def _check_light(self) -> None:
        """Image-based light needs a material to fall on, and those who look at light need light."""
        shading = self.shading
        shading.check()
        if shading.uses_environment and not SCENES[self.scene.kind].takes_environment:
            able = ", ".join(kind for kind, scene in SCENES.items() if scene.takes_environment)
            raise ConfigError(
                f"shading.light: a {self.scene.kind!r} scene has no metallic and roughness that learn, so it cannot "
                f"be lit by an environment; use shading.light=lamp, or one of these scenes: {able}"
            )
        dark = max(shading.lit.start, shading.lit.end) == 0.0
        if dark and any(term.sees == "shaded" for term in term_configs(self.guidance)):
            raise ConfigError(
                "guidance.terms: one sees shaded, but no step is lit; set shading.lit above 0, or use sees: rgb"
            )
        for index, control in enumerate(self.prior.controls):
            if known_materials([control.kind]) and not shading.always_environment:
                raise ConfigError(
                    f"prior.controls[{index}]: kind {control.kind} shows the light of every step; set shading.lit=1, "
                    "shading.light=environment and shading.textureless_frac=0"
                )

    def _check_views(self) -> None:
        """Refuse cameras and times that a prior of jointly denoised views cannot use."""
        needed = needed_views(self.prior)
        if needed == 1:
            return
        if self.camera.views_per_object != needed:
            raise ConfigError(
                f"camera.views_per_object: got {self.camera.views_per_object}, but the prior {self.prior.name!r} "
                f"denoises {needed} views of one object jointly; set camera.views_per_object={needed} and "
                f"camera.batch to a multiple of {needed}, or start from the preset mvdream"
            )
        for name in ("per_view", "spread"):
            if getattr(self.time.config, name, False):
                raise ConfigError(
                    f"time.{name}: the prior {self.prior.name!r} denoises {needed} views at one common t; "
                    f"set it to {'false' if name == 'per_view' else '0'}"
                )

    def hash(self) -> str:
        """Equal for two jobs that take the same optimisation steps."""
        # How the views are cut changes nothing but rounding, so a run may be resumed with smaller pieces.
        uncut = replace(self, camera=replace(self.camera, micro_batch=None))
        return config_hash(uncut, ignore=_NOT_IN_HASH)


def pick_device(name: str) -> torch.device:
    """The torch device; raises InputError where CUDA is asked for and there is none."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        build = (
            "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device is visible"
        )
        raise InputError(f"device: got cuda, but {build}; use --device cpu or auto")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def load_job(config: str = "default", layers: Sequence[Table] = ()) -> Resolved[JobConfig]:
    """A job from a config name or file, with further layers (overrides) on top; not yet validated."""
    return resolve(JobConfig, [*file_layers(find_config(config)), *layers])
