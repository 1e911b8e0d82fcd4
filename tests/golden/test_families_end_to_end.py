"""A prompt becomes a textured .glb with a tiny random pipeline of every family, through the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sds3d.cli import main
from sds3d.mesh.files import load_mesh
from tests.tiny.deepfloyd import make_deepfloyd
from tests.tiny.few_step import make_lcm, make_turbo
from tests.tiny.flux import make_flux
from tests.tiny.mvdream import make_mvdream
from tests.tiny.pixart import make_pixart
from tests.tiny.sana import make_sana
from tests.tiny.sd3 import make_sd3
from tests.tiny.sdxl import make_sdxl
from tests.tiny.stable_diffusion import make_instaflow, make_stable_diffusion

FAMILIES: dict[str, Callable[..., Any]] = {
    "sd": make_stable_diffusion,
    "sdxl": make_sdxl,
    "sd3": make_sd3,
    "flux": make_flux,
    "if": make_deepfloyd,
    "pixart": make_pixart,
    "sana": make_sana,
    "instaflow": make_instaflow,
    "lcm": make_lcm,
    "turbo": make_turbo,
    "mvdream": make_mvdream,
}
SMALL = [
    "camera.batch=4",
    "camera.hold_steps=1",
    "camera.render_px=32",
    "guidance={kind: sds, cfg_scale: 3}",
    "preview.turntable_frames=0",
    "export={cells_per_side: 16, texture_px: 128, compare_views: 0}",
]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_family_makes_an_asset(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = FAMILIES[family](tmp_path / "prior")
    words = ["generate", "a red mug", "--prior", str(folder), "--steps", "2", "--out", str(tmp_path / "run")]
    joint = ["camera.views_per_object=4", "time.per_view=false"] if family == "mvdream" else []
    assert main([*words, *SMALL, *joint]) == 0, capsys.readouterr().err
    assert len(load_mesh(tmp_path / "run" / "asset.glb").faces) > 0
