"""How much light ends up in the base colour: textures learned on toys whose true colours are known.

    python -m benchmarks.light [--kinds mug duck house ...] [--seeds 0 1] [--methods unlit lamp environment studio]
        [--steps 200] [--oracle] [--json results.json] [--pictures folder]

The shape is the toy's own; a texture starts grey and learns from the shipped prior and the toy's caption alone (with
--oracle: from pictures of the toy itself under the light of each step). Methods: unlit is the plain run; lamp lights
every step with one Lambertian lamp at random; environment lights it as the toybox world is lit, turned at random;
studio with a light that the prior never saw. Scores, over the surface that 16 views show: mean absolute error of the
base colour (sRGB, x 100) and its PSNR, raw and after the best common scale in linear light (so that mere exposure does
not count); baked = correlation of the scaled error's luminance with how brightly the toybox world lights the point;
PSNR, over the pixels of the object, of 8 views relit by two skies that no method saw, against the toy with its true
colours, raw and scaled.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("SDS3D_THREADS", "1")

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sds3d.cameras.light import ShadingLaw
from sds3d.cameras.orbit import turntable_cameras
from sds3d.cameras.sample import CameraLaw
from sds3d.config.load import override_layers
from sds3d.interfaces import Cameras, Material, Shading, Surface
from sds3d.job import JobConfig, load_job
from sds3d.mathx.color import to_linear, to_srgb
from sds3d.mesh.clean import clean
from sds3d.moment import Moment
from sds3d.ops.mesh_edges import MeshEdges, mesh_edges
from sds3d.optim import Optimizer
from sds3d.optimize import build_loop
from sds3d.rng import Stream, Streams
from sds3d.scenes import MeshScene
from sds3d.scenes.surface_view import SurfaceView, render_surface
from sds3d.toybox.captions import short_caption
from sds3d.toybox.colors import COLORS
from sds3d.toybox.kinds import KINDS
from sds3d.toybox.solid import HALF_EXTENT_M, toy_colors, toy_surface
from sds3d.toybox.world import Toy, sample_toy

COLOR_OF = {
    "mug": "red",
    "car": "blue",
    "duck": "yellow",
    "house": "white",
    "tree": "green",
    "chair": "brown",
}
UNSEEN = ("sunset", "noon")
VIEW_PX = 96
LUMINANCE = torch.tensor([0.2126, 0.7152, 0.0722])
WORLD_LIGHT = Shading(
    mode="pbr", environment="toybox", intensity=0.53, specular=0.0, known_materials=((0.0, 1.0),)
)
SETTINGS = (
    "scene.kind=mesh",
    f"scene.half_extent_m={HALF_EXTENT_M}",
    "scene.texture.metallic_range=[0,0]",
    "scene.texture.roughness=0.999",
    "time.low={from: 0.6, to: 0.15}",
    "time.high={from: 0.95, to: 0.45}",
    "penalties={opacity: 0, entropy: 0, tv_density: 0, tv_color: 200}",
)
WORLD = ("environments=[toybox]", "anchor=camera", "turn_deg=[-35,35]", "intensity=0.53", "specular=0")
METHODS: dict[str, tuple[str, ...]] = {
    "unlit": (),
    "lamp": ("lit=1", "textureless_frac=0"),
    "environment": ("lit=1", "textureless_frac=0", "light=environment", *WORLD),
    "studio": ("lit=1", "textureless_frac=0", "light=environment", "environments=[studio]"),
}


@dataclass(frozen=True)
class Truth:
    """A toy, its surface, and its colours."""

    toy: Toy
    surface: Surface
    edges: MeshEdges
    prompt: str
    main: np.ndarray
    second: np.ndarray

    def material(self, points: Float[Tensor, "n 3"]) -> Material:
        """Matte, in the true colours."""
        zero = torch.zeros(len(points), 1)
        base_color = toy_colors(self.toy, points, self.main, self.second)
        return Material(base_color=base_color, metallic=zero, roughness=zero + 1.0)

    def render(
        self, cameras: Cameras, shading: Shading, scene: MeshScene | None = None, factor: float = 1.0
    ) -> SurfaceView:
        """The toy, or with the base colours of a scene (times a factor) and all else its own."""

        def material(points: Float[Tensor, "n 3"]) -> Material:
            own = self.material(points)
            if scene is None:
                return own
            return replace(own, base_color=scaled_by(scene.material(points).base_color, factor))

        return render_surface(
            self.surface.vertices, self.surface.faces, self.edges, material, cameras, shading
        )


def make_truth(kind: str, seed: int) -> Truth:
    """A toy of a kind in the colours that its caption names."""
    color = COLOR_OF[kind]
    toy = sample_toy(np.random.Generator(np.random.PCG64(seed)), kind)
    surface = clean(toy_surface(toy), max_faces=12000, smooth_rounds=1)
    second = KINDS[kind].default_second or color
    return Truth(
        toy=toy,
        surface=surface,
        edges=mesh_edges(surface.faces, len(surface.vertices)),
        prompt=short_caption(kind, color),
        main=np.array(COLORS[color]),
        second=np.array(COLORS[second]),
    )


def job_of(truth: Truth, method: str, seed: int, steps: int) -> JobConfig:
    """The run of a method."""
    lines = [f'prompt="{truth.prompt}"', f"seed={seed}", f"steps={steps}", *SETTINGS]
    return load_job("default", override_layers([*lines, *(f"shading.{x}" for x in METHODS[method])])).config


def learn(truth: Truth, job: JobConfig) -> MeshScene:
    """A texture of the toy's shape from the shipped prior."""
    scene = MeshScene(job.scene.config, truth.surface, Stream(job.seed, "light"))
    loop = build_loop(job, torch.device("cpu"), start=scene)
    loop.run(job.steps, lambda event: None)
    return scene


