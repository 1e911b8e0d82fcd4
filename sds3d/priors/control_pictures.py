"""Pictures of a scene's geometry in the colours that public control networks were trained on."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.errors import ConfigError
from sds3d.interfaces import Cameras, Render
from sds3d.priors.config import ControlKind

OPAQUE = 0.5  # alpha from which on a pixel shows the object


def control_pictures(
    view: Render, cameras: Cameras, kinds: Sequence[ControlKind]
) -> Float[Tensor, "b q H W"]:
    """The pictures of these kinds in [0, 1], one after the other along the channels, without gradient.

    Raises:
        ConfigError: the scene does not render what a kind shows.
    """
    seen = {kind: PICTURES[kind](view, cameras) for kind in dict.fromkeys(kinds)}
    return torch.cat([seen[kind] for kind in kinds], dim=1).detach()


def depth_picture(view: Render, cameras: Cameras) -> Float[Tensor, "b 3 H W"]:
    """Inverse depth, stretched over the object of each view: nearest 1, farthest 0, background 0.

    As relative depth networks show it (Ranftl et al. 2020, MiDaS, arXiv:1907.01341). A flat thing is all near.
    """
    near = 1.0 / (view.depth / view.alpha.clamp_min(1e-3)).clamp_min(1e-3)
    inside = view.alpha > OPAQUE
    high = near.masked_fill(~inside, 0.0).amax((1, 2, 3), keepdim=True)
    low = near.masked_fill(~inside, torch.inf).amin((1, 2, 3), keepdim=True)
    span = (high - low).clamp_min(1e-6)  # -inf, made small, where nothing is seen
    stretched = (1.0 - (high - near) / span).clamp(0.0, 1.0)
    return (stretched * view.alpha * inside.any(-1, keepdim=True).any(-2, keepdim=True)).expand(-1, 3, -1, -1)


def normal_picture(view: Render, cameras: Cameras) -> Float[Tensor, "b 3 H W"]:
    """Normals in the camera's frame: red faces left, green up, blue the camera; the background faces the camera.

    The convention of the ScanNet-trained estimators behind the public normal control networks.
    """
    if view.normal is None:
        raise ConfigError(
            "prior.controls: kind normal needs the scene's normals, but this render has none; use kind depth"
        )
    rotation = cameras.c2w[:, :3, :3].to(view.normal)
    # Ours is x right, y down, z forward: all three axes point the other way.
    colour = 0.5 - 0.5 * torch.einsum("bji,bjhw->bihw", rotation, view.normal)
    toward = colour.new_tensor([0.5, 0.5, 1.0])[None, :, None, None]
    return (view.alpha * colour + (1.0 - view.alpha) * toward).clamp(0.0, 1.0)


def light_picture(view: Render, cameras: Cameras) -> Float[Tensor, "b l H W"]:
    """The scene under its known light, as it renders that itself."""
    if view.light is None:
        raise ConfigError(
            "prior.controls: kind light needs a scene that renders how light falls on it, and this one does "
            "not; use kind depth or normal"
        )
    return view.light.clamp(0.0, 1.0)


PICTURES: dict[ControlKind, Callable[[Render, Cameras], Tensor]] = {
    "depth": depth_picture,
    "normal": normal_picture,
    "light": light_picture,
}
