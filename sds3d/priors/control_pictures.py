"""Pictures of a scene's geometry, and of how light falls on it, as public control networks were trained on.

Sources of the light pictures: Deng et al. 2024, FlashTex, arXiv:2402.13251; Zhang et al. 2024, DreamMat,
arXiv:2405.17176.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from sds3d.errors import ConfigError
from sds3d.interfaces import Cameras, KnownMaterial, Render
from sds3d.priors.config import ControlKind

OPAQUE = 0.5  # alpha from which on a pixel shows the object
# White surfaces (metallic, roughness) that a kind shows under the light of the step, in the order of its channels.
MATERIALS: Mapping[ControlKind, tuple[KnownMaterial, ...]] = {
    "light": ((0.0, 1.0), (0.5, 0.5), (1.0, 0.0)),
    "dreammat": ((0.0, 0.0), (0.0, 0.5), (0.0, 1.0), (1.0, 0.0), (1.0, 0.5), (1.0, 1.0)),
}
CHANNELS: Mapping[ControlKind, int] = {"depth": 3, "normal": 3, "light": 3, "dreammat": 22}


def known_materials(kinds: Iterable[ControlKind]) -> tuple[KnownMaterial, ...]:
    """What `Render.light` must show for these kinds; each material once."""
    return tuple(dict.fromkeys(material for kind in kinds for material in MATERIALS.get(kind, ())))


def control_pictures(
    view: Render, cameras: Cameras, kinds: Sequence[ControlKind]
) -> Float[Tensor, "b q H W"]:
    """The pictures of these kinds in [0, 1], one after the other along the channels, without gradient.

    Raises:
        ConfigError: the scene does not render what a kind shows.
    """
    shown = known_materials(kinds)
    seen = {}
    for kind in dict.fromkeys(kinds):
        own = replace(view, light=_light_of(view, kind, shown)) if kind in MATERIALS else view
        seen[kind] = PICTURES[kind](own, cameras)
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


def light_picture(view: Render, cameras: Cameras) -> Float[Tensor, "b 3 H W"]:
    """One grey picture per known material: matte, half and half, mirror."""
    assert view.light is not None
    return view.light.unflatten(1, (-1, 3)).mean(2)


def dreammat_picture(view: Render, cameras: Cameras) -> Float[Tensor, "b 22 H W"]:
    """Depth, normals, and six known materials in colour: non-metals then metals, each from smooth to rough."""
    assert view.light is not None
    return torch.cat([depth_picture(view, cameras)[:, :1], normal_picture(view, cameras), view.light], 1)


def _light_of(view: Render, kind: ControlKind, shown: Sequence[KnownMaterial]) -> Float[Tensor, "b l H W"]:
    """The channels of `Render.light` that hold the materials of a kind, in its order."""
    if view.light is None or view.light.shape[1] != 3 * len(shown):
        raise ConfigError(
            f"prior.controls: kind {kind} needs the scene under a known light; set shading.lit=1, "
            "shading.light=environment and shading.textureless_frac=0 with a mesh or tetmesh scene, or use kind depth"
        )
    channels = [3 * shown.index(material) + rgb for material in MATERIALS[kind] for rgb in range(3)]
    return view.light[:, channels].clamp(0.0, 1.0)


PICTURES: dict[ControlKind, Callable[[Render, Cameras], Tensor]] = {
    "depth": depth_picture,
    "normal": normal_picture,
    "light": light_picture,
    "dreammat": dreammat_picture,
}
