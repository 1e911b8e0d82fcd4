"""Four rules on a two-dimensional mixture of Gaussians whose score is known: draws docs/images/mog.png.

    python docs/figures/mog.py [--out docs/images/mog.png]

SDS collapses onto the modes, CSD drifts past them, CFD ends at the sample that its noise names, and VSD's particles
cover the distribution. VSD's student is exact: the score of a kernel density estimate of the particles.
"""

import argparse
import colorsys
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from sds3d.guidance import CSD, SDS
from sds3d.interfaces import Condition, Draw, Told
from sds3d.mathx.schedule import CosineSchedule
from sds3d.moment import Moment
from sds3d.priors.analytic import AnalyticPrior, Mixture
from sds3d.rng import Stream

SCHEDULE = CosineSchedule()
PARTICLES = 240
MODES = torch.tensor(
    [[1.0, 1.25], [1.9, -0.15], [0.35, -1.15]], dtype=torch.float64
)  # what the prompt asks for
OTHERS = torch.tensor([[-1.7, 0.6], [-1.3, -1.1], [-0.6, 1.7]], dtype=torch.float64)  # what else there is
VARIANCE = 0.06
BANDWIDTH = 0.03  # variance of VSD's kernels

PANEL, GAP, TOP, SCALE = 420, 24, 92, 3  # pixels; drawn SCALE times larger and shrunk
CENTRE, REACH = (0.95, 0.0), 2.75  # what a panel shows
Path2D = list[torch.Tensor]  # positions of all particles, each (n, 2)


def mixture(means: torch.Tensor, variance: float) -> Mixture:
    count = len(means)
    return Mixture(
        means=means[:, :, None, None],
        variances=torch.full((count,), variance, dtype=torch.float64),
        weights=torch.ones(count, dtype=torch.float64),
    )


class SamePrompt(AnalyticPrior):
    """All rows of a bundle hold one prompt, so a bundle is one evaluation."""

    def eps(self, x_t: torch.Tensor, t: torch.Tensor, *told: Told) -> tuple[torch.Tensor, ...]:
        a, s, known = self.schedule.alpha(t), self.schedule.sigma(t), list(self.mixtures.values())
        return tuple(known[int(bundle.text[0, 0].argmax())].eps(x_t, a, s) for bundle in told)


PRIOR = SamePrompt(
    {"y": mixture(MODES, VARIANCE), "": mixture(torch.cat([MODES, OTHERS]), VARIANCE)}, SCHEDULE
)


def condition() -> Condition:
    text, null = PRIOR.encode_text(["y", ""])
    return Condition(text=text.expand(PARTICLES, -1, -1), null=null.expand(PARTICLES, -1, -1))


def draw_at(t: float, noise: torch.Tensor, step: int) -> Draw:
    times = torch.full((PARTICLES,), t, dtype=torch.float64)
    return Draw(t=times, noise=noise, schedule=SCHEDULE, stream=Stream(0, "mog", step), now=Moment(0, 1))


def normal(name: str, step: int = 0) -> torch.Tensor:
    return Stream(7, name, step).normal(PARTICLES, 2, 1, 1).double()


def descend(grad: Callable[[torch.Tensor, int], torch.Tensor], rates: Iterable[float]) -> Path2D:
    """Gradient descent of all particles from the middle; every position on the way."""
    x = 0.02 * normal("start")
    path = [x]
    for step, rate in enumerate(rates):
        x = x - rate * grad(x, step)
        path.append(x)
    return [position[:, :, 0, 0] for position in path]


def uniform_t(step: int, steps: int) -> float:
    """Uniform from 0.02 to 0.98, in the second half to 0.4: the time switch of ProlificDreamer."""
    high = 0.98 if step < steps // 2 else 0.4
    return 0.02 + (high - 0.02) * float(Stream(7, "t", step).uniform(1))


def sds(steps: int = 1500) -> Path2D:
    rule, cond = SDS(SDS.Config(cfg_scale=1.0, weight="uniform"), PRIOR), condition()
    rates = (0.05 * (1 - k / steps) + 0.0005 for k in range(steps))
    return descend(
        lambda x, k: rule.residual(x, draw_at(uniform_t(k, steps), normal("noise", k), k), cond).grad, rates
    )


def csd(steps: int = 900) -> Path2D:
    rule, cond = CSD(CSD.Config(weight="uniform"), PRIOR), condition()
    return descend(
        lambda x, k: rule.residual(x, draw_at(uniform_t(k, 2 * steps), normal("noise", k), k), cond).grad,
        [0.026] * steps,
    )


def cfd(noise: torch.Tensor) -> Path2D:
    """SDS with fixed noise, falling t and steps of -d lambda: the probability flow of the prior, seen clean."""
    rule, cond = SDS(SDS.Config(cfg_scale=1.0, weight="uniform"), PRIOR), condition()
    t = np.linspace(0.985, 0.0, 301)
    lam = np.tan(t * math.pi / 2)
    return descend(
        lambda x, k: rule.residual(x, draw_at(float(t[k]), noise, k), cond).grad, lam[:-1] - lam[1:]
    )


def vsd(steps: int = 3000) -> Path2D:
    """Grad = w (eps_prior - eps_student); the student knows the particles' distribution exactly."""
    cond = condition()

    def grad(x: torch.Tensor, step: int) -> torch.Tensor:
        draw = draw_at(uniform_t(step, steps), normal("noise", step), step)
        x_t = draw.diffuse(x)
        (text,) = PRIOR.eps(x_t, draw.t, cond.as_text())
        student = mixture(x[:, :, 0, 0], BANDWIDTH).eps(x_t, draw.alpha, draw.sigma)
        return text - student

    return descend(grad, (0.05 * (1 - k / steps) + 0.0005 for k in range(steps)))


