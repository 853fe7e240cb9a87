"""Commands for exported detectors: export, verify, bench."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unflaw.cli.common import (
    Category,
    Data,
    TrainedFile,
    app,
    errors,
    load_detector,
    load_trained,
    progress_bars,
    report_problems,
    writable,
)
from unflaw.io.words import count

if TYPE_CHECKING:
    from unflaw.datasets import Dataset


@app.command()
def export(
    model: TrainedFile,
    to: Annotated[str, typer.Option(help="Runtime: onnx or openvino.")] = "onnx",
    precision: Annotated[str, typer.Option(help="fp32, fp16 (half the file) or int8 (part of the backbone).")] = "fp32",
    out: Annotated[
        Path | None, typer.Option(help="File to write; by default beside MODEL, as .onnx or as .xml and .bin.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="For int8: data set whose good images set the range of 8-bit values.")
    ] = None,
) -> None:
    """Write a detector as a graph that ONNX Runtime or OpenVINO runs without torch.

    Example:  unflaw export parts.safetensors --to onnx
    """
    with errors():
        if to not in ("onnx", "openvino") or precision not in ("fp32", "fp16", "int8"):
            raise ValueError("--to takes onnx or openvino, and --precision fp32, fp16 or int8")
        from unflaw.runtime.export import CALIBRATED_ON, SUFFIX
        from unflaw.runtime.export import export as write

        detector = load_trained(model)
        out = out or model.with_suffix(SUFFIX[to])
        if out.suffix != SUFFIX[to]:
            raise ValueError(f"{out}: a detector for {to} is called {out.stem}{SUFFIX[to]}")
        if out.resolve() == model.resolve():
            raise ValueError(f"{out}: is the detector itself, which would be lost; name another file with --out")
        writable(out)
        images = []
        if precision == "int8" and data is not None:
            from unflaw.datasets import load_dataset
            from unflaw.imaging.reading import read
            from unflaw.imaging.transforms import prepare

            train = load_dataset(data).train
            chosen = train[:: max(1, len(train) // CALIBRATED_ON)][:CALIBRATED_ON]
            images = [prepare(read(sample.path), detector.config.preparation) for sample in chosen]
        write(detector, out, to=to, precision=precision, images=images)  # type: ignore[arg-type]
        files = [out, out.with_suffix(".bin")] if to == "openvino" else [out]
        size = sum(file.stat().st_size for file in files) / 1e6
        typer.echo(f"{' and '.join(map(str, files))}: {precision}, {size:.1f} MB; `unflaw verify` compares it")


@app.command()
def verify(
    trained: TrainedFile,
    exported: Annotated[Path, typer.Argument(help="The detector exported from it (.onnx or .xml).")],
    data: Data,
    tolerance: Annotated[float, typer.Option(min=0, help="Largest relative difference of scores and maps.")] = 1e-4,
    category: Category = None,
) -> None:
    """Inspect the same images with both; exit code 1 if scores, maps or verdicts differ by more than the tolerance.

    Example:  unflaw verify parts.safetensors parts.onnx --data parts
    """
    with errors():
        from unflaw.runtime.verification import compare, mismatch

        detectors = load_trained(trained), load_detector(exported)
        if reason := mismatch(*detectors):
            raise ValueError(f"{exported}: {reason}")
        dataset = _dataset(data)
        samples = dataset.test or [*dataset.train, *dataset.validation]
        with progress_bars() as progress:
            result = compare(
                *detectors,
                [sample.path for sample in samples],
                category=category or detectors[0].match(dataset.name),
                tolerance=tolerance,
                progress=progress,
            )
        report_problems(f"skipped {reason}" for _, reason in result.skipped)
        typer.echo(f"{count(result.images, 'image')}, {trained.name} and {exported.name}, largest relative differences")
        typer.echo(f"scores    {result.score:.2e}  {result.score_path}")
        typer.echo(f"maps      {result.map:.2e}  {result.map_path}  (mean over an image; one cell {result.cell:.2e})")
        for name, difference in sorted(result.layers.items()):
            typer.echo(f"{name:9} {difference:.2e}")
        typer.echo(f"verdicts  {len(result.verdicts)} differ  {' '.join(result.verdicts[:3])}".rstrip())
        if result.edge:
            typer.echo(f"verdicts  {len(result.edge)} more differ because the score equals a threshold up to rounding")
        if faults := result.faults(tolerance):
            typer.echo(f"{exported}: does not agree with {trained}: {'; '.join(faults)}", err=True)
            raise typer.Exit(1)


@app.command()
def bench(
    models: Annotated[list[Path], typer.Argument(help="Detector files, trained or exported.")],
    data: Annotated[Path | None, typer.Option(help="Data set to inspect; by default synthetic JPEGs.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Number of timed inspections of a batch.")] = 30,
    threads: Annotated[int, typer.Option(min=1, help="Number of computing threads.")] = 1,
    category: Category = None,
) -> None:
    """Time inspection by stage, for one image and for 32 together, and measure the throughput from files to results.

    Example:  unflaw bench parts.safetensors parts.onnx --data parts
    """
    with errors():
        import tempfile

        import unflaw
        from unflaw.runtime.bench import HEAD, measure, rows, synthetic_jpegs, throughput, use_threads

        with tempfile.TemporaryDirectory() as folder:
            if data is None:
                paths = [Path(folder) / f"{i}.jpg" for i in range(8)]
                for path, content in zip(paths, synthetic_jpegs(len(paths)), strict=True):
                    path.write_bytes(content)
            else:
                dataset = _dataset(data)
                paths = [sample.path for sample in dataset.test or dataset.train]
            detectors = {model.name: unflaw.load(model, threads=threads) for model in models}
            use_threads(threads)
            conditions = count(threads, "thread"), count(rounds, "round"), count(len(paths), "image")
            typer.echo(f"{', '.join(conditions)}\n\n{HEAD}")
            for batch in (1, 32):
                for name, detector in detectors.items():
                    turns = rounds if batch == 1 else max(1, rounds // 8)
                    stages = measure(detector, paths, batch=batch, rounds=turns, category=category)
                    typer.echo("\n".join(rows(name, batch, stages)))
            typer.echo("")
            for name, detector in detectors.items():
                speed = throughput(detector, paths, 2 * rounds, category)
                typer.echo(f"{name}: {speed:.1f} images/s, files to results")


def _dataset(data: Path) -> Dataset:
    from unflaw.datasets import load_dataset

    dataset = load_dataset(data)
    report_problems(dataset.problems)
    return dataset
