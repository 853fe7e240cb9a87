"""The command line: parse, call, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from unflaw.cache import Progress
    from unflaw.datasets import Dataset
    from unflaw.detector import Detector

app = typer.Typer(
    name="unflaw",
    help="Visual anomaly detection trained on good images only.",
    epilog="Example:  unflaw train --data parts/good --out parts.safetensors"
    "  then  unflaw predict parts.safetensors parts/new --out results --pictures",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_KINDS = "Data set: MVTec layout, a public benchmark as it unpacks, a folder of good pictures, or a CSV table."
Data = Annotated[Path, typer.Option("--data", help=_KINDS)]
Several = Annotated[
    list[Path],
    typer.Option("--data", help=f"{_KINDS} May be repeated; a folder of categories stands for all of them."),
]
Category = Annotated[str | None, typer.Option(help="What the pictures show, if the detector has several categories.")]
ModelFile = Annotated[Path, typer.Argument(help="A detector file (.safetensors).")]


@app.command()
def train(
    data: Several,
    out: Annotated[Path, typer.Option(help="Where to write the detector (.safetensors).")],
    method: Annotated[str, typer.Option(help="uranet, lookup, mfrnet, draem or memae.")] = "uranet",
    profile: Annotated[str, typer.Option(help="cpu or paper.")] = "cpu",
    backbone: Annotated[str | None, typer.Option(help="Any timm model that supports features_only.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Backbone weights, .safetensors or .pth.")] = None,
    levels: Annotated[str | None, typer.Option(help="Feature levels, such as 1,2,3.")] = None,
    size: Annotated[int | None, typer.Option(help="Side in pixels that pictures are brought to.")] = None,
    fit: Annotated[str | None, typer.Option(help="stretch, or pad to keep the aspect ratio.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same machine: same detector.")] = None,
    rate: Annotated[float | None, typer.Option(help="False-alarm rate to calibrate for, such as 0.01.")] = None,
    textures: Annotated[Path | None, typer.Option(help="Folder of texture pictures for artificial anomalies.")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="Any setting, such as training.steps=200.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT.checkpoint after an interruption.")] = False,
    multi_class: Annotated[
        bool, typer.Option("--multi-class", help="One detector for all data sets, calibrated for each category.")
    ] = False,
) -> None:
    """Learn from good pictures and write a detector.

    Example:  unflaw train --data parts/good --out parts.safetensors
    """
    changes: dict[str, Any] = {
        "features.backbone": backbone,
        "features.levels": _levels(levels),
        "preparation.size": size,
        "preparation.fit": fit,
        "training.seed": seed,
        "training.textures": str(textures) if textures else None,
        "calibration.false_alarm_rate": rate,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    with _errors():
        from unflaw.config import make_config

        config = make_config(method, profile, changes | dict(map(_setting, setting or [])))
        _writable(out)
        from unflaw.datasets import load_categories, load_dataset
        from unflaw.detector import Detector

        if len(data) > 1 and not multi_class:
            raise ValueError("one detector for several data sets needs --multi-class; add it, or give one --data")
        datasets = load_categories(data) if multi_class else {"": load_dataset(data[0])}
        _report_dataset_problems(datasets)
        checkpoint = out.with_name(out.name + ".checkpoint")
        if checkpoint.exists() and not resume:
            checkpoint.unlink()
        detector = Detector(config=config, weights=weights)
        with _progress() as progress:
            detector.fit(datasets if multi_class else datasets[""], progress=progress, checkpoint=checkpoint)
        detector.save(out)
        _report_problems(f"skipped {reason}" for _, reason in detector.record_["skipped"])
        described = {name: known.calibration.describe() for name, known in detector.categories_.items()}
        certified = described.get("") or "".join(f"\n{name}: {promise}" for name, promise in described.items())
        typer.echo(f"{out}: trained in {detector.record_['seconds']['total']:.0f} s; {certified}")


@app.command()
def evaluate(
    model: ModelFile,
    data: Several,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the metrics there.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report there.")] = None,
    category: Category = None,
) -> None:
    """Measure a detector on labelled test pictures; of several data sets, each and the mean.

    A detector of several categories takes each data set for the one that is called like it.

    Example:  unflaw evaluate screw.safetensors --data mvtec_ad/screw --json screw.json --report screw.html
    """
    _evaluate(model, data, json_file, report, category)


def _evaluate(
    model: Path,
    data: list[Path],
    json_file: Path | None,
    report: Path | None,
    category: str | None = None,
    notes: Sequence[str] = (),
) -> None:
    with _errors():
        for path in filter(None, (json_file, report)):
            _writable(path)
        from unflaw.datasets import load_categories
        from unflaw.evaluation import evaluate_all
        from unflaw.results import mean_metrics
        from unflaw.tables import lines, table

        detector = _load(model)
        datasets = load_categories(data)
        _report_dataset_problems(datasets)
        if category is not None and len(datasets) > 1:
            raise ValueError("--category goes with one data set; several are taken for the categories they are called")
        with _progress() as progress:
            found = evaluate_all(detector, datasets, category=category, progress=progress)
        _report_problems(f"skipped {reason}" for evaluation in found.values() for _, reason in evaluation.skipped)
        metrics = {name: evaluation.metrics for name, evaluation in found.items()}
        mean = mean_metrics(found)
        if json_file:
            written = {"mean": mean, "categories": metrics} if len(found) > 1 else next(iter(metrics.values()))
            json_file.write_text(json.dumps(written, indent=2) + "\n")
        if report:
            from unflaw.report import write_report

            scales = {name: detector.select(metrics[name].get("category")).scale for name in metrics}
            write_report(found, report, title=", ".join(found), scale=scales, notes=notes)
        typer.echo(table(metrics, mean) if len(found) > 1 else lines(next(iter(metrics.values()))))


@app.command()
def predict(
    model: ModelFile,
    inputs: Annotated[list[Path], typer.Argument(help="Pictures and folders of pictures.")],
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl and pictures.")],
    pictures: Annotated[bool, typer.Option("--pictures", help="Also write a panel for each picture.")] = False,
    category: Category = None,
) -> None:
    """Inspect pictures: one line of results.jsonl each, in the order given. Exit code 3 if some could not be read.

    Example:  unflaw predict parts.safetensors parts/new 0001.png --out results --pictures
    """
    with _errors():
        from unflaw.prediction import predict as run

        paths = _pictures(inputs)
        out.mkdir(parents=True, exist_ok=True)
        detector = _load(model)
        with _progress() as progress:
            counts = run(detector, paths, out, category=category, pictures=pictures, progress=progress)
        typer.echo(
            f"{out / 'results.jsonl'}: {counts['good']} good, {counts['defect']} defective, "
            f"{counts['error']} not readable"
        )
        if counts["error"]:
            raise typer.Exit(3)


@app.command()
def calibrate(
    model: ModelFile,
    good: Annotated[list[Path], typer.Option(help="Good pictures and folders of them, that it has not learned from.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the detector; by default MODEL is replaced.")] = None,
    defect: Annotated[list[Path] | None, typer.Option(help="Defective pictures, and folders of them.")] = None,
    rate: Annotated[float | None, typer.Option(min=0, max=1, help="False-alarm rate asked for, such as 0.01.")] = None,
    miss_rate: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of defects that may be missed; --defect certifies it.")
    ] = None,
    cost_ratio: Annotated[
        float | None, typer.Option(min=0, help="What a missed defect costs if a false alarm costs 1; needs --defect.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Also count the pictures that calibrated it before.")] = False,
    category: Category = None,
) -> None:
    """Set thresholds and p-values anew, without training: from good pictures of today and, if any, labelled defects.

    Example:  unflaw calibrate parts.safetensors --good parts/today --defect parts/rejects --miss-rate 0.05
    """
    with _errors():
        if len([option for option in (rate, miss_rate, cost_ratio) if option is not None]) > 1:
            raise ValueError("--rate, --miss-rate and --cost-ratio each set the threshold; give one of them")
        if any(option in (0, 1) for option in (rate, miss_rate)):
            raise ValueError("a rate must lie between 0 and 1, such as 0.01")
        if defect and miss_rate is None and cost_ratio is None:
            raise ValueError("--defect needs --miss-rate or --cost-ratio; `unflaw evaluate` measures on defects")
        _writable(out or model)
        detector = _load(model)
        with _progress() as progress:
            found = detector.calibrate(
                _pictures(good),
                _pictures(defect) if defect else [],
                rate=rate,
                miss_rate=miss_rate,
                cost_ratio=cost_ratio,
                category=category,
                keep=keep,
                progress=progress,
            )
        detector.save(out or model)
        typer.echo(f"{out or model}: {found.describe()}; threshold {found.threshold:.4g}")


@app.command()
def info(model: ModelFile) -> None:
    """Say what a detector is, how it was trained and calibrated.

    Example:  unflaw info parts.safetensors
    """
    with _errors():
        from safetensors import safe_open

        from unflaw.calibration import calibrations
        from unflaw.files import read_metadata

        metadata = read_metadata(model)
        with safe_open(model, "np") as file:
            slices = [file.get_slice(name).get_shape() for name in file.keys()]
        numbers = sum(math.prod(shape) for shape in slices)
        record = {name: value for name, value in metadata["record"].items() if name not in ("history", "seen")}
        typer.echo(f"{model}: {model.stat().st_size / 1e6:.1f} MB, {numbers / 1e6:.2f} million numbers")
        for name, calibration in calibrations(metadata).items():
            of = f"category {name}" if name else "calibration"
            typer.echo(f"{of}: {calibration.describe()}; threshold {calibration.threshold:.4g}")
        typer.echo(json.dumps({"record": record, "config": metadata["config"]}, indent=2))


@app.command()
def figures(
    model: ModelFile,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the figures (.png).")],
    picture: Annotated[
        list[Path] | None, typer.Option(help="A test picture to show, such as scratch/003.png; may be repeated.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many test pictures to choose where none are named.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of that choice and of artificial anomalies.")] = 0,
    width: Annotated[int, typer.Option(min=600, max=10000, help="Of the figures at most, pixels.")] = 1400,
    category: Category = None,
) -> None:
    """Draw how a detector works: what its method makes of test pictures step by step, and what it is trained on.

    Example:  unflaw figures parts.safetensors --data parts --out figures --picture scratch/003.png
    """
    with _errors():
        from unflaw.datasets import load_dataset
        from unflaw.report.figures import write_figures

        detector = _load(model)
        dataset = load_dataset(data)
        _report_problems(dataset.problems)
        with _progress() as progress:
            written = write_figures(
                detector,
                dataset,
                out,
                category=category,
                pictures=picture or (),
                count=count,
                seed=seed,
                width=width,
                progress=progress,
            )
        for path in written:
            typer.echo(path)


@app.command()
def ablate(
    method: Annotated[str, typer.Option(help="uranet, lookup, mfrnet, draem or memae.")] = "uranet",
    data: Annotated[
        list[Path] | None, typer.Option("--data", help="Data set with test pictures. May be given several times.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for runs.jsonl and table.md, .csv, .json.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Any timm model that supports features_only.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Backbone weights, .safetensors or .pth.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Every variant is run with the seeds 0 to SEEDS - 1.")] = 3,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="A named variant; full is always run. Without it: all of them.")
    ] = None,
    variant: Annotated[
        list[str] | None, typer.Option("--variant", help="One of your own: 'name: setting=value; setting=value'.")
    ] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="A setting that all variants have.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="For features, some MB a picture; by default OUT/features.")
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show the named variants and end.")] = False,
) -> None:
    """Train and measure variants of a method, several seeds each; table.md says what each part is worth.

    Features are computed once. The same command goes on after an interruption.

    Example:  unflaw ablate --data screw --only no-memory --variant 'deep: network.restoration.depth=6' --out deep
    """
    changes = ({"features.backbone": backbone} if backbone else {}) | dict(map(_setting, setting or []))
    with _errors():
        from unflaw.variants import choose

        variants = choose(method, only or [], variant or [])
        if listed:
            for item in variants:
                typer.echo(f"{item.name}: {item.overrides}\n    {item.why}")
            return
        if not data or out is None:
            raise ValueError("name the data with --data and a folder for the results with --out")
        from unflaw.ablation import ablate as run
        from unflaw.datasets import load_dataset

        datasets = [load_dataset(path) for path in data]
        _report_problems(problem for dataset in datasets for problem in dataset.problems)
        if len({dataset.name for dataset in datasets}) < len(datasets):
            datasets = [replace(dataset, name=str(path)) for dataset, path in zip(datasets, data, strict=True)]
        with _progress() as progress:
            records = run(
                method,
                datasets,
                variants,
                changes,
                seeds=seeds,
                out=out,
                cache=cache or out / "features",
                weights=weights,
                progress=progress,
            )
        skipped = {path: reason for record in records for path, reason in record.skipped.items()}
        _report_problems(f"skipped {reason}" for reason in skipped.values())
        typer.echo((out / "table.md").read_text("utf-8"))


@app.command()
def benchmark(
    out: Annotated[Path, typer.Option(help="Folder for runs.jsonl and table.md, .csv, .json, .tex, .html.")],
    grid: Annotated[Path | None, typer.Option(help="YAML with the fields below; flags go before it.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="uranet, lookup, mfrnet, draem or memae; may be repeated.")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Data set with test pictures, or a folder of categories; may be repeated."),
    ] = None,
    backbone: Annotated[
        list[str] | None, typer.Option(help="Any timm model, or MODEL=WEIGHTS with a file; may be repeated.")
    ] = None,
    size: Annotated[list[int] | None, typer.Option(help="Side in pixels; may be repeated.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="The seeds 0 to SEEDS - 1; 3 without.")] = None,
    profile: Annotated[str | None, typer.Option(help="cpu or paper.")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="A setting that all runs have.")] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="patchcore, padim or reverse_distillation of anomalib, or 'NAME: option=value; …'."),
    ] = None,
    peer_python: Annotated[Path | None, typer.Option(help="Interpreter of an environment that has anomalib.")] = None,
) -> None:
    """Methods × data sets × backbones × sizes × seeds into one table, with times, memory and intervals.

    The same command goes on after an interruption; a finished run is not done again. Exit code 3 if some runs failed.

    Example:  unflaw benchmark --method uranet --method mfrnet --data mvtec_ad --seeds 3 --out table

    In YAML:  {methods: [uranet, mfrnet], data: [mvtec_ad], backbones: [resnet18], sizes: [256], seeds: 3}
    """
    given = {"methods": method, "data": data, "backbones": backbone, "sizes": size, "seeds": seeds, "profile": profile}
    with _errors():
        from unflaw.benchmark import benchmark as run
        from unflaw.datasets import load_categories
        from unflaw.grid import plan, read_grid
        from unflaw.variants import parse

        changes: dict[str, Any] = {n: value for n, value in (given | {"peer_python": peer_python}).items() if value}
        if peer:
            changes["peers"] = {v.name: v.changes for v in (parse(p if ":" in p else f"{p}:") for p in peer)}
        wanted = read_grid(grid, changes | ({"settings": dict(map(_setting, setting))} if setting else {}))
        datasets = load_categories(wanted.data)
        _report_dataset_problems(datasets)
        with _progress() as progress:
            records, failed = run(plan(wanted, list(datasets.values())), out, progress)
        _report_problems({f"skipped {reason}" for record in records for reason in record.skipped.values()})
        typer.echo((out / "table.md").read_text("utf-8"))
        for name, reason in failed.items():
            typer.echo(f"error: {name}: {reason}", err=True)
        if failed:
            raise typer.Exit(3)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, detector, metrics and report.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="For the data and the detector.")] = 0,
) -> None:
    """Make defects on real textures, train URA-Net, evaluate, and write a report to look at."""
    with _errors():
        from unflaw.datasets import load_dataset
        from unflaw.demo_data import make_demo_data

        data = out / "gravel"
        if not (data / "train").is_dir():
            make_demo_data(data, seed)
        count = len(load_dataset(data).train)
        typer.echo(f"{data}: {count} good pictures to learn from; defects are synthetic, on real textures")
    model = out / "detector.safetensors"
    train(data=[data], out=model, seed=seed)
    note = "The defects are synthetic, drawn on a real photograph of gravel: this shows that the parts work together."
    _evaluate(model, [data], out / "metrics.json", out / "report.html", notes=[note])
    typer.echo(f"Look at {out / 'report.html'}")


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
    with _errors():
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
    """Count the pictures of a benchmark and compare with what was published. Exit code 1 if something is wrong.

    Example:  unflaw datasets check data/mvtec_ad
    """
    with _errors():
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
        _report_problems(result.notes)
        for sentence in result.wrong:
            typer.echo(f"wrong: {sentence}", err=True)
        if result.wrong:
            raise typer.Exit(1)
        typer.echo("as published" if result.known else "there are no published counts to compare with")


def main() -> None:
    app()


def _levels(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 1,2,3", param_hint="--levels") from None


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text!r} is not of the form name=value", param_hint="--set")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _writable(path: Path) -> None:
    """Fails before the work, not after it."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)