# --- drawing -----------------------------------------------------------------------------------------------------


def density() -> Image.Image:
    """The prompt's density in blue, the rest of the null prompt's in grey, with contour lines."""
    size = PANEL * SCALE
    at = (np.arange(size) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(CENTRE[0] + REACH * at, CENTRE[1] - REACH * at)

    def height(means: torch.Tensor) -> np.ndarray:
        return sum(np.exp(-((x - mx) ** 2 + (y - my) ** 2) / (2 * VARIANCE)) for mx, my in means.tolist())

    canvas = np.full((size, size, 3), 252.0)
    for means, colour in ((OTHERS, (176, 176, 180)), (MODES, (72, 122, 190))):
        value = height(means)
        cover = 0.5 * value**0.7
        for level in (0.05, 0.25, 0.6):
            gradient = np.hypot(*np.gradient(value)) + 1e-9
            line = np.clip(1.4 - np.abs(value - level) / gradient / SCALE * 1.6, 0, 1) * (value > 1e-3)
            cover = np.maximum(cover, 0.55 * line)
        cover = np.clip(cover, 0, 1)[..., None]
        canvas = canvas * (1 - cover) + np.array(colour) * cover
    return Image.fromarray(canvas.round().astype(np.uint8))


def colours(noise: torch.Tensor) -> list[tuple[int, int, int]]:
    """Hue by the direction of a particle's noise, pale near zero."""
    found = []
    for dx, dy in noise[:, :, 0, 0].tolist():
        hue = (math.atan2(dy, dx) / (2 * math.pi)) % 1.0
        vivid = 0.45 + 0.5 * min(math.hypot(dx, dy) / 2.0, 1.0)
        red, green, blue = colorsys.hsv_to_rgb(hue, vivid, 0.82)
        found.append((round(255 * red), round(255 * green), round(255 * blue)))
    return found


def on_panel(point: torch.Tensor) -> tuple[float, float]:
    x, y = point.tolist()
    half = PANEL * SCALE / 2
    return half + half * (x - CENTRE[0]) / REACH, half - half * (y - CENTRE[1]) / REACH


def dot(draw: ImageDraw.ImageDraw, at: tuple[float, float], radius: float, colour: tuple[int, ...]) -> None:
    box = [at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius]
    draw.ellipse(box, fill=colour, outline=(255, 255, 255), width=SCALE // 2 + 1)


def panel(path: Path2D, palette: list[tuple[int, int, int]], every: int) -> Image.Image:
    image = density()
    lines = Image.new("RGBA", image.size)
    pen = ImageDraw.Draw(lines)
    kept = [*path[::every], path[-1]]
    for particle, colour in enumerate(palette):
        if particle % 3 == 0:
            points = [on_panel(position[particle]) for position in kept]
            pen.line(points, fill=(*colour, 105), width=SCALE, joint="curve")
    image.paste(lines, (0, 0), lines)
    pen = ImageDraw.Draw(image)
    for particle, colour in enumerate(palette):
        dot(pen, on_panel(path[-1][particle]), 3.6 * SCALE, colour)
    start = on_panel(path[0].mean(0))
    dot(pen, start, 5 * SCALE, (30, 30, 34))
    return image


def inset(image: Image.Image, noise: torch.Tensor, palette: list[tuple[int, int, int]]) -> None:
    """The noise of every particle, in a corner."""
    side, margin = 104 * SCALE, 10 * SCALE
    left, top = margin, image.height - side - margin
    pen = ImageDraw.Draw(image)
    pen.rounded_rectangle(
        [left, top, left + side, top + side],
        8 * SCALE,
        fill=(255, 255, 255),
        outline=(190, 190, 196),
        width=SCALE,
    )
    for (x, y), colour in zip(noise[:, :, 0, 0].tolist(), palette, strict=True):
        at = left + side / 2 + x * side / 6.6, top + side / 2 - y * side / 6.6
        dot(pen, at, 2.4 * SCALE, colour)
    pen.text((left + 6 * SCALE, top + 3 * SCALE), "noise", font=font(12), fill=(90, 90, 96))


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size * SCALE)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "images" / "mog.png")
    given = parser.parse_args()
    torch.set_num_threads(1)
    noise = normal("cfd")
    palette = colours(noise)
    panels = [
        ("SDS", "collapses onto the modes", sds(), 10),
        ("CSD", "drifts past them, without a fixed point", csd(), 12),
        ("CFD", "ends at the sample that its noise names", cfd(noise), 3),
        ("VSD", "covers: its particles share a student", vsd(), 15),
    ]
    width = len(panels) * PANEL + (len(panels) + 1) * GAP
    sheet = Image.new("RGB", (width * SCALE, (TOP + PANEL + GAP) * SCALE), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for index, (title, text, path, every) in enumerate(panels):
        image = panel(path, palette, every)
        if title == "CFD":
            inset(image, noise, palette)
        left = (GAP + index * (PANEL + GAP)) * SCALE
        sheet.paste(image, (left, TOP * SCALE))
        pen.rectangle(
            [left, TOP * SCALE, left + image.width - 1, TOP * SCALE + image.height - 1],
            outline=(205, 205, 210),
            width=SCALE,
        )
        pen.text((left, 14 * SCALE), title, font=font(30), fill=(25, 25, 30))
        pen.text((left, 56 * SCALE), text, font=font(19), fill=(95, 95, 102))
    small = sheet.resize((width, TOP + PANEL + GAP), Image.Resampling.LANCZOS)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    small.save(given.out, optimize=True)
    print(given.out)


if __name__ == "__main__":
    main()
