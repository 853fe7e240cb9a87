"""Commands that change a trained detector: calibrate, commission, threshold, teach, undo."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unflaw.cli.common import (
    TAIL,
    Category,
    TrainedFile,
    app,
    detector_file,
    errors,
    images_in,
    load_trained,
    progress_bars,
    report_problems,
    writable,
)
from unflaw.io.words import count

if TYPE_CHECKING:
    from unflaw.detector import Detector


@app.command()
def calibrate(
    model: TrainedFile,
    good: Annotated[list[Path], typer.Option(help="Good images, or folders of them, that were not used in training.")],
    out: Annotated[Path | None, typer.Option(help="Output detector file; default: replace MODEL.")] = None,
    defect: Annotated[list[Path] | None, typer.Option(help="Defective images, or folders of them.")] = None,
    rate: Annotated[float | None, typer.Option(min=0, max=1, help="Requested false-alarm rate, such as 0.01.")] = None,
    miss_rate: Annotated[
        float | None, typer.Option(min=0, max=1, help="Maximum share of missed defects, certified by --defect.")
    ] = None,
    cost_ratio: Annotated[
        float | None, typer.Option(min=0, help="Cost of a missed defect relative to a false alarm; needs --defect.")
    ] = None,
    review_rate: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of good images not called good; 0: no review.")
    ] = None,
    minimum_area: Annotated[
        float | None, typer.Option(min=0, max=1, help="Smallest area of a region, as a share of the image.")
    ] = None,
    tail: Annotated[bool, typer.Option("--extrapolate-tail", help=TAIL)] = False,
    append: Annotated[bool, typer.Option("--append", help="Also use the scores of the previous calibration.")] = False,
    category: Category = None,
) -> None:
    """Recalibrate a detector without training, on new good images and, if any, labelled defects.

    Example:  unflaw calibrate parts.safetensors --good parts/today --defect parts/rejects --miss-rate 0.05
    """
    with errors(), ExitStack() as held:
        if len([option for option in (rate, miss_rate, cost_ratio) if option is not None]) > 1:
            raise ValueError("--rate, --miss-rate and --cost-ratio each set the threshold; give one of them")
        if any(option in (0, 1) for option in (rate, miss_rate)) or 1 in (review_rate, minimum_area):
            raise ValueError("a rate must lie between 0 and 1, such as 0.01")
        if defect and miss_rate is None and cost_ratio is None:
            raise ValueError("--defect needs --miss-rate or --cost-ratio; `unflaw evaluate` measures on defects")
        if not defect and (miss_rate is not None or cost_ratio is not None):
            raise ValueError("a miss rate and a cost ratio need labelled defects; name them with --defect")
        from unflaw.calibration.outliers import describe_outliers

        detector = _opened(model, out, held)
        asked = {"review_rate": review_rate, "minimum_area": minimum_area, "extrapolate_tail": tail or None}
        with progress_bars() as progress:
            found = detector.calibrate(
                images_in(good),
                images_in(defect) if defect else [],
                rate=rate,
                miss_rate=miss_rate,
                cost_ratio=cost_ratio,
                category=category,
                append=append,
                progress=progress,
                **{name: value for name, value in asked.items() if value is not None},
            )
        detector.save(out or model, keep=True)
        done = detector.record_["calibrations"][-1]
        report_problems(f"skipped {reason}" for _, reason in done["skipped"])
        report_problems(describe_outliers(done, "calibrate"))
        typer.echo(f"{out or model}: {found.describe()}; threshold {found.threshold:.4g}")


@app.command()
def commission(
    model: TrainedFile,
    images: Annotated[list[Path], typer.Argument(help="First images of the new session, or folders of them.")],
    out: Annotated[Path | None, typer.Option(help="Output detector file; default: replace MODEL.")] = None,
    share: Annotated[
        float, typer.Option(min=0, max=1, help="Largest share of defects expected among them; 0: all were reviewed.")
    ] = 0.05,
    category: Category = None,
) -> None:
    """Set the threshold by the first 30 to 100 parts of a new session: another line, camera, light or day.

    They are presumed good. The calibration moves to them, and nothing is trained. `unflaw undo` takes it back.

    Example:  unflaw commission parts.safetensors line2/first
    """
    with errors(), ExitStack() as held:
        if share == 1:
            raise ValueError("--share 1: not all images can be defects; give a share such as 0.05")
        detector = _opened(model, out, held)
        with progress_bars() as progress:
            said_ = detector.commission(images_in(images), share=share, category=category, progress=progress)
        detector.save(out or model, keep=True)
        done = detector.record_["calibrations"][-1]
        report_problems(f"skipped {reason}" for _, reason in done["skipped"])
        report_problems(f"{path}: presumed defective and left out; look at it" for path in done["suspects"])
        report_problems(done["warnings"])
        typer.echo(f"{out or model}: {said_}; threshold {done['threshold']:.4g}")


@app.command(context_settings={"ignore_unknown_options": True})  # a score may be negative
def threshold(
    model: TrainedFile,
    value: Annotated[float, typer.Argument(help="Score above which an image is defective.")],
    out: Annotated[Path | None, typer.Option(help="Output detector file; default: replace MODEL.")] = None,
    category: Category = None,
) -> None:
    """Set the threshold by hand, as a report shows it; says the false-alarm rate that follows.

    Example:  unflaw threshold parts.safetensors 2.4
    """
    with errors(), ExitStack() as held:
        detector = _opened(model, out, held)
        found = detector.set_threshold(value, category=category)
        detector.save(out or model, keep=True)
        typer.echo(f"{out or model}: {found.describe()}; threshold {found.threshold:.4g}")


@app.command()
def teach(
    model: TrainedFile,
    good: Annotated[list[Path], typer.Option(help="Reviewed good images, or folders of them.")],
    out: Annotated[Path | None, typer.Option(help="Output detector file; default: replace MODEL.")] = None,
    category: Category = None,
) -> None:
    """Add reviewed good images to the memory of a detector, without training, such as those of false alarms.

    Scores can only fall, so the promised rate holds on. `unflaw undo` takes it back.

    Example:  unflaw teach parts.safetensors --good reviewed/good
    """
    with errors(), ExitStack() as held:
        detector = _opened(model, out, held)
        with progress_bars() as progress:
            added, skipped = detector.teach(images_in(good), category=category, progress=progress)
        detector.save(out or model, keep=True)
        report_problems(f"skipped {reason}" for _, reason in skipped)
        images = count(detector.record_["taught"][-1]["good"], "good image")
        new = count(added, "new prototype") if added else "nothing that it did not know"
        typer.echo(f"{out or model}: {images} taught, {new}; thresholds stay")


@app.command()
def undo(model: TrainedFile) -> None:
    """Take the last calibration, commissioning or teaching of a detector back, up to five of them.

    Example:  unflaw undo parts.safetensors
    """
    with errors():
        from unflaw.io.detector_file import read_metadata
        from unflaw.io.files import holding
        from unflaw.io.versions import undo as undo_
        from unflaw.io.versions import versions_of

        writable(model)
        with holding(model):
            _, undone = undo_(model)
        done = read_metadata(model).get("record", {})
        last = max([entry["when"] for name in ("calibrations", "taught") for entry in done.get(name, [])], default="")
        what = f"as it was changed {last}" if last else "as it was trained"
        further = count(len(versions_of(model)), "earlier version")
        typer.echo(f"{model}: {what}; {further}; the file before is kept as {undone}")


def _opened(model: Path, out: Path | None, held: ExitStack) -> Detector:
    """Loads a detector that is about to change, and holds the file that will be written until `held` is closed.

    Otherwise what a concurrent command records could be lost.
    """
    from unflaw.io.files import holding

    writable(model) if out is None else detector_file(out)
    held.enter_context(holding(out or model))
    return load_trained(model)
