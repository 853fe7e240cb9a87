"""Options of `unflaw predict --engine ray`, their validation, and its output."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from unflaw.cli.common import progress_bars, report_problems
from unflaw.io.words import count

Engine = Annotated[
    str | None, typer.Option(help="'ray': several workers, here or on a cluster; needs --input and --output.")
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        help="With ray: folder, .parquet, .tar shard, pattern of these, or URL (s3://…). May be repeated.",
    ),
]
Output = Annotated[str | None, typer.Option(help="With ray: folder or URL for part-00000.parquet and so on.")]
Address = Annotated[
    str | None,
    typer.Option(help="With ray: cluster address, auto, HOST:PORT or ray://HOST:PORT; by default this machine."),
]
Workers = Annotated[int | None, typer.Option(min=1, help="With ray: number of workers; by default one per processor.")]
Threads = Annotated[int, typer.Option(min=1, help="With ray: computing threads of each worker.")]
Partition = Annotated[int, typer.Option(min=1, help="With ray: maximum images of a partition; a shard is always one.")]
Column = Annotated[
    str | None, typer.Option(help="With ray: Parquet column that holds the images, or their extension in shards.")
]
Retry = Annotated[bool, typer.Option("--retry", help="With ray: inspect failed images again.")]

_RAY_ONLY = ("given", "output", "address", "workers", "threads", "partition", "column", "retry")
_SHARED = ("model", "category", "exit_code", "engine")


def chosen(context: typer.Context) -> bool:
    """True if Ray is to run `unflaw predict`, False if this process is.

    Raises:
        ValueError: Unknown engine, or options that do not go with it.
    """
    options, engine = context.params, context.params["engine"]
    flags = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    used = [
        name
        for name, value in options.items()
        if value and getattr(context.get_parameter_source(name), "name", "DEFAULT") != "DEFAULT"
    ]
    if engine is None:
        if wrong := [flags[name] for name in used if name in _RAY_ONLY]:
            raise ValueError(f"{wrong[0]} goes with --engine ray only; add that, or leave {wrong[0]} out")
        if not options["inputs"] or options["out"] is None:
            raise ValueError("name images and --out FOLDER for the results, or give --engine ray")
        return False
    if engine != "ray":
        raise ValueError(f"--engine {engine}: there is ray; without --engine this process inspects")
    if "inputs" in used:
        raise ValueError(f"{options['inputs'][0]}: with --engine ray, name inputs by --input")
    if "out" in used:
        raise ValueError("--out: with --engine ray, name the folder or URL of the results by --output")
    if wrong := [flags[name] for name in used if name not in (*_RAY_ONLY, *_SHARED)]:
        raise ValueError(f"{wrong[0]} does not go with --engine ray; leave it out")
    if not options["given"] or not options["output"]:
        raise ValueError("--engine ray needs --input and --output, each a folder or a URL")
    return True


def predict(model: Path, inputs: list[str], output: str | None, *, exit_code: bool, **options: Any) -> None:
    """Run `scale.predict` with its options and print the totals.

    Raises:
        ValueError: Partitions are unfinished; see also `scale.predict`. typer.Exit: The exit codes of `unflaw predict`.
    """
    from unflaw import scale

    with progress_bars() as progress:
        totals = scale.predict(model, inputs, str(output), progress=progress, **options)
    report_problems(totals.notes)
    counts, missing = totals.counts, totals.partitions - totals.finished
    before = f", {totals.before} found finished" if totals.before else ""
    typer.echo(
        f"{output}: {totals.finished} of {count(totals.partitions, 'partition')}{before}: {counts['good']} good, "
        f"{counts['review']} for review, {counts['defect']} defective, {counts['failed']} failed"
    )
    report_problems(f"partition {number}: {reason}" for number, reason in sorted(totals.errors.items()))
    if missing:
        unfinished = f"{count(missing, 'partition')} {'is' if missing == 1 else 'are'} not finished"
        raise ValueError(f"{unfinished}; the same command goes on")
    if counts["failed"]:
        typer.echo("note: the column error gives the reasons of failed images; --retry inspects them again", err=True)
    if exit_code and counts["defect"]:
        raise typer.Exit(4)
    if counts["failed"]:
        raise typer.Exit(3)
    if exit_code and counts["review"]:
        raise typer.Exit(5)
