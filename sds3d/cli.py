"""The `sds3d` command: each subcommand gathers its words into a job and hands over to `sds3d.run`.

Heavy imports stand inside the commands, so that help and mistakes answer at once.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sds3d import __version__
from sds3d.config.load import config_names, find_config, is_override, override_layers, setting
from sds3d.errors import ConfigError, Sds3dError, explained

if TYPE_CHECKING:
    from sds3d.run import RunResult, Stop

app = typer.Typer(
    help="Text to 3D by score distillation: a prompt in, a textured GLB out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench_app = typer.Typer(help="Compare on equal terms.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench_app, name="bench")
config_app = typer.Typer(help="Look at configs.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(config_app, name="config")

Options = dict[str, tuple[str, str | int | float | None]]
Words = Annotated[list[str] | None, typer.Argument(metavar="PROMPT|KEY=VALUE")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
ConfigOption = Annotated[str, typer.Option("--config", help="A name from `sds3d configs`, or a YAML file.")]


@app.command()
def generate(
    words: Words = None,
    config: ConfigOption = "default",
    out: Annotated[Path | None, typer.Option(help="Folder for the run; must be new or empty.")] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes every random number.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimisation steps.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    prior: Annotated[
        str | None, typer.Option(help="A name from `sds3d priors`, a folder, or a hub id.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    formats: Annotated[str | None, typer.Option("--formats", "--format", help="E.g. glb,obj,ply.")] = None,
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
    with _progress() as (listeners, stop):
        result = generate_stages(stages, out, config_name=config, listeners=listeners, stop=stop)
    _conclude(result)


@app.command()
def texture(
    mesh: Annotated[Path, typer.Argument(metavar="MESH", help="A glb, gltf, obj, ply, stl or off file.")],
    words: Words = None,
    config: ConfigOption = "toybox/texture",
    out: Annotated[Path | None, typer.Option(help="Folder for the run; must be new or empty.")] = None,
    up: Annotated[str | None, typer.Option(help="The file's upward axis: y (default), z, -y, x, ...")] = None,
    front: Annotated[
        float | None, typer.Option(help="Where its front is, degrees counter-clockwise from above.")
    ] = None,
    keep_uvs: Annotated[bool, typer.Option("--keep-uvs", help="Keep its texture coordinates.")] = False,
    seed: Annotated[int | None, typer.Option(help="Fixes every random number.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimisation steps.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    prior: Annotated[
        str | None, typer.Option(help="A name from `sds3d priors`, a folder, or a hub id.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    formats: Annotated[str | None, typer.Option("--formats", "--format", help="E.g. glb,obj,ply.")] = None,
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
    seed: Annotated[int | None, typer.Option(help="Fixes every random number.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimisation steps.")] = None,
    prior: Annotated[
        str | None, typer.Option(help="A name from `sds3d priors`, a folder, or a hub id.")
    ] = None,
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
    with _progress() as (listeners, _):
        result = make_image(job, settings, out, config_name=config, listeners=listeners)
    typer.echo(str(result.image))
    typer.echo(str(result.strip))


@app.command()
def resume(run: RunFolder) -> None:
    """Continue an interrupted or failed run from its last checkpoint."""
    from sds3d.staged import resume_any

    with _progress() as (listeners, stop):
        result = resume_any(run, listeners=listeners, stop=stop)
    _conclude(result)


@app.command()
def export(
    run: RunFolder,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="export.KEY=VALUE")] = None,
    formats: Annotated[str | None, typer.Option("--format", "--formats", help="E.g. glb,obj,ply.")] = None,
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

    with _progress() as (listeners, _):
        wanted = split_formats(formats) if formats else ()
        result = export_any(run, wanted, layers=layers, listeners=listeners)
    _conclude(result)


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


@app.command()
def doctor() -> None:
    """Check this machine: packages, device, threads, priors, video, disk. Exit status 0 if a run can work."""
    from sds3d.doctor import examine

    checks = examine()
    width = max(len(check.name) for check in checks)
    for check in checks:
        typer.echo(f"{check.status:<5} {check.name:<{width}}  {check.detail}")
    if any(check.status == "FAIL" for check in checks):
        raise typer.Exit(1)


@app.command()
def configs() -> None:
    """List the shipped configs."""
    for name in config_names():
        first = find_config(name).read_text(encoding="utf-8").partition("\n")[0]
        typer.echo(f"{name:<20} {first.lstrip('# ') if first.startswith('#') else ''}".rstrip())


@app.command()
def methods() -> None:
    """List guidance rules with paper, prior passes per view and step, and state; time laws, noises, rewards, scenes."""
    from sds3d.guidance import RULES
    from sds3d.guidance.noise import NOISES
    from sds3d.guidance.time import TIME_LAWS
    from sds3d.rewards import REWARDS
    from sds3d.scenes import SCENES

    typer.echo(f"{'guidance':<9} {'kind':<8} {'title':<42} {'paper':<46} {'passes':<22} state")
    for kind, rule in sorted(RULES.items()):
        info = rule.info
        title = f"{info.title}{' (experimental)' if info.experimental else ''}"
        state = info.state + (f"; needs {', '.join(info.needs)}" if info.needs else "")
        typer.echo(f"{'':<9} {kind:<8} {title:<42} {info.paper:<46} {info.passes:<22} {state}".rstrip())
    tables = (("time", TIME_LAWS), ("noise", NOISES), ("reward", REWARDS), ("scene", SCENES))
    for name, table in tables:
        for kind, entry in sorted(table.items()):
            typer.echo(f"{name:<9} {kind:<14} {(entry.__doc__ or '').strip().partition(chr(10))[0]}")


@app.command()
def priors(
    json_: Annotated[bool, typer.Option("--json", help="As JSON, with all fields.")] = False,
    check: Annotated[
        str | None, typer.Option(metavar="NAME|PATH", help="Examine one prior: complete, and loads?")
    ] = None,
) -> None:
    """List the priors known by name: size, licence, gated or open, source, on this disk or not; nothing is fetched."""
    from sds3d.priors import PriorConfig
    from sds3d.priors.listing import examine, rows, table

    if check is not None:
        for finding in examine(PriorConfig(name=check)):
            typer.echo(f"{finding.name:<16} {finding.detail}")
        typer.echo("ok")
    elif json_:
        typer.echo(json.dumps(rows(), indent=2))
    else:
        for line in table():
            typer.echo(line)


@app.command()
def batch(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="prompts.txt (one per line) or jobs.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
    config: ConfigOption = "default",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the batch; the same command goes on where it stopped.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Runs at a time; default: one per GPU.")] = None,
    engine: Annotated[str, typer.Option(help="local, ray or slurm.")] = "local",
    best_of: Annotated[int, typer.Option(min=1, max=1000, help="Candidates (seeds) per job.")] = 1,
    score: Annotated[str, typer.Option(help="auto, none, judge or clip:FOLDER.")] = "auto",
    retries: Annotated[int, typer.Option(min=0, max=100, help="More attempts at a job that died.")] = 2,
    sweep: Annotated[
        list[str] | None, typer.Option(help="E.g. guidance.cfg_scale=7.5,30; repeatable.")
    ] = None,
    root: Annotated[
        list[Path] | None, typer.Option(help="A folder whose files the batch file may name; repeatable.")
    ] = None,
    storage: Annotated[str | None, typer.Option(help="Ray: folder or URL that all machines see.")] = None,
    cpus_per_job: Annotated[float | None, typer.Option(min=0.01, help="Ray and Slurm.")] = None,
    gpus_per_job: Annotated[float | None, typer.Option(min=0.0, help="Ray and Slurm.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray: the cluster; default: this machine.")] = None,
    slurm: Annotated[list[str] | None, typer.Option(help="Slurm: e.g. partition=gpu; repeatable.")] = None,
) -> None:
    """Make many assets from one file, here or on a cluster; writes a summary and report.html."""
    from sds3d.batch.run import BatchConfig, run_batch
    from sds3d.batch.table import BatchTable
    from sds3d.run import Stop

    words = BatchConfig(
        file=file,
        out=out,
        config=config,
        overrides=tuple(overrides or ()),
        sweep=tuple(sweep or ()),
        engine=engine,
        workers=workers,
        best_of=best_of,
        scorer=score,
        retries=retries,
        roots=tuple(root or ()),
        storage=storage,
        cpus=cpus_per_job,
        gpus=gpus_per_job,
        address=address,
        slurm=tuple(slurm or ()),
    )
    table, stop = BatchTable(), Stop()
    with heeding_signals(stop):
        try:
            summary = run_batch(
                words,
                stopped=lambda: stop.asked,
                on_change=table,
                say=lambda line: typer.echo(line, err=True),
            )
        finally:
            table.close()
    for name in ("summary.json", "summary.csv", "report.html"):
        typer.echo(str(words.folder() / name))
    typer.echo(f"{summary['done']} of {summary['jobs']} done, {summary['failed']} failed", err=True)
    if stop.asked:
        typer.echo("interrupted; the same command goes on", err=True)
        raise typer.Exit(128 + (stop.signal or signal.SIGINT))
    if summary["failed"]:
        raise typer.Exit(1)


@app.command()
def ui(
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 = reachable by others.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 = the first free one from 7860.")] = 7860,
    share: Annotated[
        bool, typer.Option("--share", help="Also through a public tunnel of gradio's operators.")
    ] = False,
    auth: Annotated[
        list[str] | None, typer.Option(metavar="USER:PASSWORD", help="Ask for a login; repeatable.")
    ] = None,
    allowed_root: Annotated[
        Path, typer.Option(help="The folder of all runs; nothing outside it is read or written.")
    ] = Path("outputs"),
    max_queue: Annotated[int, typer.Option(help="Jobs that may wait.")] = 20,
    workers: Annotated[int, typer.Option(help="Jobs at the same time.")] = 1,
) -> None:
    """Open the browser interface: type words, watch the model take shape, download it."""
    from sds3d.ui.serve import ServeConfig, Server, login, notes

    config = ServeConfig(
        host=host,
        port=port,
        share=share,
        auth=tuple(login(text) for text in auth or ()),
        root=allowed_root,
        max_queue=max_queue,
        workers=workers,
    )
    for line in notes(config):
        typer.echo(line, err=True)
    server = Server(config)
    typer.echo(f"sds3d is ready: {server.url}")
    if server.share_url:
        typer.echo(f"for everybody: {server.share_url}")
    typer.echo("Ctrl-C ends it; a run in progress is saved first.", err=True)
    server.serve()


@bench_app.command("guidance")
def bench_guidance(
    out: Annotated[
        Path, typer.Option(help="Folder of the bench; the same command goes on where it stopped.")
    ],
    methods: Annotated[str, typer.Option(help="Comma-separated names of toybox presets, or all.")] = "all",
    prompts: Annotated[
        list[str] | None, typer.Option(help="A prompt, repeatable, or a file of them.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1",
    budget: Annotated[int, typer.Option(min=1, help="Prior evaluations per view and run.")] = 1120,
    experimental: Annotated[bool, typer.Option(help="With methods=all: experimental ones too.")] = False,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
) -> None:
    """Run every method on the same prompts, seeds and prior evaluations; writes a table, JSON and a sheet."""
    from sds3d.bench.guidance import BenchConfig, methods_from, prompts_from, run_bench, seeds_from

    config = BenchConfig(
        methods=methods_from(methods, experimental=experimental),
        prompts=prompts_from(prompts or []),
        seeds=seeds_from(seeds),
        budget=budget,
        overrides=tuple(overrides or ()),
    )
    report = run_bench(config, out, lambda line: typer.echo(line, err=True))
    typer.echo((out / "bench.md").read_text(encoding="utf-8"), nl=False)
    if any(row["runs"] == 0 for row in report["methods"].values()):
        raise typer.Exit(1)


Files = Annotated[list[str] | None, typer.Argument(metavar="NAME|FILE|KEY=VALUE")]


@config_app.command("show")
def config_show(files: Files = None) -> None:
    """Print the resolved config with the origin of every value."""
    from sds3d.config.dump import show
    from sds3d.staged import load_stages

    names = [word for word in files or [] if not is_override(word)]
    layers = override_layers([word for word in files or [] if is_override(word)])
    for name in names or ["default"]:
        stages = load_stages(name, layers)
        for stage in stages:
            if len(stages) > 1:
                typer.echo(f"# stage {stage.name}")
            typer.echo(show(stage.resolved), nl=False)


@config_app.command("check")
def config_check(files: Files = None) -> None:
    """Check config files; a folder means every YAML file in it."""
    from sds3d.staged import load_stages

    paths: list[Path] = []
    for name in files or config_names():
        folder = Path(name)
        paths += sorted(folder.glob("*.yaml")) if folder.is_dir() else [find_config(name)]
    faults = 0
    for path in paths:
        try:
            load_stages(str(path))
        except ConfigError as error:
            faults += 1
            typer.echo(f"error: {error}", err=True)
    typer.echo(f"{len(paths) - faults} of {len(paths)} configs are valid")
    if faults:
        raise typer.Exit(ConfigError.exit_code)


@config_app.command("docs")
def config_docs() -> None:
    """Print a markdown reference of every setting."""
    from sds3d.config.docs import reference
    from sds3d.job import JobConfig

    typer.echo(reference(JobConfig))


def split_words(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The prompt and the key=value overrides among positional words."""
    prompts = [word for word in words if not is_override(word)]
    if len(prompts) > 1:
        joined = " ".join(prompts)
        raise ConfigError(f'got {len(prompts)} words outside quotes; quote the prompt: "{joined[:80]}"')
    return (prompts[0] if prompts else None), [word for word in words if is_override(word)]


