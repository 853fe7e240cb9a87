"""Commands that use detectors: evaluate, predict, info, figures."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unflaw.cli import scaling
from unflaw.cli.common import (
    Category,
    Data,
    ModelFile,
    Several,
    TrainedFile,
    app,
    errors,
    images_in,
    load_detector,
    load_trained,
    progress_bars,
    report_dataset_problems,
    report_problems,
    said,
    writable,
)

if TYPE_CHECKING:
    from unflaw.inference.aggregation import ReviewOnDrift
    from unflaw.inference.base import BasePredictor

OwnScale = Annotated[
    bool,
    typer.Option("--own-scale", help="Heat maps up to the highest value of each image: evidence below the threshold."),
]


@app.command()
def evaluate(
    model: ModelFile,
    data: Several,
    json_file: Annotated[Path | None, typer.Option("--json", help="JSON file for the metrics.")] = None,
    report: Annotated[Path | None, typer.Option(help="HTML file for a report.")] = None,
    category: Category = None,
    own_scale: OwnScale = False,
) -> None:
    """Evaluate a detector on labelled test images. For several data sets, report each and the mean.

    A detector with several categories uses for each data set the category of the same name.

    Example:  unflaw evaluate screw.safetensors --data mvtec_ad/screw --json screw.json --report screw.html
    """
    run_evaluation(model, data, json_file, report, category, own_scale=own_scale)


def run_evaluation(
    model: Path,
    data: list[Path],
    json_file: Path | None,
    report: Path | None,
    category: str | None = None,
    notes: Sequence[str] = (),
    own_scale: bool = False,
) -> None:
    with errors():
        for path in (json_file, report):
            if path:
                writable(path)
        from unflaw.datasets import load_categories
        from unflaw.evaluation.evaluate import evaluate_all
        from unflaw.evaluation.results import mean_metrics
        from unflaw.evaluation.text import lines, table
        from unflaw.io.files import write_text

        detector = load_detector(model)
        datasets = load_categories(data)
        report_dataset_problems(datasets)
        if category is not None and len(datasets) > 1:
            raise ValueError("--category goes with one data set; with several, each uses the category of its name")
        with progress_bars() as progress:
            found = evaluate_all(detector, datasets, category=category, progress=progress)
        report_problems(f"skipped {reason}" for evaluation in found.values() for _, reason in evaluation.skipped)
        for name, evaluation in found.items():
            report_problems(text for text in evaluation.metrics["problems"] if text not in datasets[name].problems)
        metrics = {name: evaluation.metrics for name, evaluation in found.items()}
        mean = mean_metrics(found)
        if json_file:
            written = {"mean": mean, "categories": metrics} if len(found) > 1 else next(iter(metrics.values()))
            write_text(json_file, json.dumps(written, indent=2) + "\n")
        if report:
            from unflaw.report import write_report

            scales = {name: detector.select(metrics[name].get("category")).scale for name in metrics}
            write_report(
                found, report, title=", ".join(found), scale=scales, notes=notes, model=model, own_scale=own_scale
            )
        typer.echo(table(metrics, mean) if len(found) > 1 else lines(next(iter(metrics.values()))))


@app.command()
def predict(
    context: typer.Context,
    model: ModelFile,
    inputs: Annotated[list[Path] | None, typer.Argument(help="Images and folders of images.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results.jsonl and panels.")] = None,
    images: Annotated[bool, typer.Option("--images", help="Write a panel for each image.")] = False,
    own_scale: OwnScale = False,
    drift_rate: Annotated[float, typer.Option(help="False-alarm rate of the drift alarm.")] = 0.01,
    review_on_drift: Annotated[
        bool, typer.Option("--review-on-drift", help="Send all images to review if the batch raises a drift alarm.")
    ] = False,
    category: Category = None,
    group_by: Annotated[
        str | None,
        typer.Option(
            help="Grouping of images into parts (parts.jsonl): 'folder', or a regular expression with a group."
        ),
    ] = None,
    combine: Annotated[
        str, typer.Option(help="Combination of the p-values of a part: bonferroni, harmonic, geometric or mean.")
    ] = "bonferroni",
    fdr: Annotated[
        float | None, typer.Option(help="False discovery rate for discoveries in the whole batch, such as 0.1.")
    ] = None,
    coco: Annotated[Path | None, typer.Option(help="JSON file for the regions as COCO annotations.")] = None,
    labelme: Annotated[
        bool, typer.Option("--labelme", help="Write the regions to OUT/labelme, one file per image.")
    ] = False,
    exit_code: Annotated[
        bool,
        typer.Option(
            "--exit-code",
            help="Exit code by result: 4 if any is defective, else 3 if any is unreadable, else 5 if any for review.",
        ),
    ] = False,
    engine: scaling.Engine = None,
    given: scaling.Inputs = None,
    output: scaling.Output = None,
    address: scaling.Address = None,
    workers: scaling.Workers = None,
    threads: scaling.Threads = 1,
    partition: scaling.Partition = 256,
    column: scaling.Column = None,
    retry: scaling.Retry = False,
) -> None:
    """Inspect images and write one line each to results.jsonl, in order. Exit code 3 if some are unreadable.

    The batch as a whole is tested for drift, such as a moved camera, other light, lost focus or another product
    (drift.json).

    With --engine ray, several workers inspect images from folders, Parquet or tar shards and write Parquet partitions.
    The same command continues after an interruption.

    Example:  unflaw predict parts.safetensors parts/new 0001.png --out results --images

    Example:  unflaw predict parts.onnx --engine ray --input s3://plant/2026 --output s3://results/2026
    """
    inspected = 0

    def stopped() -> str:
        if engine is not None:
            return f"stopped; finished partitions stay in {output}, and the same command goes on with the others"
        from unflaw.io.words import count

        if not inspected or out is None:
            return "stopped before the first image; the same command starts over"
        where = f"whose {'line is' if inspected == 1 else 'lines are'} in {out / 'results.jsonl.part'}"
        return f"stopped after {count(inspected, 'image')}, {where}; the same command starts over"

    with errors(stopped):
        if scaling.chosen(context):
            scaling.predict(
                model,
                given or [],
                output,
                category=category,
                address=address,
                workers=workers,
                threads=threads,
                partition=partition,
                column=column,
                retry=retry,
                exit_code=exit_code,
            )
            return
        assert inputs and out is not None
        from unflaw.calibration.conformal import COMBINATIONS
        from unflaw.inference.aggregation import Discoveries, Parts, Sink, Unread
        from unflaw.inference.annotations import Coco, LabelMe
        from unflaw.inference.predict import predict as run
        from unflaw.io.files import holding, make_folder
        from unflaw.io.outputs import LABELS, PARTS, Earlier
        from unflaw.report import panel

        if combine not in COMBINATIONS:
            raise ValueError(f"--combine {combine}: there are {', '.join(COMBINATIONS)}")
        if coco is not None:
            writable(coco)
        paths = images_in(inputs)
        make_folder(out)
        with holding(out):
            earlier = Earlier(out)
            detector = load_detector(model)
            calibration = detector.select(category)
            guard = _guard(detector, model, category, drift_rate) if review_on_drift else None
            chosen: list[Sink | None] = [
                None if group_by is None else Parts(out / PARTS, paths, group_by, calibration, combine),
                guard,
                None if fdr is None else Discoveries(fdr, calibration),
                None if coco is None else Coco(coco),
                LabelMe(out / LABELS) if labelme else None,
            ]
            sinks = [sink for sink in chosen if sink is not None]
            with progress_bars() as progress:

                def watched(stage: str, done: int, total: int, loss: float | None = None) -> None:
                    nonlocal inspected
                    inspected = done
                    progress(stage, done, total, loss)

                counts, drift = run(
                    detector,
                    paths,
                    out,
                    category=category,
                    draw=partial(panel, own_scale=own_scale) if images else None,
                    drift_rate=drift_rate,
                    sinks=[*sinks, unread := Unread()],
                    progress=watched,
                )
            closed = [
                sink.close() for sink in sinks
            ]  # finish all files before printing: the reader of stdout may be gone
            cleared = earlier.clear()
        if guard is not None:
            counts = guard.counts(counts)
        report_problems(f"skipped {reason}" for reason in unread.reasons)
        summary = f"{counts['good']} good, {counts['review']} for review, {counts['defect']} defective"
        typer.echo(said(f"{out / 'results.jsonl'}: {summary}, {counts['error']} not readable"))
        for sentence in closed:
            typer.echo(said(sentence))
        if drift is not None:
            typer.echo(drift.describe())
            if drift.alarm:
                typer.echo(said(drift.advise(shlex.quote(str(model)))))
        report_problems(cleared)
        if exit_code and counts["defect"]:
            raise typer.Exit(4)
        if counts["error"]:
            raise typer.Exit(3)
        if exit_code and counts["review"]:
            raise typer.Exit(5)


def _guard(detector: BasePredictor, model: Path, category: str | None, rate: float) -> ReviewOnDrift:
    """The sink of `--review-on-drift`. Raises ValueError if the detector has no drift reference."""
    from unflaw.inference.aggregation import ReviewOnDrift

    reference = detector.references.get(detector.category(category))
    if reference is None:
        raise ValueError(f"--review-on-drift: {model} has no drift reference; train it again")
    return ReviewOnDrift(reference, rate)


@app.command()
def info(model: ModelFile) -> None:
    """Show the configuration, training and calibration of a detector.

    Example:  unflaw info parts.safetensors
    """
    with errors():
        from unflaw.calibration.thresholds import calibrations
        from unflaw.io.detector_file import kind_of, read_metadata, weights_of

        metadata = read_metadata(model)
        record = {name: value for name, value in metadata.get("record", {}).items() if name not in ("history", "seen")}
        files = [model, weights_of(model)] if kind_of(model) == "openvino" else [model]
        exported = metadata.get("exported", {})
        how = f", exported to {exported['to']} in {exported['precision']}" if exported else ""
        typer.echo(said(f"{model}: {sum(file.stat().st_size for file in files) / 1e6:.1f} MB{how}"))
        for name, calibration in calibrations(metadata).items():
            of = f"category {name}" if name else "calibration"
            typer.echo(said(f"{of}: {calibration.describe()}; threshold {calibration.threshold:.4g}"))
            typer.echo(said(f"{of}: {calibration.describe_achievable_rate()}"))
            if advice := calibration.advise(shlex.quote(str(model))):
                typer.echo(said(f"{of}: {advice}"))
        for key in ("few", "canvas", "groups", "drop"):
            if key in record:
                typer.echo(said(record[key]))
        typer.echo(json.dumps({"record": record, "config": metadata["config"]}, indent=2))


@app.command()
def figures(
    model: TrainedFile,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the figures (.png).")],
    image: Annotated[
        list[Path] | None, typer.Option(help="Test image to show, such as scratch/003.png; may be repeated.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Number of test images to choose if none are named.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the choice and of synthetic anomalies.")] = 0,
    width: Annotated[int, typer.Option(min=600, max=10000, help="Maximum width of the figures in pixels.")] = 1400,
    category: Category = None,
) -> None:
    """Draw the steps of a detector's method on test images, and examples of its training data.

    Example:  unflaw figures parts.safetensors --data parts --out figures --image scratch/003.png
    """
    with errors():
        from unflaw.datasets import load_dataset
        from unflaw.io.outputs import drawn
        from unflaw.report.figures import write_figures

        detector = load_trained(model)
        dataset = load_dataset(data)
        report_problems(dataset.problems)
        with progress_bars() as progress:
            written = write_figures(
                detector,
                dataset,
                out,
                category=category,
                images=image or (),
                count=count,
                seed=seed,
                width=width,
                progress=progress,
            )
        for path in written:
            typer.echo(path)
        older = [path for path in sorted(out.glob("*.png")) if path not in written and drawn(path)]
        report_problems(f"{path}: stays from an earlier run" for path in older)
