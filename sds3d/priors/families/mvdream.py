"""MVDream and ImageDream: Stable-Diffusion-shaped UNets that denoise four views of an object jointly.

Two layouts of a folder, told apart by unet/config.json. Both have tokenizer/, text_encoder/, vae/ and scheduler/ as
Stable Diffusion 2.1, and, to read image prompts, image_encoder/ (a CLIP vision model).

Ours, with the classes and file names of diffusers:

    unet/                                 UNet2DConditionModel
    camera_embed/model.safetensors        0.weight, 0.bias, 2.weight, 2.bias: 16 -> d -> d
    image_adapter/model.safetensors       ImageDream: image_proj.*, ip_adapter.*, as an IP-Adapter Plus
    sds3d_prior.json                      views_per_object (default 4), image_view (default false)

The one on public hubs: unet/ is a MultiViewUNetModel that keeps the names of the original code (input_blocks.*,
camera_embed.*, image_embed.*, *.to_k_ip.weight); a wrapper's leading "unet." is dropped. Its ImageDream is the pixel
variant, where the image is one more view, unless sds3d_prior.json says image_view: false.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from diffusers.schedulers import DDIMScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModel

from sds3d.errors import PriorError
from sds3d.priors.adapters import apply_styles
from sds3d.priors.conditions import PromptImage
from sds3d.priors.config import ImagePromptConfig
from sds3d.priors.families import LoadOptions
from sds3d.priors.families.stable_diffusion import assemble
from sds3d.priors.folder import PipelineFolder
from sds3d.priors.image_prompt import CLIP_MEAN, CLIP_STD, ImageAttention, ImageTokens, read_picture
from sds3d.priors.ldm_unet import is_ldm_config, ldm_unet
from sds3d.priors.multiview import (
    CameraEmbedding,
    MultiViewDenoiser,
    join_views,
    pose_labels,
)
from sds3d.priors.network import PriorParts
from sds3d.priors.packing import Packing

VIEWS = 4
CAMERA, ADAPTER = "camera_embed", "image_adapter"
Weights = dict[str, Tensor]


def build(folder: PipelineFolder, options: LoadOptions) -> PriorParts:
    """The parts of an MVDream or ImageDream folder; PriorError where a part is missing or damaged."""
    folder.require("tokenizer", "text_encoder", "unet", "scheduler", "vae")
    encoder = folder.load_text_encoder("text_encoder", CLIPTextModel)
    tokenizer = folder.load_tokenizer("tokenizer", CLIPTokenizer, words=encoder.config.vocab_size)
    unet, camera, adapter, image_view = _network(folder, options.dtype)
    apply_styles(
        options.config, "StableDiffusionPipeline", network=unet, tokenizers=[tokenizer], encoders=[encoder]
    )
    parts = assemble(
        tokenizer=tokenizer,
        encoder=encoder,
        unet=unet,
        scheduler=folder.load("scheduler", DDIMScheduler),
        vae=folder.load_network("vae", AutoencoderKL, torch.float32).to(options.device),
        extra={},
        options=options,
    )
    unet.class_embedding = _camera_embedding(camera, unet, folder.path)
    views, image = int(folder.extra.get("views_per_object", VIEWS)), None
    if adapter:
        latent = parts.codec.channels * parts.side**2 if image_view else 0
        image = _add_adapter(unet, adapter, folder, latent)
    join_views(unet, views + bool(image and image.pooled))
    conditions, settings = replace(parts.conditions, camera_always=True), options.config.image_prompt
    if settings is not None:
        if image is None:
            raise PriorError(
                f"{folder.path}: an MVDream model, which reads no image prompt; use ImageDream, or remove "
                "prior.image_prompt"
            )
        picture = _picture(folder, settings, parts, image, options.device)
        conditions = replace(conditions, image=picture)
    schedule: Any = parts.schedule
    return replace(
        parts,
        denoiser=MultiViewDenoiser(
            module=unet, packing=parts.text.packing, clock=schedule.index, views=views, image=image
        ),
        labels=pose_labels(views),
        views_per_object=views,
        conditions=conditions,
    )


def _picture(
    folder: PipelineFolder,
    settings: ImagePromptConfig,
    parts: PriorParts,
    layout: Packing,
    device: torch.device,
) -> PromptImage:
    """The picture of an image prompt: the vision encoder's last hidden states but one and, as a view, its latent."""
    encoder = folder.load_text_encoder("image_encoder", CLIPVisionModel).to(device)
    path, size = Path(settings.image), parts.side * parts.codec.factor
    with torch.no_grad():
        seen = read_picture(path, int(encoder.config.image_size))[None].to(device)
        states = encoder(seen, output_hidden_states=True).hidden_states[-2]
        latent = None
        if layout.pooled:
            mean, std = (torch.from_numpy(part)[:, None, None] for part in (CLIP_MEAN, CLIP_STD))
            rgb = (read_picture(path, size) * std + mean)[None].to(device)
            latent = parts.codec.encode(rgb * 2.0 - 1.0).flatten(1)
    (embedding,) = layout.pack(states, latent)
    return PromptImage(
        embedding=embedding,
        nothing=torch.zeros_like(embedding),
        scale=settings.scale,
        back_scale=settings.scale if settings.back_scale is None else settings.back_scale,
        azimuth_deg=settings.azimuth_deg,
    )