def learn_from_pictures(truth: Truth, job: JobConfig) -> MeshScene:
    """A texture by regression to pictures of the toy, each under the environment of the method of that name.

    The method only says what the scene itself is rendered with.
    """
    scene = MeshScene(job.scene.config, truth.surface, Stream(job.seed, "light"))
    streams, cameras_of = Streams(job.seed), CameraLaw(job.camera)
    own = ShadingLaw(job.shading)
    world = ShadingLaw(job_of(truth, "environment", job.seed, job.steps).shading)
    optimizer = Optimizer(scene.groups(), job.optimizer)
    for step in range(job.steps):
        now = Moment(step, job.steps)
        cameras = cameras_of.sample(now, streams.stream("camera", step))
        shading, light = (law.sample(now, cameras, streams.stream("shading", step)) for law in (own, world))
        target = truth.render(cameras, light).render.rgb
        view = scene.render(cameras, shading, streams.stream("render", step))
        optimizer.step((view.rgb - target).square().sum() / len(cameras), now)
    return scene


@torch.no_grad()
def score(truth: Truth, scene: MeshScene) -> dict[str, float]:
    """Errors of the base colour and of relit pictures."""
    seen = [seen_points(truth, turntable_cameras(8, VIEW_PX, elevation)) for elevation in (10.0, 45.0)]
    points, brightness = (torch.cat(parts) for parts in zip(*seen, strict=True))
    true, found = truth.material(points).base_color, scene.material(points).base_color
    linear = to_linear(true), to_linear(found)
    scale = float((linear[0] * linear[1]).sum() / linear[1].square().sum())
    scaled = scaled_by(found, scale)
    error = (linear[1] * scale - linear[0]) @ LUMINANCE
    row = {
        "mae": 100.0 * float((found - true).abs().mean()),
        "psnr": psnr(found, true),
        "scale": scale,
        "mae scaled": 100.0 * float((scaled - true).abs().mean()),
        "psnr scaled": psnr(scaled, true),
        "baked": float(torch.corrcoef(torch.stack([error, brightness]))[0, 1]),
    }
    for name, factor in (("relit", 1.0), ("relit scaled", scale)):
        row[name] = float(np.mean([psnr(*relit(truth, scene, sky, factor)) for sky in UNSEEN]))
    return row


