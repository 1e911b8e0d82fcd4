"""The memory planner: what a run will need, from file headers and settings alone, before anything is loaded.

All numbers are estimates. The formulae stand together in `need`; their constants were counted on the real
architectures (every tensor that is alive at once, autograd's included, attention without its score matrix):

    network, no gradient    UNet 28 h w C per row (SD 26, SDXL 16), transformer 16 (tokens + text) D (SD3 15, PixArt 12)
    network, student        290 h w C per row that learns (SD with LoRA)
    encoder, with gradient  24 P^2 C per view (KL autoencoders of SD 1.x to XL)

in numbers of the network's precision, with h w the size of x, C the channels of the first block, D the width, P the
side of the image. MARGIN is for operator workspaces and fragmentation.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from sds3d.economy import MIN_RENDER_PX, Economy
from sds3d.errors import InputError, PriorError
from sds3d.guidance.terms import guidance_needs
from sds3d.job import JobConfig
from sds3d.priors.footprint import PriorSizes, prior_sizes
from sds3d.room import GIB, room_on

UNET, TRANSFORMER, STUDENT = 28.0, 16.0, 290.0
TINY_KEPT = 7.3 * 64  # per pixel, of a tiny autoencoder
TEXT_TOKENS = 512  # at most, beside the image tokens of a transformer
MARGIN = 1.15
MIN_IMAGE_PX = 64  # smaller images are not advised
CUDA_CONTEXT = GIB // 2  # kernels and libraries, before the first tensor
ADAM = 4  # a parameter, its gradient and two moments


@dataclass(frozen=True, kw_only=True)
class Need:
    """Estimated bytes on the device that the run works on."""

    prior: int  # weights of network and encoder
    text: int  # text encoders, while prompts are embedded
    scene: int  # parameters, optimiser state, working memory
    step: int  # renders, graphs and network activations of the largest moment of a step

    @property
    def peak(self) -> int:
        """The largest of loading and stepping."""
        return self.prior + max(self.text, self.scene + self.step)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a run is fitted into memory."""

    job: JobConfig  # what to load: the run's job, with the encoder's savings where they are needed
    economy: Economy
    need: Need | None = None  # None: nothing was estimated
    room: int = 0
    saves: bool = False  # something is done for the sake of memory that the settings do not ask for

    @property
    def line(self) -> str:
        """The plan in one line."""
        if self.need is None:
            return "memory: no plan"
        need = self.need
        encoder = " and the encoder one view at a time, computed again for its gradient" * _saves_vae(
            self.job
        )
        return (
            f"memory: about {_gib(need.peak)} of {_gib(self.room)} GiB (prior {_gib(need.prior)}, "
            f"text encoders {_gib(need.text)} released after the prompts, scene {_gib(need.scene)}, "
            f"step {_gib(need.step)}): {self.economy.words()}{encoder}"
        )

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        if self.need is None:
            return {"economy": self.economy.as_dict()}
        return {
            "plan": self.line,
            "estimate_gib": round(self.need.peak / GIB, 2),
            "room_gib": round(self.room / GIB, 2),
            "economy": self.economy.as_dict(),
        }


def make_plan(job: JobConfig, device: torch.device, processes: int = 1) -> Plan:
    """The first way of running that fits: as asked, then with a frugal encoder, then fewer views at once.

    Raises:
        InputError: nothing fits; says what would.
        PriorError: there is no such prior.
    """
    asked = Economy(micro_batch=job.camera.micro_batch)
    if job.memory.plan == "none":
        return Plan(job=job, economy=asked)
    try:
        sizes = _sizes(job)
    except (KeyError, TypeError, ValueError):  # a family whose settings have other names
        return Plan(job=job, economy=asked)
    room = room_on(device, job.memory.limit_gb)
    views = job.camera.batch // processes
    needed: Need | None = None
    for candidate, economy in _ways(job, asked, views, sizes):
        needed = need(candidate, sizes, min(economy.micro_batch or views, views), device.type)
        if needed.peak <= room:
            saves = economy != asked or candidate != job
            return Plan(job=candidate, economy=economy, need=needed, room=room, saves=saves)
    assert needed is not None
    raise InputError(
        f"memory: the run needs about {_gib(needed.peak)} GiB even with the fewest views at a time, and {device} "
        f"gives {_gib(room)} GiB; {advice(job, sizes, device, room)}, or memory.plan=none to try all the same"
    )


