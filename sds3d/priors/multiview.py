"""Networks that denoise v views of one object jointly (MVDream, ImageDream).

Rows of a call come object after object, v consecutive views each. Self-attention sees the tokens of all v views at
once; the time embedding gets an embedding of the camera added. ImageDream also reads an image prompt: tokens that
cross attention sees beside the text, and, in its "pixel" variant, the clean latent of the image as one more view.

Sources: Shi et al. 2023 (MVDream, arXiv:2308.16512), sections 3.1 and 3.2; Wang and Shi 2023 (ImageDream,
arXiv:2312.02201), section 3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from jaxtyping import Float
from torch import Tensor, nn

from sds3d.errors import PriorError
from sds3d.interfaces import Told
from sds3d.priors.network import Labels, Rows
from sds3d.priors.packing import Packing
from sds3d.priors.unet import Clock, UNetDenoiser

POSE_SIZE = 16
LABEL_SIZE = POSE_SIZE + 1

# Our world (+y up, front +z) to MVDream's (+z up, front +x): both right-handed, so a cyclic swap of the axes.
_WORLD = ((0.0, 0.0, 1.0, 0.0), (1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
# Our camera axes (right, down, forward) to theirs (right, up, backward).
_CAMERA = (1.0, -1.0, -1.0, 1.0)


def mvdream_pose(c2w: Float[Tensor, "b 4 4"]) -> Float[Tensor, "b 16"]:
    """Our camera-to-world matrices as MVDream-class networks read them: the one place of this conversion.

    Theirs: world +z up with the object's front towards +x and azimuth growing from +x to +y; camera axes right, up,
    backward (OpenGL, Blender); position scaled onto the unit sphere; rows of the matrix one after the other.
    """
    pose = c2w.new_tensor(_WORLD) @ c2w * c2w.new_tensor(_CAMERA)
    position = F.normalize(pose[:, :3, 3], dim=1)
    return torch.cat([torch.cat([pose[:, :3, :3], position[:, :, None]], 2), pose[:, 3:]], 1).flatten(1)


def pose_labels(views_per_object: int) -> Labels:
    """Pose and a flag "known" of every row, for `CameraEmbedding`.

    A bundle without cameras takes those of the other bundles of the call: MVDream is trained and sampled with the
    camera in the unconditional prediction too. Where no bundle has cameras the flags are 0.
    """

    def labels(told: Sequence[Told], views: int) -> Float[Tensor, "r 17"]:
        if views % views_per_object:
            raise PriorError(
                f"got {views} views, expected a multiple of {views_per_object}: this prior denoises "
                f"{views_per_object} views of one object jointly; set camera.views_per_object={views_per_object} "
                "and camera.batch to a multiple of it"
            )
        known = next((bundle.cameras for bundle in told if bundle.cameras is not None), None)
        if known is None:
            return torch.zeros(len(told) * views, LABEL_SIZE, device=told[0].text.device)
        poses = [mvdream_pose((bundle.cameras or known).c2w) for bundle in told]
        return F.pad(torch.cat(poses).to(told[0].text.device), (0, 1), value=1.0)

    return labels


class CameraEmbedding(nn.Module):
    """A two-layer network of the pose, in the class-embedding slot of a UNet; 0 where the pose is not known."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(POSE_SIZE, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, labels: Float[Tensor, "r 17"]) -> Float[Tensor, "r d"]:
        """Added to the time embedding."""
        return self.net(labels[:, :POSE_SIZE]) * labels[:, POSE_SIZE:]


@dataclass(frozen=True)
class JointAttention:
    """Self-attention over the tokens of `views` consecutive rows at once, as an attention processor of diffusers."""

    views: int
    inner: AttnProcessor2_0 = field(default_factory=AttnProcessor2_0)

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Float[Tensor, "r n d"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Float[Tensor, "r n d"]:
        """Of each row group's tokens; nothing else can be attended to."""
        joint = hidden_states.unflatten(0, (-1, self.views)).flatten(1, 2)
        return self.inner(attn, joint).unflatten(1, (self.views, -1)).flatten(0, 1)


def join_views(unet: UNet2DConditionModel, views: int) -> None:
    """Make every self-attention of a UNet see `views` consecutive rows."""
    unet.set_attn_processor(
        {
            name: JointAttention(views) if name.endswith("attn1.processor") else processor
            for name, processor in unet.attn_processors.items()
        }
    )


@dataclass(frozen=True, kw_only=True)
class MultiViewDenoiser:
    """A UNet whose rows come in groups of `views`.

    `image` lays out the image prompt of a network that reads one: the hidden states of a CLIP vision encoder and, in
    the pixel variant, the image's latent; the row after them starts with the weight of the image tokens. Zeros at
    weight 1 are "no image", as these networks are trained.
    """

    module: nn.Module
    packing: Packing
    clock: Clock
    views: int
    image: Packing | None = None

    def __call__(self, rows: Rows) -> Float[Tensor, "r k h w"]:
        """The raw output, in the order of the rows."""
        if self.image is None:
            return self._unet(rows)
        if rows.image is None:
            none = rows.text.new_zeros(len(rows.x), self.image.rows + 1, self.image.width)
            none[:, -1, 0] = 1.0
            rows = replace(rows, image=none)
        if not self.image.pooled:
            return self._unet(rows)
        output = self._unet(self._with_image_view(rows, self.image))
        return output.unflatten(0, (-1, self.views + 1))[:, : self.views].flatten(0, 1)

    def _unet(self, rows: Rows) -> Tensor:
        unet = UNetDenoiser(
            module=self.module, packing=self.packing, clock=self.clock, further=self._image_tokens
        )
        return unet(rows)

    def _image_tokens(self, rows: Rows) -> Mapping[str, Any]:
        if self.image is None or rows.image is None:
            return {}
        told = torch.cat([self.image.tokens_of(rows.image), rows.image[:, -1:]], 1)
        return {"added_cond_kwargs": {"image_embeds": told}}

    def _with_image_view(self, rows: Rows, layout: Packing) -> Rows:
        """One more row behind every group: the clean latent of the image under a camera of zeros."""
        first = rows[:: self.views]
        if first.image is None or first.labels is None:
            raise PriorError("a network with an image view is told image and cameras; got none")
        latent = layout.pooled_of(first.image).unflatten(1, first.x.shape[1:])
        no_pose = torch.zeros_like(first.labels[:, :POSE_SIZE])
        labels = torch.cat([no_pose, first.labels[:, POSE_SIZE:]], 1)
        image_view = replace(first, x=latent, labels=labels)
        return Rows(
            **{
                name: torch.cat([value.unflatten(0, (-1, self.views)), further[:, None]], 1).flatten(0, 1)
                for name, value in vars(rows).items()
                if (further := getattr(image_view, name)) is not None
            }
        )
