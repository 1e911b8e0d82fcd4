"""Settings of the frozen prior."""

from dataclasses import dataclass
from typing import Literal

from sds3d.config.option import option

ControlKind = Literal["depth", "normal", "light", "dreammat"]


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A low-rank style that is added to the weights of the model."""

    path: str = option(help="a .safetensors file", path=True)
    scale: float = option(1.0, help="how strongly; negative numbers steer away", ge=-10.0, le=10.0)


@dataclass(frozen=True, kw_only=True)
class ImagePromptConfig:
    """A picture that the model is shown: through an IP-Adapter, or by itself where it reads pictures (ImageDream)."""

    image: str = option(help="the picture, read by PIL; transparent parts become white", path=True)
    adapter: str | None = option(
        None,
        help="weights of the IP-Adapter, a .safetensors file; null for models that read pictures",
        path=True,
    )
    image_encoder: str | None = option(
        None, help="folder of the CLIP vision encoder that the adapter was trained with", path=True
    )
    scale: float = option(
        0.6, help="weight of the picture beside the text, seen from azimuth_deg", ge=0.0, le=2.0
    )
    back_scale: float | None = option(
        None, help="weight on the opposite side, with a smooth law between; null = scale", ge=0.0, le=2.0
    )
    azimuth_deg: float = option(0.0, help="from where the picture shows the object", ge=-360.0, le=360.0)


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """A ControlNet that sees the scene's own geometry."""

    path: str = option(help="folder of a diffusers ControlNetModel", path=True)
    kind: ControlKind = option(
        help="which picture of the scene it is given: depth, normal, light (three known materials under the step's "
        "light, grey; FlashTex) or dreammat (depth, normals and six known materials, 22 channels)"
    )
    scale: float = option(1.0, help="factor on what it adds to the network", ge=0.0, le=2.0)


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Which frozen diffusion model guides the run."""

    name: str = option(
        "toybox",
        help="a name listed by `sds3d priors`, a diffusers pipeline folder, or a hub id owner/name",
        path=True,
    )
    revision: str | None = option(
        None, help="commit, tag or branch of a hub repository; null = the pinned one, else main"
    )
    text_cache: bool = option(
        True, help="keep embeddings of prompts on disk, for models with large text encoders"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        help="network precision (schedule algebra stays in float32); auto = bfloat16, or float16 on GPUs without it",
    )
    compile: Literal["off", "default", "max-autotune", "cudagraphs"] = option(
        "off", help="torch.compile of the network, static shapes; takes minutes at the first step"
    )
    vae: str = option(
        "full",
        help="encoder of the render: full, tiny (vae_tiny/ of the pipeline) or an AutoencoderTiny folder",
        path=True,
    )
    vae_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", help="precision of the autoencoder; auto = the network's on CUDA, as loaded on a CPU"
    )
    vae_slice: int | None = option(
        None,
        help="images that are encoded at once; null = what fits a CUDA device, all on a CPU",
        ge=1,
        le=256,
    )
    vae_checkpointing: Literal["auto", "on", "off"] = option(
        "auto", help="encode again in the backward pass instead of keeping it: less memory, more time"
    )
    as_flow: bool = option(
        False, help="see the model through its equivalent rectified flow, for rules written for flows"
    )
    image_px: int | None = option(
        None, help="side of the image the model sees; null = the size it was trained at", ge=8, le=4096
    )
    flux_guidance: float = option(
        3.5, help="guidance value told to guidance-distilled FLUX models; others have no such input", ge=0.0
    )
    loras: tuple[LoraConfig, ...] = option((), help="styles: list of {path, scale}")
    textual_inversions: tuple[str, ...] = option(
        (), help="learned words: list of .safetensors files", path=True
    )
    image_prompt: ImagePromptConfig | None = option(None, help="a picture for rules that ask for one (isd)")
    controls: tuple[ControlConfig, ...] = option((), help="control networks: list of {path, kind, scale}")
    lcm_guidance: float = option(
        8.5, help="guidance scale told to latent consistency models; others have no such input", ge=1.0
    )
    allowed_steps: tuple[int, ...] | None = option(
        None,
        help="the only trained steps a distilled model is good at, e.g. [249, 499, 749, 999]; null = as it says",
    )
