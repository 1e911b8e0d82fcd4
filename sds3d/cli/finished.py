"""Commands for finished assets: another light, smaller splats."""

from pathlib import Path
from typing import Annotated

import typer

from sds3d.cli.base import app
from sds3d.errors import ConfigError


@app.command()
def relight(
    asset: Annotated[Path, typer.Argument(metavar="ASSET", help="A .glb, .gltf, .obj, .ply or .stl file.")],
    env: Annotated[
        str, typer.Option(help="studio, sunset, noon, overcast, neon, toybox, or a lat-long file.")
    ] = "studio",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures; beside the asset if left out.")
    ] = None,
    turning: Annotated[str, typer.Option(help="What goes round: object or light.")] = "object",
    frames: Annotated[int, typer.Option(help="Frames of the video.")] = 48,
    size: Annotated[int, typer.Option(help="Side of the pictures in pixels.")] = 256,
) -> None:
    """Show an asset under another light: relit.mp4 and relit.png."""
    from sds3d.relight import RelightConfig
    from sds3d.relight import relight as run_relight

    if turning not in ("object", "light"):
        raise ConfigError(f"--turning: got {turning!r}, expected object or light")
    config = RelightConfig(
        environment=env,
        turning="light" if turning == "light" else "object",
        frames=frames,
        size_px=size,
    )
    for path in run_relight(asset, out or asset.parent, config).values():
        typer.echo(str(path))


@app.command()
def compact(
    source: Annotated[Path, typer.Argument(metavar="RUN|FILE", help="A run folder, or a splat file.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the file; beside the source if left out.")
    ] = None,
    max_loss: Annotated[float, typer.Option(help="PSNR that may be lost, in dB.")] = 1.0,
    like: Annotated[
        float, typer.Option(help="PSNR to the original's own renders that is kept, in dB.")
    ] = 40.0,
    ratio: Annotated[float | None, typer.Option(help="Stop once the file is this much smaller.")] = None,
    format_: Annotated[str, typer.Option("--format", help="spz or splat.")] = "spz",
    steps: Annotated[int, typer.Option(help="Fine-tuning steps per round.")] = 60,
    size: Annotated[int, typer.Option(help="Side of the compared pictures in pixels.")] = 128,
) -> None:
    """Make the splats of a run much smaller: prune, recover, quantise; writes splats.compact.spz and a report."""
    from sds3d.compact.command import compact as run_compact
    from sds3d.compact.shrink import CompactConfig

    config = CompactConfig(
        format=format_, max_loss_db=max_loss, like_db=like, ratio=ratio, steps=steps, size_px=size
    )
    result = run_compact(source, out, config, lambda line: typer.echo(line, err=True))
    typer.echo(result.line)
    typer.echo(str(result.file))
    typer.echo(str(result.report))