def _pictures(inputs: list[Path]) -> list[Path]:
    from unflaw.images import list_images

    paths = [p for item in inputs for p in (list_images(item) if item.is_dir() else [item])]
    if not paths:
        raise ValueError(f"{', '.join(map(str, inputs))}: there are no pictures to inspect")
    return paths


def _load(model: Path) -> Detector:
    from unflaw.detector import Detector

    return Detector.load(model)


def _report_problems(problems: Any) -> None:
    for problem in problems:
        typer.echo(f"note: {problem}", err=True)


def _report_dataset_problems(datasets: dict[str, Dataset]) -> None:
    several = len(datasets) > 1
    for name, dataset in datasets.items():
        _report_problems(f"{name}: {problem}" if several else problem for problem in dataset.problems)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar per stage with loss and remaining time; on a pipe, nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bars:

        def progress(stage: str, done: int, total: int, loss: float | None = None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, loss="")
            elif done < bars.tasks[tasks[stage]].completed:  # the stage of another run
                bars.reset(tasks[stage])
            bars.update(tasks[stage], completed=done, total=total, loss="" if loss is None else f"loss {loss:.4f}")

        yield progress


@contextmanager
def _errors() -> Iterator[None]:
    """What a user can mend is one line and exit code 2, not a stack trace."""
    try:
        yield
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, ImportError) and "unflaw[" not in str(error):
            error = ImportError(f"{error}; this command needs: pip install 'unflaw[all]'")
        elif isinstance(error, RuntimeError) and type(error).__name__ != "WeightsError":
            raise
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
