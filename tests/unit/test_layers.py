"""Imports only point down, third parties stay in their layer, and the shape checker is really on."""

import ast
from pathlib import Path

import pytest
import torch

from sds3d.interfaces import attach_gradient

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "sds3d"

# Lower layers first. A module may import its own layer only where SIBLINGS says nothing against it.
LAYERS: list[set[str]] = [
    {"errors", "moment", "rng", "transfer", "room", "typing", "paths", "__init__"},
    {"interfaces", "checkpoint", "slices", "parallel", "economy", "held"},
    {"mathx", "config"},
    {"ops"},
    {"guidance", "scenes", "priors", "cameras", "mesh", "events", "optim", "rewards", "penalties"},
    {"guide", "watch", "recovery", "surfaces"},
    {"optimize", "health", "asset", "convert", "given"},
    {"job"},
    {"plan"},
    {"run_folder", "session"},
    {"exporting"},
    {"run", "imaging", "relight"},
    {"staged"},
    {"compact"},
    {"workers"},
    {"bench"},
    {"batch"},
    {"doctor"},
    {"ui"},
    {"cli"},
    {"__main__"},
]
SIBLINGS = {"guidance", "scenes", "priors", "cameras", "mesh", "events", "rewards"}
ALLOWED_BETWEEN_SIBLINGS = {("scenes", "mesh.isosurface"), ("scenes", "mesh.tets"), ("guidance", "rewards")}
# toybox trains the shipped prior: a program of its own beside the package's layers.
OUTSIDE = {"toybox"}
# Its judge and its words also score what the package makes.
ALLOWED_OUTSIDE = {("rewards", "toybox"), ("bench", "toybox"), ("batch", "toybox")}
HOMES = {
    "diffusers": {"priors", "toybox"},
    "peft": {"priors"},
    "transformers": {"priors", "rewards", "toybox"},
    "tokenizers": {"priors", "toybox"},
    "gsplat": {"ops"},
    "nerfacc": {"ops"},
    "trimesh": {"mesh", "asset"},
    "xatlas": {"mesh"},
    "fast_simplification": {"mesh"},
    "imageio": {"events", "doctor"},
    "imageio_ffmpeg": {"events", "doctor"},
    "gradio": {"ui"},
    "starlette": {"ui"},
    "typer": {"cli"},
    "rich": {"events", "batch"},
    "ray": {"batch"},
    "submitit": {"batch"},
    "fsspec": {"batch"},
    "yaml": {"config"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> list[str]:
    """Absolute names of all imports, those inside functions and type-checking blocks excepted as noted."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in ast.walk(node):
                child._for_types = True  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        if hasattr(node, "_for_types"):
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def level(part: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if part in layer)


def test_every_part_has_a_layer() -> None:
    known = set().union(*LAYERS) | OUTSIDE
    assert {part_of(path) for path in modules()} <= known


def violations(part: str, imported: list[str]) -> list[str]:
    bad = []
    for name in imported:
        pieces = name.split(".")
        if pieces[0] != "sds3d":
            home = HOMES.get(pieces[0])
            if home is not None and part not in home:
                bad.append(f"{part} imports {name}, which belongs to {sorted(home)}")
            continue
        target = pieces[1] if len(pieces) > 1 and (PACKAGE / pieces[1]).with_suffix(".py").exists() else None
        target = target or (pieces[1] if len(pieces) > 1 and (PACKAGE / pieces[1]).is_dir() else "__init__")
        if part in OUTSIDE or target == part:
            continue
        between = part in SIBLINGS and target in SIBLINGS
        exempt = any(part == a and ".".join(pieces[1:]).startswith(b) for a, b in ALLOWED_BETWEEN_SIBLINGS)
        if target in OUTSIDE and (part, target) in ALLOWED_OUTSIDE:
            continue
        if target in OUTSIDE or level(target) > level(part) or (between and not exempt):
            bad.append(f"{part} imports {name}")
    return bad


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    assert violations(part_of(path), imports_of(path)) == []


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("config", "sds3d.optimize.Loop"),
        ("guidance", "sds3d.priors.text.TextBank"),
        ("scenes", "sds3d.mesh.bake.bake"),
        ("ops", "sds3d.scenes.SCENES"),
        ("run", "sds3d.cli.main"),
        ("mathx", "sds3d.toybox.world"),
        ("scenes", "gsplat.rasterization"),
        ("run", "trimesh"),
    ],
)
def test_the_check_itself_refuses(part: str, name: str) -> None:
    assert violations(part, [name]) != []


def test_the_check_itself_accepts() -> None:
    assert violations("scenes", ["sds3d.mesh.isosurface.extract", "sds3d.ops.volume", "torch"]) == []
    assert violations("events", ["sds3d.events.bus.Emit", "sds3d.paths.write_atomic", "rich.console"]) == []


def test_wrong_shapes_raise() -> None:
    with pytest.raises(Exception, match="grad") as caught:
        attach_gradient(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 5))
    assert "jaxtyping" in type(caught.value).__module__


def test_right_shapes_pass() -> None:
    assert attach_gradient(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4)) == 48.0


def test_most_of_the_package_is_checked() -> None:
    from conftest import checked_modules

    compiled = [path for path in modules() if "numba" in path.read_text(encoding="utf-8")]
    assert len(checked_modules()) >= 0.8 * (len(modules()) - len(compiled))
    assert "sds3d.interfaces" in checked_modules()


def test_no_future_annotations() -> None:
    for path in modules():
        assert "from __future__ import annotations" not in path.read_text(encoding="utf-8"), path
