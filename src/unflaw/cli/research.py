"""Commands that compare methods: ablate, benchmark, datasets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from unflaw.cli.common import (
    METHODS,
    WeightFile,
    app,
    errors,
    progress_bars,
    report_dataset_problems,
    report_problems,
    said,
    setting_of,
)

if TYPE_CHECKING:
    from unflaw.experiments.grid import Grid


def stopped_runs(out: Path | None) -> str:
    """Message after Ctrl-C: the number of finished runs, and how to go on."""
    from unflaw.io.words import count

    log = out and out / "runs.jsonl"
    if log is None or not log.is_file():
        return "stopped before the first run; the same command starts over"
    number = log.read_bytes().count(b"\n")
    stay = "stays" if number == 1 else "stay"
    return f"stopped; {count(number, 'finished run')} {stay} in {log}, and the same command goes on with the others"


Data = Annotated[
    list[Path] | None,
    typer.Option("--data", help="Data set with test images, or a folder of categories; may be repeated."),
]


def _run(grid: Grid, out: Path) -> None:
    """Does what is left of an experiment and prints its table. Exit code 3 if some runs failed."""
    from unflaw.datasets import load_categories
    from unflaw.experiments.grid import plan
    from unflaw.experiments.run import run_experiment

    datasets = load_categories(grid.data)
    report_dataset_problems(datasets)
    with progress_bars() as progress:
        records, failed = run_experiment(plan(grid, list(datasets.values())), out, progress)
    report_problems(dict.fromkeys(f"skipped {reason}" for record in records for reason in record.skipped.values()))
    typer.echo((out / "table.md").read_text("utf-8"))
    for name, reason in failed.items():
        typer.echo(said(f"error: {name}: {reason}"), err=True)
    if failed:
        raise typer.Exit(3)


@app.command()
def ablate(
    method: Annotated[str, typer.Option(help=METHODS)] = "uranet",
    data: Data = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for runs.jsonl and table.md, .csv, .json, .tex, .html.")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="Backbone: any timm model that supports features_only.")] = None,
    weights: WeightFile = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds: every variant is run with 0 to SEEDS - 1.")] = 3,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Named variant to run beside full; by default all of them.")
    ] = None,
    variant: Annotated[
        list[str] | None, typer.Option("--variant", help="Variant of your own: 'name: setting=value; setting=value'.")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Setting of all variants, such as training.steps=200.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for shared features; by default OUT/features.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Print the named variants, then exit.")] = False,
) -> None:
    """Train and measure variants of a method, several seeds each; the table shows what each part contributes.

    Short for `unflaw benchmark` with one method, its variants and shared features, some MB an image. The same command
    goes on after an interruption. Exit code 3 if some runs failed.

    Example:  unflaw ablate --data screw --only no-memory --variant 'deep: network.restoration.depth=6' --out deep
    """
    with errors(lambda: stopped_runs(out)):
        from unflaw.experiments.variants import choose, named

        variants = choose(method, only or [], variant or [])
        if listed:
            for item in variants:
                typer.echo(f"{item.name}: {item.overrides}\n    {item.why}")
            return
        if len(weights or []) > 1:
            raise ValueError("weights of several backbones: use `unflaw benchmark --backbone A=FILE+B=FILE`")
        if not data or out is None:
            raise ValueError("name the data with --data and a folder for the results with --out")
        from unflaw.experiments.grid import read_grid

        grid = {
            "methods": [method],
            "data": data,
            "variants": [*(item.name for item in variants if item in named(method)), *(variant or [])],
            "backbones": [f"{backbone or ''}={(weights or [''])[0]}"],
            "seeds": seeds,
            # the decoder that draws restored images takes no part in any figure
            "settings": {"training.display_steps": 0} | dict(map(setting_of, setting or [])),
            "features": cache or out / "features",
        }
        _run(read_grid(None, grid), out)


@app.command()
def benchmark(
    out: Annotated[Path, typer.Option(help="Folder for runs.jsonl and table.md, .csv, .json, .tex, .html.")],
    grid: Annotated[Path | None, typer.Option(help="YAML file with the fields below; options go before it.")] = None,
    method: Annotated[list[str] | None, typer.Option(help=f"{METHODS} May be repeated.")] = None,
    data: Data = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="Named variant, or 'name: setting=value; …', beside full; may be repeated."),
    ] = None,
    backbone: Annotated[
        list[str] | None,
        typer.Option(
            help="Any timm model, or MODEL=WEIGHTS with a file or random; A+B: both at once. May be repeated."
        ),
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="Canvas in pixels: 256, or width x height as 512x224; may be repeated.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds: 0 to SEEDS - 1; by default 3.")] = None,
    profile: Annotated[
        str | None, typer.Option(help="Profile: cpu, paper, dino, restoration (uranet, mfrnet).")
    ] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="Setting of all methods that have it.")] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="patchcore, padim or reverse_distillation of anomalib, or 'NAME: option=value; …'."),
    ] = None,
    peer_python: Annotated[Path | None, typer.Option(help="Interpreter of an environment that has anomalib.")] = None,
    features: Annotated[
        Path | None,
        typer.Option(help="Folder for features that runs share, some MB an image: figures sooner, no costs."),
    ] = None,
) -> None:
    """Compare data sets × methods × variants × backbones × sizes × seeds in one table with costs and intervals.

    The same command goes on after an interruption; a finished run is not done again. Exit code 3 if some runs failed.

    Example:  unflaw benchmark --method uranet --method mfrnet --data mvtec_ad --seeds 3 --out table

    In YAML:  {methods: [uranet, mfrnet], data: [mvtec_ad], backbones: [resnet18], sizes: [256], seeds: 3}
    """
    given: dict[str, Any] = {
        "methods": method,
        "data": data,
        "variants": variant,
        "backbones": backbone,
        "sizes": size,
        "seeds": seeds,
    }
    given |= {"profile": profile, "peer_python": peer_python, "features": features}
    with errors(lambda: stopped_runs(out)):
        from unflaw.experiments.grid import read_grid
        from unflaw.experiments.variants import parse

        if peer:
            given["peers"] = {v.name: v.changes for v in (parse(p if ":" in p else f"{p}:") for p in peer)}
        if setting:
            given["settings"] = dict(map(setting_of, setting))
        _run(read_grid(grid, {name: value for name, value in given.items() if value}), out)


class _ListByDefault(TyperGroup):
    """`unflaw datasets data` is `unflaw datasets list data`: a group cannot have folders for arguments itself."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = args and (args[0] in self.commands or args[0] == "--help")
        return super().parse_args(ctx, args if known else ["list", *args])