def seen_points(truth: Truth, cameras: Cameras) -> tuple[Float[Tensor, "n 3"], Float[Tensor, " n"]]:
    """The surface points that views show, and how brightly the toybox world lights them for their camera."""
    view = truth.render(cameras, replace(WORLD_LIGHT, turn_deg=cameras.azimuth_deg))
    assert view.render.light is not None
    white = view.render.light.permute(0, 2, 3, 1)[view.render.light[:, 0] > 0]
    return view.points, to_linear(white) @ LUMINANCE


def scaled_by(color: Float[Tensor, "n 3"], scale: float) -> Float[Tensor, "n 3"]:
    """SRGB colours times a factor in linear light."""
    return to_srgb((to_linear(color) * scale).clamp(0.0, 1.0))


def relit(
    truth: Truth, scene: MeshScene, sky: str, factor: float = 1.0
) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 3"]]:
    """Pixels of the object with the scene's base colours (times a factor) and with the true ones."""
    cameras = turntable_cameras(8, VIEW_PX)
    shading = Shading(mode="pbr", environment=sky, background=torch.ones(8, 3))
    ours, theirs = (truth.render(cameras, shading, of, factor).render for of in (scene, None))
    inside = theirs.alpha[:, 0] > 0.99
    found, true = (view.rgb.permute(0, 2, 3, 1)[inside] for view in (ours, theirs))
    return found, true


def psnr(found: Tensor, true: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of values in [0, 1]."""
    return float(-10.0 * (found - true).square().mean().log10())


@torch.no_grad()
def sheet(truth: Truth, scenes: Sequence[MeshScene], path: Path) -> None:
    """Rows: the toy, then every scene; two views each of base colour, sunset and noon."""
    cameras = turntable_cameras(4, VIEW_PX)
    white = torch.ones(4, 3)
    shadings = [
        Shading(background=white),
        *(Shading(mode="pbr", environment=sky, background=white) for sky in UNSEEN),
    ]
    rows = [
        torch.cat(
            [view for shading in shadings for view in truth.render(cameras, shading, of).render.rgb[:3]], 2
        )
        for of in (None, *scenes)
    ]
    pixels = (torch.cat(rows, 1).permute(1, 2, 0).clamp(0, 1) * 255).round().byte()
    Image.fromarray(pixels.numpy()).save(path)


def table(rows: Sequence[dict[str, object]], methods: Sequence[str]) -> str:
    """Means over seeds for each kind, and over all, as Markdown."""
    names = ("mae", "psnr", "scale", "mae scaled", "psnr scaled", "baked", "relit", "relit scaled")
    lines = [f"| toy | method | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for kind in (*dict.fromkeys(row["kind"] for row in rows), "all"):
        for method in methods:
            own = [row for row in rows if row["method"] == method and kind in (row["kind"], "all")]
            means = [float(np.mean([float(str(row[name])) for row in own])) for name in names]
            lines.append(f"| {kind} | {method} | " + " | ".join(f"{value:.2f}" for value in means) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=["mug", "duck", "house", "car"], choices=COLOR_OF)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--oracle", action="store_true", help="learn from pictures of the toy itself")
    parser.add_argument("--json", type=Path, help="also write all rows to this file")
    parser.add_argument("--pictures", type=Path, help="folder for one sheet of pictures per toy")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for kind in given.kinds:
        for seed in given.seeds:
            truth = make_truth(kind, seed)
            scenes = []
            for method in given.methods:
                job = job_of(truth, method, seed, given.steps)
                scenes.append((learn_from_pictures if given.oracle else learn)(truth, job))
                rows.append({"kind": kind, "seed": seed, "method": method, **score(truth, scenes[-1])})
                values = ", ".join(f"{k} {v:.2f}" for k, v in rows[-1].items() if isinstance(v, float))
                print(f"{kind} {seed} {method}: {values}", flush=True)
            if given.pictures is not None:
                given.pictures.mkdir(parents=True, exist_ok=True)
                sheet(truth, scenes, given.pictures / f"{kind}-{seed}.png")
    print(table(rows, given.methods))
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
