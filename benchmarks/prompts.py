"""Twenty prompts, half of them colour-kind pairs that the prior never saw, judged on the exported files.

    python benchmarks/prompts.py --out outputs/prompts [--config default] [--write-docs]

One seed each, default settings. The judge reads eight azimuths of each exported .glb (white background, elevation 15);
the majority must name kind and colour. Finished runs are kept, so an interrupted benchmark goes on where it stopped.
`--write-docs` writes docs/results.md and docs/images/results.png.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sds3d.cameras.orbit import turntable_cameras
from sds3d.mesh.files import load_mesh
from sds3d.mesh.textured import render_textured
from sds3d.toybox.held_out import held_out_pairs
from sds3d.toybox.judge import load_judge, majority, parse_prompt

SEEN = (
    "a red mug",
    "a blue teapot",
    "a brown chair",
    "a red apple",
    "a red mushroom",
    "a green tree",
    "a yellow duck",
    "a pink donut",
    "a green cactus",
    "a white snowman",
)
HELD_OUT_FIRST = (("purple", "mug"), ("blue", "mushroom"), ("cyan", "duck"), ("pink", "car"))
VIEWS, VIEW_PX, TILE_PX = 8, 64, 96


def held_out_prompts(count: int = 10) -> list[str]:
    """`count` held-out pairs of different kinds: the four named ones, then in alphabetical order of the kind."""
    chosen = list(HELD_OUT_FIRST)
    for color, kind in sorted(held_out_pairs(), key=lambda pair: (pair[1], pair[0])):
        if len(chosen) < count and kind not in [k for _, k in chosen]:
            chosen.append((color, kind))
    return [f"{'an' if color[0] in 'aeiou' else 'a'} {color} {kind}" for color, kind in chosen]


def make(prompt: str, folder: Path, config: str, seed: int, settings: list[str]) -> None:
    """Run the command line as a user would, unless the asset is there already."""
    if (folder / "asset.glb").exists():
        return
    command = [sys.executable, "-m", "sds3d", "generate", prompt, "--out", str(folder)]
    command += ["--config", config, "--seed", str(seed), *settings]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def look(folder: Path, size_px: int, background: float) -> torch.Tensor:
    """The exported file from eight sides."""
    mesh = load_mesh(folder / "asset.glb")
    return render_textured(mesh, turntable_cameras(VIEWS, size_px), torch.full((VIEWS, 3), background))[0]


def judge_run(prompt: str, folder: Path) -> dict[str, Any]:
    """What the judge reads, next to what was asked for."""
    color, kind = parse_prompt(prompt)
    verdicts = load_judge()(look(folder, VIEW_PX, 1.0))
    read_kind, read_color = majority(verdicts)
    manifest = json.loads((folder / "manifest.json").read_text())
    return {
        "prompt": prompt,
        "read": f"{read_color} {read_kind}",
        "kind_ok": read_kind == kind,
        "color_ok": read_color == color,
        "kind_votes": sum(k == kind for k in verdicts.kinds()) / VIEWS,
        "seconds": manifest["seconds"],
        "faces": manifest["mesh"]["faces"],
        "psnr_db": manifest["fidelity"]["psnr_db"],
        "watertight": manifest["mesh"]["watertight"],
    }


def table(rows: list[dict[str, Any]], held: set[str]) -> str:
    """The markdown table."""
    lines = ["| prompt | held out | judge reads | kind | colour | views with kind | faces | PSNR dB | s |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        marks = ["yes" if row[key] else "**no**" for key in ("kind_ok", "color_ok")]
        lines.append(
            f"| {row['prompt']} | {'yes' if row['prompt'] in held else ''} | {row['read']} | {marks[0]} | {marks[1]} "
            f"| {row['kind_votes']:.0%} | {row['faces']} | {row['psnr_db']:.1f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def sheet(folders: list[Path]) -> Image.Image:
    """One row of eight views per asset, two assets side by side."""
    rows = [torch.cat(list(look(folder, TILE_PX, 1.0)), dim=2) for folder in folders]
    half = (len(rows) + 1) // 2
    rows += [torch.ones_like(rows[0])] * (2 * half - len(rows))
    picture = torch.cat([torch.cat(rows[:half], dim=1), torch.cat(rows[half:], dim=1)], dim=2)
    return Image.fromarray((picture.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy().astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", default="default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", type=int, default=None, help="the first N seen and first N held-out prompts"
    )
    parser.add_argument("--write-docs", action="store_true")
    parser.add_argument("settings", nargs="*", help="key=value")
    given = parser.parse_args()
    held = held_out_prompts()
    prompts = [*SEEN[: given.only], *held[: given.only]]
    rows, folders = [], []
    for prompt in prompts:
        folder = given.out / prompt.replace(" ", "_")
        make(prompt, folder, given.config, given.seed, given.settings)
        rows.append(judge_run(prompt, folder))
        folders.append(folder)
        print(json.dumps(rows[-1]), flush=True)
    right = sum(row["kind_ok"] and row["color_ok"] for row in rows)
    summary = f"Kind and colour right: **{right} of {len(rows)}**."
    picture = sheet(folders)
    picture.save(given.out / "results.png")
    text = table(rows, set(held))
    print(text, summary, sep="\n\n")
    if given.write_docs:
        docs = Path(__file__).parents[1] / "docs"
        (docs / "images").mkdir(exist_ok=True)
        picture.save(docs / "images" / "results.png", optimize=True)
        only = "" if given.only is None else f" --only {given.only}"
        command = (
            f"python benchmarks/prompts.py --config {given.config} --seed {given.seed}{only} --write-docs"
        )
        intro = (
            f"# {len(rows)} prompts on the shipped prior\n\n"
            f"Made by `{command}`: one seed each, no selection. The judge network looks at eight azimuths of each "
            "exported `.glb`.\nHeld-out pairs are colours that the prior never saw on that kind of object.\n"
        )
        (docs / "results.md").write_text(f"{intro}\n{text}\n\n{summary}\n\n![results](images/results.png)\n")


if __name__ == "__main__":
    main()