def split_formats(text: str) -> list[str]:
    """`glb,obj` as a list; raises ConfigError when it names nothing."""
    names = [name.strip().lower().lstrip(".") for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError("--formats: names no format, expected e.g. glb,obj")
    return names


@contextmanager
def _progress() -> Iterator[tuple[list[Any], "Stop"]]:
    """Listeners that show progress, and a Stop that Ctrl-C and SIGTERM ask."""
    from sds3d.events.progress import ProgressLine
    from sds3d.run import Stop

    line, stop = ProgressLine(), Stop()
    with heeding_signals(stop):
        try:
            yield [line], stop
        finally:
            line.close()


@contextmanager
def heeding_signals(stop: "Stop") -> Iterator[None]:
    """Ctrl-C and SIGTERM ask `stop` to end after the current step; a second Ctrl-C ends at once."""

    def handle(number: int, frame: object) -> None:
        if stop.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.ask(number)
        os.write(2, b"\nstopping after this step; the result is kept. Ctrl-C again aborts at once.\n")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _conclude(result: "RunResult") -> None:
    """Where the files are, on stdout; then the exit status of the signal, if one ended the run."""
    for path in result.files.values():
        typer.echo(str(path))
    if result.status == "interrupted":
        typer.echo(
            f"interrupted after {result.steps_done} steps; continue with: sds3d resume {result.folder}",
            err=True,
        )
        raise typer.Exit(128 + (result.signal or signal.SIGINT))


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Errors a user can cause are one line on stderr."""
    try:
        code = app(list(sys.argv[1:] if arguments is None else arguments), standalone_mode=False)
        return code if isinstance(code, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except (Sds3dError, OSError) as error:
        known = explained(error)
        if known is None:
            raise
        return _report(*known)
    except KeyboardInterrupt:
        return _report("aborted", 130)
    except _usage_errors() as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help page, and no mistake
            typer.echo(error.format_message())
            return 0
        return _report(error.format_message(), 2)


def _usage_errors() -> Any:
    """The base of typer's own complaints (a missing argument, an unknown option)."""
    return next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


def _report(message: str, code: int) -> int:
    typer.echo(f"error: {message}", err=True)
    return code
