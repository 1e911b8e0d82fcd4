"""Commands that make an asset or a picture, go on with one, or write it again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from sds3d.cli.base import (
    ConfigOption,
    Device,
    Formats,
    Negative,
    Options,
    Prior,
    RunFolder,
    RunOut,
    Seed,
    Steps,
    Words,
    app,
    conclude,
    progress,
    split_formats,
    split_words,
)
from sds3d.config.load import find_config, override_layers, setting
from sds3d.errors import ConfigError


@app.command()
def generate(
    words: Words = None,
    config: ConfigOption = "default",
    out: RunOut = None,
    seed: Seed = None,
    steps: Steps = None,
    device: Device = None,
    prior: Prior = None,
    negative: Negative = None,
    formats: Formats = None,
) -> None:
    """Make a 3D asset from a prompt, e.g. sds3d generate "a red mug" --seed 1 guidance.cfg_scale=10."""
    options = _common(seed, steps, device, prior, negative)
    _generate(words or [], config, out, options, formats)


def _common(
    seed: int | None, steps: int | None, device: str | None, prior: str | None, negative: str | None
) -> Options:
    """Options that all ways of making an asset share, by the setting that they stand for."""
    return {
        "seed": ("--seed", seed),
        "steps": ("--steps", steps),
        "device": ("--device", device),
        "prior.name": ("--prior", prior),
        "negative_prompt": ("--negative", negative),
    }


def _generate(
    words: Sequence[str], config: str, out: Path | None, options: Options, formats: str | None
) -> None:
    """Run a config with the words and options of the command line on top, and say where the files are."""
    prompt, overrides = split_words(words)
    layers = override_layers(overrides)
    options = {"prompt": ("the prompt", prompt), **options}
    layers += [setting(key, value, source) for key, (source, value) in options.items() if value is not None]
    if formats is not None:
        layers += override_layers([f"export.formats=[{', '.join(split_formats(formats))}]"], "--formats")
    if prompt is not None and not prompt.strip():
        raise ConfigError('the prompt is empty; say what to make, e.g. sds3d generate "a red mug"')
    find_config(config)  # a wrong name should not wait for torch
    from sds3d.staged import generate_stages, load_stages

    stages = load_stages(config, layers)
    with progress() as (listeners, stop):
        result = generate_stages(stages, out, config_name=config, listeners=listeners, stop=stop)
    conclude(result)


@app.command()
def texture(
    mesh: Annotated[Path, typer.Argument(metavar="MESH", help="A glb, gltf, obj, ply, stl or off file.")],
    words: Words = None,
    config: ConfigOption = "toybox/texture",
    out: RunOut = None,
    up: Annotated[str | None, typer.Option(help="The file's upward axis: y (default), z, -y, x, ...")] = None,
    front: Annotated[
        float | None, typer.Option(help="Where its front is, degrees counter-clockwise from above.")
    ] = None,
    keep_uvs: Annotated[bool, typer.Option("--keep-uvs", help="Keep its texture coordinates.")] = False,
    seed: Seed = None,
    steps: Steps = None,
    device: Device = None,
    prior: Prior = None,
    negative: Negative = None,
    formats: Formats = None,
) -> None:
    """Texture a mesh and keep its shape, e.g. sds3d texture mug.stl "a red mug" --up z."""
    options = _common(seed, steps, device, prior, negative) | {
        "start.mesh": ("MESH", str(mesh)),
        "start.up": ("--up", up),
        "start.front_deg": ("--front", front),
    }
    kept = ["start.keep_uvs=true"] if keep_uvs else []
    _generate([*(words or []), *kept], config, out, options, formats)


@app.command()
def image(
    words: Words = None,
    method: Annotated[str | None, typer.Option(help="A rule from `sds3d methods`.")] = None,
    config: Annotated[
        str, typer.Option("--config", help="A name from `sds3d configs`, or a file.")
    ] = "image",
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures; must be new or empty.")] = None,
    seed: Seed = None,
    steps: Steps = None,
    prior: Prior = None,
    count: Annotated[int, typer.Option(min=1, max=64, help="Images side by side.")] = 4,
    lr: Annotated[float, typer.Option(min=0.0, help="Learning rate of the pixels.")] = 0.03,
    space: Annotated[str, typer.Option(help="What is optimised: pixels or latents.")] = "pixels",
    azimuth: Annotated[float, typer.Option(help="Camera azimuth in degrees, 0 = front.")] = 30.0,
    init: Annotated[Path | None, typer.Option(help="Start from (and edit) this picture.")] = None,
) -> None:
    """The same guidance on a 2D image, e.g. sds3d image "a red mug" --method ism."""
    prompt, overrides = split_words(words or [])
    layers = override_layers(overrides)
    options: dict[str, tuple[str, str | int | None]] = {
        "prompt": ("the prompt", prompt),
        "guidance.kind": ("--method", method),
        "seed": ("--seed", seed),
        "steps": ("--steps", steps),
        "prior.name": ("--prior", prior),
    }
    # --method comes first, so that key=value settings of that rule are not dropped by the change of kind.
    chosen = [setting(key, value, source) for key, (source, value) in options.items() if value is not None]
    if space not in ("pixels", "latents"):
        raise ConfigError(f"--space: got {space!r}, expected pixels or latents")
    find_config(config)
    from sds3d.imaging import ImageConfig, make_image
    from sds3d.job import load_job

    job = load_job(config, [*chosen, *layers]).config
    settings = ImageConfig(
        count=count, space="pixels" if space == "pixels" else "latents", lr=lr, azimuth_deg=azimuth, init=init
    )
    with progress() as (listeners, _):
        result = make_image(job, settings, out, config_name=config, listeners=listeners)
    typer.echo(str(result.image))
    typer.echo(str(result.strip))


@app.command()
def resume(run: RunFolder) -> None:
    """Continue an interrupted or failed run from its last checkpoint."""
    from sds3d.staged import resume_any

    with progress() as (listeners, stop):
        result = resume_any(run, listeners=listeners, stop=stop)
    conclude(result)


@app.command()
def export(
    run: RunFolder,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="export.KEY=VALUE")] = None,
    formats: Formats = None,
    faces: Annotated[int | None, typer.Option(help="Triangles at most.")] = None,
    texture: Annotated[
        int | None, typer.Option(help="Side of the textures in pixels, a power of two.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="File name without extension; asset if left out.")] = None,
) -> None:
    """Write the asset of a run's last checkpoint again, in other formats and with other budgets if given."""
    options: dict[str, tuple[str, str | int | None]] = {
        "export.max_faces": ("--faces", faces),
        "export.texture_px": ("--texture", texture),
        "export.name": ("--name", name),
    }
    layers = override_layers(overrides or [])
    layers += [setting(key, value, source) for key, (source, value) in options.items() if value is not None]
    from sds3d.staged import export_any

    with progress() as (listeners, _):
        wanted = split_formats(formats) if formats else ()
        result = export_any(run, wanted, layers=layers, listeners=listeners)
    conclude(result)
