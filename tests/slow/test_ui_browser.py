"""The interface in headless Chromium, driven by tests/js/ui.cjs as two people would.

Needs node, chromium (or SDS3D_CHROMIUM), and playwright-core in SDS3D_BROWSER_MODULES (a node_modules folder) or
installed by `make browser`.
"""

import json
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sds3d.mesh.files import load_mesh
from tests.serving import serving

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "js" / "ui.cjs"
MODULES = Path(os.environ.get("SDS3D_BROWSER_MODULES", ROOT / ".cache" / "browser" / "node_modules"))
CHROMIUM = os.environ.get("SDS3D_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")

pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """(address, root) of the interface in a process of its own."""
    with serving(tmp_path_factory.mktemp("ui") / "root") as address:
        yield address


@pytest.fixture(scope="module")
def visit(server: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What the script saw, and its pictures and downloads."""
    if shutil.which("node") is None or CHROMIUM is None:
        pytest.skip("node or chromium is not installed")
    if not (MODULES / "playwright-core").is_dir():
        pytest.skip(f"npm package playwright-core is not in {MODULES}; run: make browser")
    out = tmp_path_factory.mktemp("seen")
    done = subprocess.run(
        ["node", str(SCRIPT), str(MODULES), CHROMIUM, server[0], str(out)],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), out


Visit = tuple[dict[str, Any], Path]


def is_drawn(path: Path, share: float = 0.02) -> bool:
    """Whether a picture shows something on more than this share of its pixels."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    middle = pixels[len(pixels) // 8 :, :]
    ground = np.median(middle.reshape(-1, 3), axis=0)
    return float((np.abs(middle - ground).sum(-1) > 60).mean()) > share


def test_a_prompt_becomes_a_visible_model(visit: Visit) -> None:
    assert is_drawn(visit[1] / "model.png")
    assert is_drawn(visit[1] / "second.png")


def test_the_gaussians_are_shown(visit: Visit) -> None:
    assert is_drawn(visit[1] / "splats.png")


def test_the_live_picture_changes(visit: Visit) -> None:
    assert visit[0]["live"]["distinct"] == 4


def test_stop_keeps_a_usable_asset(visit: Visit) -> None:
    assert "stopped" in visit[0]["stopped"]
    assert visit[0]["resume_offered"]
    mesh = load_mesh(visit[1] / "download.glb")
    assert len(mesh.faces) > 500
    assert mesh.texture is not None
    assert visit[0]["download_name"] == "a-yellow-duck.glb"


def test_a_reload_keeps_the_job_and_the_result(visit: Visit) -> None:
    assert re.search(r"running a yellow duck\s*Step \d+ of 5000", visit[0]["after_reload"]["text"])
    assert "run=fast" in visit[0]["after_reload"]["url"]
    assert is_drawn(visit[1] / "again.png")
    assert visit[0]["prompt_after_reload"] == "a yellow duck"


def test_two_users_queue(visit: Visit) -> None:
    seen = visit[0]
    assert "a yellow duck" in seen["second_tab"]  # a tab without an address joins what runs
    assert "1 job ahead" in seen["waiting"]
    assert re.search(r"a yellow duck.*a red mug\s*no\. 1", seen["queue"], re.DOTALL)


def test_bad_input_shows_a_message(visit: Visit) -> None:
    assert "prompt: empty" in visit[0]["empty_prompt"]
    assert "'dragon'" in visit[0]["unknown_word"]
    assert visit[0]["hacked"] is None


def test_nothing_is_fetched_from_elsewhere(visit: Visit) -> None:
    assert visit[0]["external"] == []
    assert visit[0]["errors"] == []
    assert visit[0]["refused"] == []


def test_keyboard_and_phone(visit: Visit) -> None:
    assert visit[0]["focused"] == "TEXTAREA"  # typing may begin at once
    assert visit[0]["tabs_to_create"] < 20
    assert visit[0]["phone_overflow_px"] <= 0
    assert is_drawn(visit[1] / "phone-model.png")


def test_looks_figures_and_other_exports(visit: Visit) -> None:
    assert visit[0]["looks"] == 4
    assert "watertight" in visit[0]["figures"]
    names = zipfile.ZipFile(visit[1] / "download.zip").namelist()
    assert {Path(name).suffix for name in names} == {".obj", ".mtl", ".png"}


def test_settings_travel_between_form_yaml_and_command(visit: Visit) -> None:
    assert visit[0]["command"] == "sds3d generate 'a red mug' --config gaussians --seed 4 --steps 20"
    assert "guidance.cfg_scale=6.5" in visit[0]["drawer"]


def test_gallery_compares_and_deletes(visit: Visit, server: tuple[str, Path]) -> None:
    assert (visit[0]["cards"], visit[0]["compared"], visit[0]["asked_before_delete"]) == (2, 1, True)
    assert not list(server[1].glob("gaussians/*"))
    (stopped,) = server[1].glob("fast/a-yellow-duck*")
    assert len(load_mesh(stopped / "asset.glb").faces) <= 1100  # the export with a smaller budget
