"""`unflaw predict --engine ray`: its options, which go together, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unflaw.cli.common import progress_bars, report_problems
from unflaw.io.words import count

Engine = Annotated[
    str | None, typer.Option(help="'ray': many workers, here or on a cluster; needs --input and --output.")
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
    typer.Option(help="With ray: of a cluster, auto, HOST:PORT or ray://HOST:PORT; by default this machine."),
]
Workers = Annotated[int | None, typer.Option(min=1, help="With ray: how many; by default one per processor.")]
Threads = Annotated[int, typer.Option(min=1, help="With ray: that compute, in each worker.")]
Partition = Annotated[int, typer.Option(min=1, help="With ray: images of a partition at most; a shard is one.")]
Column = Annotated[
    str | None, typer.Option(help="With ray: what holds images, a column of Parquet or an extension in shards.")
]
Retry = Annotated[bool, typer.Option("--retry", help="With ray: do failed images anew.")]

_OURS = {"given": "--input", "output": "--output"} | {
    name: f"--{name}" for name in ("address", "workers", "threads", "partition", "column", "retry")
}
_SHARED = ("model", "category", "exit_code", "engine")


def chosen(context: typer.Context) -> bool:
    """Whether Ray is to run it.

    Raises:
        ValueError: An engine that there is not, or options that do not go with the one that is asked for.
    """
    engine = context.params["engine"]
    set_ = [
        name
        for name in context.params
        if getattr(context.get_parameter_source(name), "name", "DEFAULT") != "DEFAULT" and context.params[name]
    ]
    if engine is None:
        if wrong := [_OURS[name] for name in set_ if name in _OURS]:
            raise ValueError(f"{wrong[0]} goes with --engine ray only; add that, or leave {wrong[0]} out")
        if not context.params["inputs"] or context.params["out"] is None:
            raise ValueError("name images and --out FOLDER for the results, or give --engine ray")
        return False
    if engine != "ray":
        raise ValueError(f"--engine {engine}: there is ray; without --engine this process inspects")
    for name in set_:
        if name == "inputs":
            raise ValueError(f"{context.params[name][0]}: with --engine ray, name inputs by --input")
        if name == "out":
            raise ValueError("--out: with --engine ray, name the folder or URL of the results by --output")
        if name not in _OURS and name not in _SHARED:
            raise ValueError(f"--{name.replace('_', '-')} does not go with --engine ray; leave it out")
    if not context.params["given"] or not context.params["output"]:
        raise ValueError("--engine ray needs --input and --output, each a folder or a URL")
    return True


def predict(
    model: Path,
    inputs: list[str],
    output: str | None,
    *,
    category: str | None,
    address: str | None,
    workers: int | None,
    threads: int,
    partition: int,
    column: str | None,
    retry: bool,
    exit_code: bool,
) -> None:
    """Raises: As `scale.predict`; typer.Exit with the codes of `unflaw predict`, and 2 where partitions are missing."""
    from unflaw import scale

    with progress_bars() as progress:
        totals = scale.predict(
            model,
            inputs,
            str(output),
            category=category,
            address=address,
            workers=workers,
            threads=threads,
            partition=partition,
            column=column,
            retry=retry,
            progress=progress,
        )
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
        typer.echo("note: column error of the failed says why; --retry does them anew", err=True)
    if exit_code and counts["defect"]:
        raise typer.Exit(4)
    if counts["failed"]:
        raise typer.Exit(3)
    if exit_code and counts["review"]:
        raise typer.Exit(5)
