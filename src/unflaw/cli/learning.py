"""Commands that make detectors: train, fleet, demo."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from unflaw.cli.common import (
    METHODS,
    TAIL,
    BackboneNames,
    Several,
    Size,
    WeightFile,
    app,
    detector_file,
    errors,
    levels_of,
    progress_bars,
    report_dataset_problems,
    report_problems,
    said,
    setting_of,
    weights_of,
)
from unflaw.io.words import count
from unflaw.parallel.launch import launch, launched, watch_parent

# names of Fabric → `training.precision`
_PRECISIONS = {"32-true": "float32", "bf16-mixed": "bfloat16"}
_KNOWN = {"accelerator": ("auto", "cpu", "gpu"), "strategy": ("auto", "ddp")}

Setting = Annotated[list[str] | None, typer.Option("--set", help="Setting as NAME=VALUE, such as training.steps=200.")]


@app.command()
def train(
    data: Several,
    out: Annotated[Path, typer.Option(help="Output detector file (.safetensors).")],
    method: Annotated[str, typer.Option(help=METHODS)] = "uranet",
    profile: Annotated[
        str,
        typer.Option(help="Profile of settings: cpu, paper, dino, or restoration (uranet, mfrnet without memories)."),
    ] = "cpu",
    backbone: BackboneNames = None,
    weights: WeightFile = None,
    levels: Annotated[str | None, typer.Option(help="Feature levels, such as 1,2,3.")] = None,
    size: Size = None,
    fit: Annotated[str | None, typer.Option(help="Resizing: stretch, or pad to keep the aspect ratio.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed; same seed, same machine: same detector.")] = None,
    rate: Annotated[float | None, typer.Option(help="Requested false-alarm rate, such as 0.01.")] = None,
    tail: Annotated[bool, typer.Option("--extrapolate-tail", help=TAIL)] = False,
    groups: Annotated[
        str | None, typer.Option(help="Images that belong together: a pattern of their paths, auto, or none.")
    ] = None,
    drop_outliers: Annotated[
        float | None, typer.Option(min=0, max=0.49, help="Share of the images to leave out, the strangest ones.")
    ] = None,
    textures: Annotated[Path | None, typer.Option(help="Folder of texture images for artificial anomalies.")] = None,
    setting: Setting = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from OUT.checkpoint after an interruption.")] = False,
    multi_class: Annotated[
        bool, typer.Option("--multi-class", help="Train one detector for all data sets, calibrated per category.")
    ] = False,
    devices: Annotated[int, typer.Option(min=1, help="Number of processes or GPUs on this machine.")] = 1,
    accelerator: Annotated[str, typer.Option(help="Accelerator: cpu, gpu, or auto for GPUs if available.")] = "cpu",
    strategy: Annotated[str, typer.Option(help="Strategy: ddp, or auto for ddp with several processes.")] = "auto",
    precision: Annotated[str | None, typer.Option(help="Precision: auto, 32-true or bf16-mixed.")] = None,
    accumulate: Annotated[int | None, typer.Option(min=1, help="Passes per batch; more use less memory.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of machines; see docs/scaling.md.")] = 1,
) -> None:
    """Learn from good images and write a detector.

    Example:  unflaw train --data parts/good --out parts.safetensors
    """
    changes: dict[str, Any] = {
        "features.backbone": "+".join(backbone) if backbone else None,
        "features.levels": levels_of(levels),
        "preparation.size": size,
        "preparation.fit": fit,
        "training.seed": seed,
        "training.accumulate": accumulate,
        "training.precision": _PRECISIONS.get(precision or "", precision),
        "training.textures": str(textures) if textures else None,
        "calibration.false_alarm_rate": rate,
        "calibration.groups": groups,
        "calibration.drop_outliers": drop_outliers,
        "calibration.extrapolate_tail": tail or None,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    checkpoint = out.with_name(out.name + ".checkpoint")

    def stopped() -> str:
        from unflaw.io.files import steps_of

        with suppress(ValueError):  # --resume reports it
            if held := steps_of(checkpoint):
                return f"stopped at {held[1]}; the same command with --resume continues from there"
        return "stopped before a step was saved; the same command starts over"

    with errors(stopped):
        from unflaw.config import make_config
        from unflaw.io.files import holding, steps_of

        config = make_config(method, profile, changes | dict(map(setting_of, setting or [])))
        for option, value in (("accelerator", accelerator), ("strategy", strategy)):
            if value not in _KNOWN[option]:
                raise ValueError(f"--{option} {value} is unknown; choose one of {', '.join(_KNOWN[option])}")
        detector_file(out)
        from unflaw.calibration.outliers import describe_outliers
        from unflaw.datasets import load_categories, load_dataset
        from unflaw.detector import Detector
        from unflaw.parallel.process_group import SINGLE_PROCESS, ProcessGroup

        if len(data) > 1 and not multi_class:
            raise ValueError("one detector for several data sets needs --multi-class; add it, or give one --data")
        several = devices * nodes > 1
        if several and not launched():
            raise typer.Exit(launch(sys.argv[1:], devices, nodes))
        group: ProcessGroup = SINGLE_PROCESS
        if several or strategy == "ddp" or accelerator != "cpu":
            from unflaw.parallel.fabric import FabricGroup

            watch_parent()
            wanted: dict[str, Any] = {"accelerator": accelerator, "strategy": strategy}
            group = FabricGroup(config.training, devices=devices, nodes=nodes, **wanted)
        with holding(out) if group.is_main else nullcontext():
            if group.is_main and resume:
                if (held := steps_of(checkpoint)) is None:
                    raise ValueError(f"{checkpoint}: there is no such checkpoint; leave --resume out")
                report_problems([f"{checkpoint}: holds {held[1]}, from which the same training continues"])
            datasets = load_categories(data) if multi_class else {"": load_dataset(data[0])}
            if group.is_main:
                report_dataset_problems(datasets)
                if not resume:
                    checkpoint.unlink(missing_ok=True)
            detector = Detector(config=config, weights=weights_of(weights, config.features.backbone))
            if textures and not detector.network.uses_textures:
                raise ValueError(
                    f"--textures {textures}: {method} uses no textures with these settings; leave --textures out"
                )
            with progress_bars(group.is_main) as progress:
                chosen = datasets if multi_class else datasets[""]
                detector.fit(chosen, progress=progress, checkpoint=checkpoint, group=group)
            if not group.is_main:
                return
            detector.save(out)
            checkpoint.unlink(missing_ok=True)  # only now: if the disk is full, --resume needs it
        report_problems(detector.record_[key] for key in ("few", "canvas", "groups", "drop") if key in detector.record_)
        report_problems(f"skipped {reason}" for _, reason in detector.record_["skipped"])
        report_problems(describe_outliers(detector.record_))
        described = {name: known.calibration.describe() for name, known in detector.categories_.items()}
        certified = described.get("") or "".join(f"\n{name}: {guarantee}" for name, guarantee in described.items())
        typer.echo(f"{out}: trained in {detector.record_['seconds']['total']:.0f} s; {certified}")
        if "" in described and (advice := detector.categories_[""].calibration.advise(shlex.quote(str(out)))):
            typer.echo(said(advice))


@app.command()
def fleet(
    data: Annotated[Path, typer.Argument(help="Folder with one data set per category, in any layout of `train`.")],
    out: Annotated[Path, typer.Option(help="Output folder: CATEGORY.safetensors, fleet.md, .csv and .json.")],
    method: Annotated[str, typer.Option(help=METHODS)] = "uranet",
    profile: Annotated[
        str,
        typer.Option(help="Profile of settings: cpu, paper, dino, or restoration (uranet, mfrnet without memories)."),
    ] = "cpu",
    backbone: BackboneNames = None,
    weights: WeightFile = None,
    size: Size = None,
    seed: Annotated[int | None, typer.Option(help="Random seed; same seed, same machine: same detectors.")] = None,
    rate: Annotated[float | None, typer.Option(help="Requested false-alarm rate, such as 0.01.")] = None,
    setting: Setting = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Number of detectors trained in parallel.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Number of threads per worker.")] = None,
    engine: Annotated[str, typer.Option(help="Engine: processes (of this machine) or ray.")] = "processes",
    address: Annotated[str | None, typer.Option(help="Address of a running Ray cluster, such as auto.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for cached features; default: OUT/features.")] = None,
    cache_gb: Annotated[float, typer.Option(min=0, help="Maximum GB of cached features; oldest are deleted.")] = 20.0,
) -> None:
    """Train a detector for each category in a folder, in parallel, and summarise their metrics.

    After an interruption the same command continues: finished detectors are kept. Exit code 3 if some failed.

    Example:  unflaw fleet products --out detectors --method nearest_neighbor
    """
    changes: dict[str, Any] = {
        "features.backbone": "+".join(backbone) if backbone else None,
        "preparation.size": size,
        "training.seed": seed,
        "calibration.false_alarm_rate": rate,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    with errors(lambda: f"stopped; finished detectors stay in {out}, and the same command goes on with the others"):
        if engine not in ("processes", "ray"):
            raise ValueError(f"--engine {engine}: choose processes or ray")
        if address is not None and engine != "ray":
            raise ValueError("--address needs a Ray cluster; add --engine ray")
        from unflaw.config import make_config
        from unflaw.experiments.per_category import (
            WorkerConfig,
            members,
            shares,
            summary,
            train_fleet,
            training_workers,
        )

        changes |= dict(map(setting_of, setting or []))
        if engine == "ray":  # its workers have other working folders
            data, out = data.absolute(), out.absolute()
            cache = cache and cache.absolute()
            if textures := changes.get("training.textures"):
                changes["training.textures"] = str(Path(str(textures)).absolute())
        config = make_config(method, profile, changes)
        source = weights_of(weights, config.features.backbone)
        if engine == "ray":
            named = source if isinstance(source, Mapping) else {"": source}
            absolute = {name: Path(own).absolute() if isinstance(own, str) else own for name, own in named.items()}
            source = absolute if isinstance(source, Mapping) else absolute[""]
        found, failed = members(data)
        report_dataset_problems(found)
        from unflaw.detector import Detector

        Detector(config=config, weights=source)  # invalid settings fail here, once
        count, each = shares(workers, threads, len(found))
        worker_config = WorkerConfig(cache or out / "features", cache_gb * 1e9, source, each)
        with training_workers(worker_config, count, engine, address) as places, progress_bars() as progress:
            records, failed = train_fleet(found, config, out, places, progress, failed)
        report_problems(f"skipped {reason}" for record in records for reason in record.skipped.values())
        typer.echo(summary(records, failed))
        for name, reason in failed.items():
            typer.echo(said(f"error: {name}: {reason}"), err=True)
        if failed:
            raise typer.Exit(3)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Output folder for data, detector, metrics and report.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Random seed of data and detector.")] = 0,
) -> None:
    """Create synthetic defects on real textures, train and evaluate URA-Net, and write a report."""
    from unflaw.cli.inspecting import run_evaluation

    with errors():
        from unflaw.datasets import load_dataset
        from unflaw.datasets.synthetic import is_whole, make_demo_data
        from unflaw.io.files import holding, make_folder

        data, model = out / "bricks", out / "detector.safetensors"
        make_folder(out)
        with holding(out):
            if not is_whole(data):
                make_demo_data(data, seed)
            found = count(len(load_dataset(data).train), "good image")
            typer.echo(f"{data}: {found} to learn from; defects are synthetic, on real textures")
            train(data=[data], out=model, seed=seed)
            note = (
                "The defects are synthetic, drawn on a real photograph of brickwork: this shows that the parts work "
                "together."
            )
            run_evaluation(model, [data], out / "metrics.json", out / "report.html", notes=[note])
    typer.echo(f"Look at {out / 'report.html'}")