def _network(
    folder: PipelineFolder, dtype: torch.dtype
) -> tuple[UNet2DConditionModel, Weights, dict[str, Weights], bool]:
    """The plain UNet, the camera embedding, the image adapter ({} = none), and whether the image is a view."""
    image_view = folder.extra.get("image_view")
    try:
        config: Any = UNet2DConditionModel.load_config(folder.path / "unet", local_files_only=True)
    except OSError as error:
        raise PriorError(f"{folder.path / 'unet'}: no readable config.json ({error})") from error
    if is_ldm_config(config):
        weights = {
            name.removeprefix("unet."): value for name, value in _weights(folder.path / "unet").items()
        }
        unet, further = ldm_unet(config, weights, dtype, str(folder.path / "unet"))
        adapter = _original_adapter(unet, further)
        return unet, _below("camera_embed.", further), adapter, image_view is not False
    unet = folder.load_network("unet", UNet2DConditionModel, dtype)
    folder.require(CAMERA)
    adapter = {}
    if (folder.path / ADAPTER).is_dir():
        stored = _weights(folder.path / ADAPTER)
        adapter = {part: _below(f"{part}.", stored) for part in ("image_proj", "ip_adapter")}
    return unet, _weights(folder.path / CAMERA), adapter, bool(image_view)


def _weights(folder: Path) -> Weights:
    """All safetensors of a folder."""
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise PriorError(f"{folder}: no .safetensors file inside; other formats are not read")
    weights: Weights = {}
    for path in found:
        try:
            weights |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise PriorError(f"{path}: cannot be loaded ({error}); download or copy it again") from error
    return weights


def _below(prefix: str, weights: Weights) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _camera_embedding(weights: Weights, unet: UNet2DConditionModel, where: Path) -> CameraEmbedding:
    embedding = CameraEmbedding(unet.time_embedding.linear_2.out_features)
    try:
        embedding.net.load_state_dict({name: value.float() for name, value in weights.items()})
    except RuntimeError as error:
        raise PriorError(f"{where}: no camera embedding that fits its UNet ({error})") from error
    return embedding


def _original_adapter(unet: UNet2DConditionModel, weights: Weights) -> dict[str, Weights]:
    """ImageDream's weights under the names of an IP-Adapter Plus, which numbers the attentions of a UNet."""
    resampler = _below("image_embed.", weights)
    if not resampler:
        return {}
    numbered: Weights = {}
    for index, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            layer = name.removesuffix("processor")
            numbered |= {f"{index}.{part}": value for part, value in _below(layer, weights).items()}
    return {"image_proj": resampler, "ip_adapter": numbered}


def _add_adapter(
    unet: UNet2DConditionModel, adapter: dict[str, Weights], folder: PipelineFolder, latent: int
) -> Packing:
    """Put the adapter into the network; the layout of the image prompts it reads."""
    folder.require("image_encoder")
    vision = folder.load("image_encoder", CLIPVisionConfig)
    try:
        with torch.random.fork_rng(devices=[]):  # initial values that the weights replace
            unet._load_ip_adapter_weights([adapter], low_cpu_mem_usage=False)
        reads = adapter["image_proj"]["proj_in.weight"].shape[1]
    except (KeyError, ValueError, RuntimeError) as error:
        raise PriorError(f"{folder.path}: its image adapter does not fit its UNet ({error})") from error
    if reads != vision.hidden_size:
        raise PriorError(
            f"{folder.path}: the image adapter reads {reads} numbers per token, image_encoder/ gives "
            f"{vision.hidden_size}; they belong to different models"
        )
    # diffusers has read the weights; attention with a weight for every row takes them over.
    for module in list(unet.modules()):
        if isinstance(module, Attention) and isinstance(module.processor, IPAdapterAttnProcessor2_0):
            module.set_processor(ImageAttention(module.processor.to_k_ip[0], module.processor.to_v_ip[0]))
    unet.encoder_hid_proj = ImageTokens(unet.get_submodule("encoder_hid_proj.image_projection_layers.0"))
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    return Packing(tokens=tokens, width=vision.hidden_size, pooled=latent)
