"""What all commands share: the program, its options, progress on the terminal, and signals."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sds3d.config.load import is_override
from sds3d.errors import ConfigError

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
RunOut = Annotated[Path | None, typer.Option("--out", help="Folder for the run; must be new or empty.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Fixes every random number.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Optimisation steps.")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.")]
Prior = Annotated[
    str | None, typer.Option("--prior", help="A name from `sds3d priors`, a folder, or a hub id.")
]
Negative = Annotated[str | None, typer.Option("--negative", help="What to steer away from.")]
Formats = Annotated[str | None, typer.Option("--formats", "--format", help="E.g. glb,obj,ply.")]


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
def progress() -> Iterator[tuple[list[Any], "Stop"]]:
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


def conclude(result: "RunResult") -> None:
    """Where the files are, on stdout; then the exit status of the signal, if one ended the run."""
    for path in result.files.values():
        typer.echo(str(path))
    if result.status == "interrupted":
        typer.echo(
            f"interrupted after {result.steps_done} steps; continue with: sds3d resume {result.folder}",
            err=True,
        )
        raise typer.Exit(128 + (result.signal or signal.SIGINT))
