"""An exported GLB in three.js and headless Chromium beside our own render: same way round, same colours.

Needs node, chromium (or SDS3D_CHROMIUM) and the npm packages three and playwright-core, in SDS3D_BROWSER_MODULES (a
node_modules folder) or installed by `make browser`.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from sds3d.asset import AssetConfig, make_asset
from sds3d.cameras.orbit import turntable_cameras
from sds3d.interfaces import Cameras
from sds3d.mesh.fidelity import similarity
from sds3d.mesh.files import load_mesh
from sds3d.mesh.lit import render_lit
from sds3d.mesh.textured import render_textured
from sds3d.ops.environment import Environment
from sds3d.ops.skies import sky
from tests.toys import Mug

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "js" / "show_glb.mjs"
MODULES = Path(os.environ.get("SDS3D_BROWSER_MODULES", ROOT / ".cache" / "browser" / "node_modules"))
CHROMIUM = os.environ.get("SDS3D_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
SIZE_PX, SUPERSAMPLE, VIEWS = 256, 2, 4
LIGHT_ROWS = 128
BACKGROUND = (0.25, 0.5, 0.75)

if shutil.which("node") is None:
    pytest.skip("node is not installed", allow_module_level=True)
if CHROMIUM is None:
    pytest.skip("chromium is not installed", allow_module_level=True)
for package in ("three", "playwright-core"):
    if not (MODULES / package).is_dir():
        pytest.skip(f"npm package {package} is not in {MODULES}; run: make browser", allow_module_level=True)


def world_of(c2w: Tensor) -> list[float]:
    """The camera's place in three.js, column by column: it looks along -z with +y up."""
    return (c2w @ torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))).T.flatten().tolist()


def projection_of(intrinsics: Tensor, size_px: int, near: float = 0.1, far: float = 20.0) -> list[float]:
    """The OpenGL projection of a pinhole camera, column by column."""
    matrix = torch.zeros(4, 4)
    matrix[0, 0], matrix[1, 1] = 2 * intrinsics[0, 0] / size_px, 2 * intrinsics[1, 1] / size_px
    matrix[0, 2], matrix[1, 2] = 1 - 2 * intrinsics[0, 2] / size_px, 2 * intrinsics[1, 2] / size_px - 1
    matrix[2, 2], matrix[2, 3] = (far + near) / (near - far), 2 * far * near / (near - far)
    matrix[3, 2] = -1
    return matrix.T.flatten().tolist()


def equirectangular(light: Environment, rows: int) -> np.ndarray:
    """The light as three.js maps directions: u = atan2(z, x) / 2 pi + 1/2, and the bottom row first."""
    down = (torch.arange(rows) + 0.5) / rows * torch.pi - torch.pi / 2
    round_ = ((torch.arange(2 * rows) + 0.5) / (2 * rows) - 0.5) * 2 * torch.pi
    down, round_ = torch.meshgrid(down, round_, indexing="ij")
    towards = torch.stack([down.cos() * round_.cos(), down.sin(), down.cos() * round_.sin()], -1).reshape(
        -1, 3
    )
    return light.reflection(towards, torch.zeros(len(towards), 1)).numpy().astype("<f4")


def photographed(
    glb: Path, cameras: Cameras, light: Environment, folder: Path
) -> tuple[dict, Tensor, Tensor]:
    """What the browser reports, and its pictures (b 3 H W): unlit, and under the light."""
    fine = cameras.resized(SUPERSAMPLE * cameras.width_px)
    (folder / "light.bin").write_bytes(equirectangular(light, LIGHT_ROWS).tobytes())
    views = [
        {
            "name": f"{look}_{index}",
            "unlit": look == "unlit",
            "world": world_of(fine.c2w[index]),
            "projection": projection_of(fine.intrinsics[index], fine.width_px),
        }
        for look in ("unlit", "lit")
        for index in range(len(fine))
    ]
    job = {
        "glb": str(glb),
        "size_px": fine.width_px,
        "background": BACKGROUND,
        "light": {"file": str(folder / "light.bin"), "width": 2 * LIGHT_ROWS, "height": LIGHT_ROWS},
        "views": views,
    }
    (folder / "job.json").write_text(json.dumps(job))
    command = ["node", str(SCRIPT), str(MODULES), str(CHROMIUM), str(folder / "job.json"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    pictures = [
        torch.from_numpy(np.array(Image.open(folder / f"{view['name']}.png").convert("RGB")))
        for view in views
    ]
    stack = avg_pool2d(torch.stack(pictures).permute(0, 3, 1, 2) / 255.0, SUPERSAMPLE)
    return json.loads(done.stdout), stack[: len(fine)], stack[len(fine) :]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    config = AssetConfig(cells_per_side=64, max_faces=4000, texture_px=256, compare_views=0)
    glb = make_asset(Mug(), folder, config).files["glb"]
    cameras = turntable_cameras(VIEWS, SIZE_PX)
    light = sky("studio")
    report, unlit, lit = photographed(glb, cameras, light, folder)
    behind = torch.tensor(BACKGROUND).expand(VIEWS, 3)
    mesh = load_mesh(glb)
    return {
        "report": report,
        "unlit": unlit,
        "lit": lit,
        "ours": render_textured(mesh, cameras, behind, supersample=SUPERSAMPLE)[0],
        "ours_lit": render_lit(mesh, cameras, behind, light, supersample=SUPERSAMPLE)[0],
    }


def psnr(a: Tensor, b: Tensor) -> float:
    alpha = torch.ones(len(a), 1, *a.shape[2:])
    return similarity(a, alpha, b, alpha).psnr_db


def test_the_browser_shows_our_unlit_picture(shown):
    assert psnr(shown["unlit"], shown["ours"]) > 38.0  # the rest is mip levels at hard colour edges


def test_mirrored_turned_or_recoloured_files_would_be_noticed(shown):
    ours = shown["ours"]
    for wrong in (ours.flip(-1), ours.flip(-2), ours.roll(1, 0), ours[:, [2, 1, 0]], ours.pow(1 / 2.2)):
        assert psnr(shown["unlit"], wrong) < 25.0


def test_the_browser_lights_it_as_we_do(shown):
    assert psnr(shown["lit"], shown["ours_lit"]) > 30.0


def test_nothing_is_asked_from_elsewhere(shown):
    assert shown["report"]["blocked"] == []
    assert any(address.endswith("/asset.glb") for address in shown["report"]["requests"])
