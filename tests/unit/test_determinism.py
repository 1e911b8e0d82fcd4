"""The same seed on the same machine gives the same asset, byte for byte, whatever the scene."""

from pathlib import Path

import pytest

from sds3d.config.load import override_layers
from sds3d.staged import generate_stages, load_stages

SMALL = [
    "prompt=a red mug",
    "device=cpu",
    "steps=6",
    "camera.batch=2",
    "camera.render_px=16",
    "preview.turntable_frames=0",
    "preview.every_s=1000",
    "export.cells_per_side=24",
    "export.texture_px=128",
    "export.max_faces=400",
    "export.compare_views=1",
]
KINDS = {
    "voxel": ("fast", []),
    "nerf": ("nerf", []),
    "gaussians": ("gaussians", []),
    "stages: voxel, tetmesh, mesh": (
        "toybox/quality",
        [
            "stages.geometry.scene.cells=16",
            "stages.texture.start.texture_steps=4",
            "stages.texture.start.cells=24",
        ],
    ),
}


def files_of(config: str, settings: list[str], out: Path) -> dict[str, bytes]:
    """The asset files of a run, by name."""
    stages = load_stages(config, override_layers([*SMALL, *settings]))
    result = generate_stages(stages, out, config_name=config)
    return {name: path.read_bytes() for name, path in result.files.items() if name != "turntable"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_bytes(kind: str, tmp_path: Path) -> None:
    config, settings = KINDS[kind]
    first = files_of(config, settings, tmp_path / "first")
    assert {"glb", "contact_sheet"} <= set(first)
    assert files_of(config, settings, tmp_path / "second") == first
    assert files_of(config, [*settings, "seed=1"], tmp_path / "other")["glb"] != first["glb"]
