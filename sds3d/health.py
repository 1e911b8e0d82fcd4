"""Whether a run went well: signs of collapse in what the scene shows, and what to say about them.

Thresholds were set on runs against the shipped prior; `docs/reliability.md` tells on which, and how often they err.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sds3d.cameras.orbit import orbit_cameras, turntable_cameras
from sds3d.events.log import ALPHA_EMPTY, ALPHA_OPAQUE
from sds3d.interfaces import Cameras, Prior, Shading
from sds3d.priors.text import TextBank
from sds3d.rng import Stream

if TYPE_CHECKING:
    from sds3d.optimize import Loop

VIEWS = 8
BACK_DEG = 60.0  # views this near to 180 degrees show the back
TIMES = (0.3, 0.5, 0.7)  # noise levels at which the prior is asked what it sees
FULL_CHROMA = 0.6  # share of the object with pure colours
SPECKLE = 0.2  # mean change of colour from one pixel of the object to the next, at LOOK_PX
LOOK_PX, MOST_PX = 64, 256  # size at which colours are judged, and at most shown to the prior
TWO_FACED = 0.05  # mean log ratio of errors, see `front_likeness`; symmetric objects come up to 0.01


@dataclass(frozen=True, kw_only=True)
class Signs:
    """What was measured on eight views of a scene."""

    coverage: float  # mean alpha
    full_chroma: float  # share of object pixels whose largest and smallest channel differ by over 0.85
    speckle: float  # mean absolute difference of chroma between neighbouring object pixels
    front_likeness: float | None = None  # of the back; None where the prior is told nothing about views
    finite: bool = True

    def faults(self) -> list[str]:
        """One line for each thing that went wrong, with advice."""
        found = []
        if not self.finite:
            found.append("not finite: the scene shows NaN; lower the learning rate (optimizer.lr_factor)")
        if self.coverage < ALPHA_EMPTY:
            found.append(
                f"empty: mean alpha {self.coverage:.4f}; lower penalties.opacity, or try another seed"
            )
        if self.coverage > ALPHA_OPAQUE:
            found.append(
                f"opaque: mean alpha {self.coverage:.3f}; raise penalties.opacity, or try another seed"
            )
        if self.full_chroma > FULL_CHROMA or self.speckle > SPECKLE:
            found.append(
                f"saturated: {self.full_chroma:.0%} of the object is of pure colour, and colours change by "
                f"{self.speckle:.2f} from pixel to pixel; lower guidance.cfg_scale or optimizer.lr_factor"
            )
        if self.front_likeness is not None and self.front_likeness > TWO_FACED:
            found.append(
                f"multi-face: the prior takes the back for a front (log ratio {self.front_likeness:+.2f}); try another "
                "seed, prompting.perp_neg=true, or a prior that knows cameras"
            )
        return found

    def as_dict(self) -> dict[str, float | bool | None]:
        """Plain data."""
        return asdict(self)


def verdict(faults: Sequence[str] | None) -> str:
    """One line for the manifest; None: the run was too short, or ended before anyone looked."""
    if faults is None:
        return "not examined"
    return "healthy" if not faults else "; ".join(faults)


@torch.no_grad()
def examine(loop: "Loop") -> Signs:
    """Render the scene from eight sides and look; a pure function of the loop's state, and changes none of it."""
    parts = loop.parts
    prior, stream = parts.prior, parts.streams.stream("health", loop.index)
    cameras = turntable_cameras(VIEWS, min(prior.image_px, MOST_PX)).to(prior.device)
    shading = Shading(background=torch.ones(VIEWS, 3, device=prior.device))
    was_training = parts.scene.training
    parts.scene.eval()
    try:
        view = parts.scene.render(cameras, shading, stream, progress=loop.index / loop.steps)
    finally:
        parts.scene.train(was_training)
    finite = bool(torch.isfinite(view.rgb).all())
    full_chroma, speckle = colors_of(view.rgb, view.alpha) if finite else (0.0, 0.0)
    coverage = float(view.alpha.mean()) if finite else 0.0
    signs = Signs(coverage=coverage, full_chroma=full_chroma, speckle=speckle, finite=finite)
    if not finite or signs.coverage < ALPHA_EMPTY or not knows_views(prior, parts.guide.bank):
        return signs
    x = prior.encode(view.rgb)
    return replace(signs, front_likeness=front_likeness(prior, parts.guide.bank, x, cameras, shading, stream))


