"""Commands that say what there is: this machine, configs, methods, priors."""

import json
from pathlib import Path
from typing import Annotated

import typer

from sds3d.cli.base import app, config_app
from sds3d.config.load import config_names, find_config, is_override, override_layers
from sds3d.errors import ConfigError


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
