"""Commands for many runs: batches, the browser interface, the bench."""

import signal
from pathlib import Path
from typing import Annotated

import typer

from sds3d.cli.base import ConfigOption, app, bench_app, heeding_signals


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
