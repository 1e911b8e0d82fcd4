"""The `sds3d` command: each subcommand gathers its words into a job and hands over to the library.

Heavy imports stand inside the commands, so that help and mistakes answer at once.
"""

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from sds3d import __version__
from sds3d.cli import create, finished, many, show
from sds3d.cli.base import app, heeding_signals, split_formats, split_words
from sds3d.errors import Sds3dError, explained

__all__ = [
    "app",
    "create",
    "finished",
    "heeding_signals",
    "main",
    "many",
    "show",
    "split_formats",
    "split_words",
]


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