def colors_of(rgb: Float[Tensor, "b 3 H W"], alpha: Float[Tensor, "b 1 H W"]) -> tuple[float, float]:
    """(share of pure colour, mean change of chroma between neighbours) of what is solid, at LOOK_PX."""
    if rgb.shape[-1] > LOOK_PX:
        rgb, alpha = (F.interpolate(image, size=(LOOK_PX, LOOK_PX), mode="area") for image in (rgb, alpha))
    inside = alpha[:, 0] > 0.9
    if not bool(inside.any()):
        return 0.0, 0.0
    pure = (rgb.amax(1) - rgb.amin(1) > 0.85)[inside].float().mean()
    red, green, blue = rgb.unbind(1)
    chroma = torch.stack([red - green, (red + green) / 2 - blue], 1)
    changes = []
    for axis in (2, 3):
        count = rgb.shape[axis] - 1
        change = (chroma.narrow(axis, 1, count) - chroma.narrow(axis, 0, count)).abs().sum(1)
        both = inside.narrow(axis - 1, 1, count) & inside.narrow(axis - 1, 0, count)
        changes.append(change[both])
    every = torch.cat(changes)
    return float(pure), float(every.mean()) if len(every) else 0.0


def knows_views(prior: Prior, bank: TextBank) -> bool:
    """Whether the prior is told, by words or by cameras, from where it looks."""
    told = bank.config.camera_condition and getattr(prior, "takes_camera", False)
    return bool(bank.config.view_dependent or told)


@torch.no_grad()
def front_likeness(
    prior: Prior,
    bank: TextBank,
    x: Float[Tensor, "b c h w"],
    cameras: Cameras,
    shading: Shading,
    stream: Stream,
) -> float:
    """How much better the prior explains the back views as front views: mean log(own error / error as front).

    The prior itself is the classifier: the same noise is predicted with the view's own condition and with that of the
    front (cf. Li et al. 2023, "Your Diffusion Model is Secretly a Zero-Shot Classifier", arXiv:2303.16203). Below 0
    the back looks like a back; objects that look alike from both sides are near 0 from below.
    """
    back = ((cameras.azimuth_deg - 180.0).abs() <= BACK_DEG).nonzero()[:, 0]
    x = x[back]
    background = None if shading.background is None else shading.background[back]
    told = []
    for azimuth in (cameras.azimuth_deg[back], torch.zeros_like(cameras.azimuth_deg[back])):
        seen_from = orbit_cameras(
            azimuth,
            cameras.elevation_deg[back],
            cameras.radius[back],
            cameras.fov_deg[back],
            cameras.width_px,
        ).to(prior.device)
        told.append(bank.for_views(seen_from, Shading(background=background)).as_text())
    total = x.new_zeros(2, len(x))
    for index, time in enumerate(TIMES):
        t = prior.schedule.snap(torch.full((len(x),), time, device=x.device))
        alpha, sigma = prior.schedule.alpha(t), prior.schedule.sigma(t)
        noise = stream.fork(str(index)).normal(*x.shape, device=x.device)
        predicted = prior.eps(alpha * x + sigma * noise, t, *told)
        # In x0, so that the noise levels count alike.
        total += torch.stack([((eps - noise) * sigma / alpha).square().mean((1, 2, 3)) for eps in predicted])
    return float((total[0] / total[1]).log().mean())