def lighter(job: JobConfig, device: torch.device) -> str:
    """What to change after a run was out of memory although it should have fitted: what needs less than it did."""
    try:
        sizes = _sizes(job)
    except (PriorError, KeyError, TypeError, ValueError):
        return "a smaller prior (sds3d priors lists them) may fit"
    used = need(_frugal(job), sizes, job.camera.views_per_object, device.type)
    return advice(job, sizes, device, used.peak - 1)


def advice(job: JobConfig, sizes: PriorSizes, device: torch.device, room: int) -> str:
    """Which changes of the settings would fit into `room`, with the fewest views at a time."""
    fits = []
    for words, changed in _changes(job, sizes):
        peak = need(_frugal(changed), sizes, job.camera.views_per_object, device.type).peak
        if peak <= room:
            fits.append(f"{words} (about {_gib(peak)} GiB)")
    return (
        f"what would fit: {', '.join(fits)}"
        if fits
        else "a smaller prior (sds3d priors lists them) would fit"
    )


def need(job: JobConfig, sizes: PriorSizes, views: int, device_type: str) -> Need:
    """What a run needs that renders and guides `views` views at once. All formulae are here and in `_scene`."""
    cuda = device_type == "cuda"
    dtype = 4 if job.prior.dtype == "float32" else 2
    vae_dtype = {"float32": 4, "auto": dtype if cuda else 4}.get(job.prior.vae_dtype, 2)
    side = sizes.side if job.prior.image_px is None else max(job.prior.image_px // sizes.factor, 1)
    rows = views * _bundles(job)
    if sizes.patch is None:
        row = UNET * side**2 * sizes.width
    else:
        row = TRANSFORMER * ((side // sizes.patch) ** 2 + TEXT_TOKENS) * sizes.width
    network = rows * row * dtype
    if "student" in guidance_needs(job.guidance):
        network += views * STUDENT / (UNET if sizes.patch is None else TRANSFORMER) * row * dtype
    from sds3d.priors.vae_path import KEPT_PER_PIXEL

    image = (side * sizes.factor) ** 2
    full = job.prior.vae == "full"
    kept = (KEPT_PER_PIXEL * sizes.encoder_width if full else TINY_KEPT * bool(sizes.encoder_width)) * image
    kept *= vae_dtype
    # Render, image of the model's size and x, with their gradients.
    graph = views * (_render(job, cuda) + 4 * 12 * image)
    # The network runs while the graphs of render and encoder wait; computed anew, the encoder's exists after it.
    encoder = (job.prior.vae_slice or views) * kept if job.prior.vae_checkpointing == "on" else views * kept
    largest = max(network, encoder) if job.prior.vae_checkpointing == "on" else network + encoder
    return Need(
        prior=sizes.network * dtype + sizes.codec * vae_dtype + cuda * CUDA_CONTEXT,
        # On CUDA machines text encoders stay in host memory.
        text=0 if cuda else sizes.text,
        scene=int(_scene(job)),
        step=int(MARGIN * (graph + largest)),
    )


def _scene(job: JobConfig) -> float:
    """All particles; bytes."""
    return job.particles * _particle(job)


def _particle(job: JobConfig) -> float:
    """Parameters with Adam's state, and what is rebuilt at every step; bytes."""
    config = job.scene.config
    if job.scene.kind == "voxel":
        levels = sum(n**3 for n in config.resolutions)
        return 16.0 * (ADAM * levels + 6 * config.resolutions[-1] ** 3)
    if job.scene.kind == "nerf":
        encoding = config.field.encoding
        return 4.0 * ADAM * encoding.levels * 2**encoding.log2_rows * encoding.features
    if job.scene.kind == "gaussians":
        return 4.0 * config.cap * (14 * ADAM + 100)  # raw, activated and projected, with gradients
    return 0.0


def _render(job: JobConfig, cuda: bool) -> float:
    """One rendered view with what it keeps for its gradient, at the largest size of the run; bytes."""
    ramp, config = job.camera.render_px, job.scene.config
    pixels = max(ramp.start, ramp.end) ** 2
    if job.scene.kind == "voxel":
        # The compiled kernel keeps pixels; plain torch keeps every sample of a ray.
        samples = 1.8 * config.resolutions[-1] / config.step_voxels
        return 4.0 * pixels * (60 * samples if cuda else 40)
    if job.scene.kind == "nerf":
        width = (
            2 * config.field.encoding.levels * config.field.encoding.features + 3 * config.field.hidden + 40
        )
        return 4.0 * pixels * config.samples_per_ray * width
    return 4.0 * pixels * 60


def _bundles(job: JobConfig) -> int:
    """Rows per view of the usual network call: base and text, and what prompts add."""
    perp_neg = job.prompting.perp_neg and job.prompting.view_dependent
    return 2 + 2 * perp_neg + bool(job.negative_prompt.strip())


def _ways(
    job: JobConfig, asked: Economy, views: int, sizes: PriorSizes
) -> Iterator[tuple[JobConfig, Economy]]:
    """Ways of running, the fastest first."""
    economy: Economy | None = asked
    while economy is not None and economy.render_scale == 1.0:
        yield job, economy
        frugal = _frugal(job)
        if sizes.encoder_width and frugal != job:
            yield frugal, economy
        economy = economy.tighter(views, job.camera.views_per_object, 8)


def _frugal(job: JobConfig) -> JobConfig:
    """The job with an encoder that is computed again, view by view, where its settings leave that open."""
    prior = job.prior
    if prior.vae_checkpointing != "auto":
        return job
    return replace(job, prior=replace(prior, vae_checkpointing="on", vae_slice=prior.vae_slice or 1))


def _saves_vae(job: JobConfig) -> bool:
    return job.prior.vae_checkpointing == "on"


def _changes(job: JobConfig, sizes: PriorSizes) -> Iterator[tuple[str, JobConfig]]:
    """Changes of the settings that need less, the mildest first, with their names."""
    render_px = max(job.camera.render_px.start, job.camera.render_px.end)
    for smaller in (int(render_px / part) // 8 * 8 for part in (2, 4)):
        if smaller >= MIN_RENDER_PX:
            ramp = type(job.camera.render_px).constant(float(smaller))
            yield f"camera.render_px={smaller}", replace(job, camera=replace(job.camera, render_px=ramp))
    bases = [("", job.prior)]
    if job.prior.dtype == "float32":
        bases.append(("prior.dtype=bfloat16 ", replace(job.prior, dtype="bfloat16")))
        yield bases[1][0].strip(), replace(job, prior=bases[1][1])
    image_px, step = job.prior.image_px or sizes.side * sizes.factor, 8 * sizes.factor
    for words, prior in bases:
        for smaller in (image_px // part // step * step for part in (2, 4)):
            if smaller >= MIN_IMAGE_PX:
                said = f"{words}prior.image_px={smaller}"
                yield said, replace(job, prior=replace(prior, image_px=smaller))


def _sizes(job: JobConfig) -> PriorSizes:
    from sds3d.priors.hub import find_folder

    return prior_sizes(find_folder(job.prior), job.prior)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}" if size >= 0.1 * GIB else f"{size / GIB:.2f}"