datasets_app = typer.Typer(
    cls=_ListByDefault,
    help="Public benchmarks: which are read, their licences, where to get them, and whether a copy is whole.",
    epilog="Example:  unflaw datasets data  then  unflaw datasets check data/mvtec_ad",
    rich_markup_mode=None,
)
app.add_typer(datasets_app, name="datasets")


@datasets_app.command("list")
def list_datasets(
    roots: Annotated[list[Path] | None, typer.Argument(help="Folders to look in; by default the current one.")] = None,
) -> None:
    """List all benchmarks with licence and source, and which of them lie in these folders.

    Example:  unflaw datasets data
    """
    with errors():
        from unflaw.datasets.public import COLLECTIONS, find
        from unflaw.datasets.samples import DatasetError

        folders = roots or [Path()]
        if gone := [root for root in folders if not root.is_dir()]:
            raise DatasetError(f"{gone[0]}: there is no such folder; check the path")
        copies = list(find(folders))
        for collection in COLLECTIONS:
            total = len(collection.counts)
            there = [
                str(path) if total == 1 else f"{path} ({len(copy.folders)} of {total} categories)"
                for path, copy in copies
                if copy.collection is collection
            ]
            typer.echo(f"{collection.name}: {'found in ' + ', '.join(there) if there else 'not found'}")
            typer.echo(f"    {collection.licence}\n    {collection.page}")


@datasets_app.command("check")
def check_dataset(folder: Annotated[Path, typer.Argument(help="A benchmark, or one category of it.")]) -> None:
    """Count the images of a benchmark and compare with what was published. Exit code 1 if something is wrong.

    Example:  unflaw datasets check data/mvtec_ad
    """
    with errors():
        from unflaw.datasets.public import check

        result = check(folder)
        collection = result.copy.collection
        names = ("train", "validation", "good", "defective")
        side = max(map(len, [*result.found, ""]))
        typer.echo(f"{folder}: {collection.name}, {collection.licence}")
        typer.echo("  ".join([" " * side, *names, "masks"]))
        for category, found in result.found.items():
            numbers = [str(getattr(found, name)).rjust(len(name)) for name in names]
            typer.echo("  ".join([category.ljust(side), *numbers, str(result.masks[category]).rjust(5)]))
        report_problems(result.notes)
        for sentence in result.wrong:
            typer.echo(f"wrong: {sentence}", err=True)
        if result.wrong:
            raise typer.Exit(1)
        typer.echo("as published" if result.known else "there are no published counts to compare with")
