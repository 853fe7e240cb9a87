"""Ablation: variants of a method on data sets and seeds, into one table.

A finished run is a line of `runs.jsonl` at once, under a digest of all that decides its figures; a run whose digest is
there already is not done again. So a killed ablation goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from unflaw._version import __version__
from unflaw.config import Config, Weights, WeightSource
from unflaw.datasets import Dataset
from unflaw.experiments.run_log import Finished, Log
from unflaw.experiments.tables import comma_separated, short, summary
from unflaw.experiments.variants import FULL, Variant, written
from unflaw.io.files import write_text

if TYPE_CHECKING:
    from unflaw.experiments.feature_store import ExperimentRunner
    from unflaw.io.progress import Progress

# What the table shows, and what else a run keeps of its evaluation.
METRICS = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "pixel_auroc": "pixel AUROC",
    "aupro_30": "AUPRO",
    "pixel_ap": "pixel AP",
}
KEPT = ("image_f1_max", "pixel_f1_max", "aupro_05", "n_images", "n_good", "false_alarms", "missed", "threshold")


@dataclass(frozen=True)
class Run:
    """One data set, variant and seed; equal digests give equal figures."""

    dataset: Dataset
    variant: Variant
    config: Config
    digest: str

    @property
    def name(self) -> str:
        return f"{self.dataset.name}, variant {self.variant.name!r}, seed {self.config.training.seed}"


class Record(Finished):
    """A finished run, a line of `runs.jsonl`.

    Attributes:
        digest: Of configuration, data, weights and version.
        data, variant, seed, method, backbone: What was run.
        weights: Name of the backbone's weight file, or "default" or "random".
        overrides: Settings that the variant changes.
        common: Settings that all variants of the ablation have.
        metrics: METRICS and KEPT; None where undefined.
        skipped: Images that could not be read, and why.
        seconds: Of "training", from features on, and "evaluation".
        machine, unflaw, torch: What it was made with.
    """

    data: str
    variant: str
    seed: int
    method: str
    backbone: str
    weights: str
    overrides: str
    common: dict[str, Any]
    metrics: dict[str, int | float | None]
    skipped: dict[str, str]
    seconds: dict[str, float]
    machine: str
    unflaw: str
    torch: str


def ablate(
    method: str,
    data: Sequence[Dataset],
    variants: Sequence[Variant],
    common: dict[str, Any],
    *,
    seeds: int,
    out: Path,
    cache: Path,
    weights: WeightSource = None,
    progress: Progress,
) -> list[Record]:
    """Does the runs that are not in `out/runs.jsonl` yet; `out/table.md`, `.csv` and `.json` are made anew after each.

    Args:
        method: Of all variants that do not choose another.
        data: Data sets with training and test images, of different names.
        variants: `FULL`, which the others are compared with, and the others.
        common: Dotted settings of all variants.
        seeds: Every variant is run with the seeds 0 to seeds − 1.
        out: Folder for the results.
        cache: Folder for features (see `ExperimentRunner`).
        weights: Of the backbone, as for `Detector`.
        progress: Called as `progress("runs", done, total, None)`, where the total is what was left to do, and as by
            `Detector.fit` and `evaluate`.

    Returns:
        The records of all runs, new and old ones.

    Raises:
        ValueError, WeightsError: Data, settings or files that cannot be used; of settings, before the first run.
        InUseError: Another ablation or benchmark writes to `out`.
        TrainingError: A run that fails. The finished ones stay.
    """
    from unflaw.errors import TrainingError
    from unflaw.experiments.feature_store import ExperimentRunner

    for dataset in data:
        if not (dataset.train and dataset.test):
            lacking = "test" if dataset.train else "good training"
            raise ValueError(f"{dataset.name}: there are no {lacking} images; an ablation needs train/ and test/")
    runner = ExperimentRunner(cache, weights)
    with Log(out / "runs.jsonl", Record) as log:
        plan = list(_plan(runner, method, data, variants, common, seeds))
        write_tables(out, plan, common, log.records)
        left = [run for run in plan if run.digest not in log.records]
        for done, run in enumerate(left):
            progress("runs", done, len(left), None)
            if run.digest in log.records:  # another variant came to the same settings
                continue
            try:
                log.append(_record(runner, run, common, progress))
            except TrainingError as error:
                kept = "finished runs are kept, the same command goes on"
                raise TrainingError(f"{run.name}: {error} ({kept})") from error
            write_tables(out, plan, common, log.records)
        progress("runs", len(left), len(left), None)
        return [log.records[run.digest] for run in plan]


def _plan(
    runner: ExperimentRunner,
    method: str,
    data: Sequence[Dataset],
    variants: Sequence[Variant],
    common: dict[str, Any],
    seeds: int,
) -> Iterator[Run]:
    """All runs. That the settings of each can work is checked on the way."""
    from unflaw.features.backbones import WeightsError

    for dataset in data:
        for variant in variants:
            for config in [variant.config(method, common, seed) for seed in range(seeds)]:
                try:
                    yield Run(dataset, variant, config, runner.digest(config, dataset))
                except (ValueError, WeightsError) as error:
                    kind = WeightsError if isinstance(error, WeightsError) else ValueError
                    raise kind(f"variant {variant.name!r}: {error}") from error


def _record(runner: ExperimentRunner, run: Run, common: dict[str, Any], progress: Progress) -> Record:
    from unflaw.evaluation.evaluate import evaluate

    detector = runner.fit(run.config, run.dataset, progress=progress)
    metrics, fitted = evaluate(detector, run.dataset, progress=progress).metrics, detector.record_
    return Record(
        digest=run.digest,
        data=run.dataset.name,
        variant=run.variant.name,
        seed=run.config.training.seed,
        method=run.config.method,
        backbone=run.config.features.backbone,
        weights=Weights.name_of(runner.weights, short=True),
        overrides=run.variant.overrides,
        common=common,
        metrics={name: metrics[name] for name in (*METRICS, *KEPT)},
        skipped=dict([*fitted["skipped"], *metrics["skipped"]]),
        seconds={"training": fitted["seconds"]["training"], "evaluation": metrics["timing"]["seconds"]},
        machine=fitted["machine"],
        unflaw=fitted["unflaw"],
        torch=fitted["torch"],
    )


def tabulate(plan: Sequence[Run], records: dict[str, Record]) -> list[dict[str, Any]]:
    """A row per data set and variant, in the order of the plan.

    Args:
        plan: Runs, not all of which need be finished.
        records: Of the finished ones, by digest.

    Returns:
        "data variant overrides why n", n the number of finished runs; and for each of METRICS and for "seconds" (of
        training) "mean", "deviation" (standard deviation of a sample, None for one run) and "median"; and for METRICS
        "difference", the mean of what the variant has more than `FULL` with the same seed, of the seeds that both have.
        All are None where undefined.
    """
    groups: dict[tuple[str, str], tuple[Variant, dict[int, Record]]] = {}
    for run in plan:
        _, found = groups.setdefault((run.dataset.name, run.variant.name), (run.variant, {}))
        found |= {run.config.training.seed: records[run.digest]} if run.digest in records else {}
    return [
        {"data": data, "variant": variant.name, "overrides": variant.overrides, "why": variant.why, "n": len(found)}
        | {name: _compared(found, groups.get((data, FULL.name), (FULL, {}))[1], name) for name in METRICS}
        | {"seconds": summary([record.seconds["training"] for record in found.values()])}
        for (data, _), (variant, found) in groups.items()
    ]


def _compared(found: dict[int, Record], full: dict[int, Record], metric: str) -> dict[str, float | None]:
    """`summary`, and the mean difference from `full`, by seed."""
    values = {seed: record.metrics.get(metric) for seed, record in found.items()}
    others = {seed: record.metrics.get(metric) for seed, record in full.items() if seed in found}
    more = [value - other for seed, other in others.items() if (value := values[seed]) is not None is not other]
    return summary(list(values.values())) | {"difference": fmean(more) if more else None}


def write_tables(out: Path, plan: Sequence[Run], common: dict[str, Any], records: dict[str, Record]) -> None:
    """The rows of `tabulate` as `table.md`, `table.csv` and `table.json`: each whole, or as it was before."""
    rows, config = tabulate(plan, records), plan[0].config
    finished = [records[run.digest] for run in plan if run.digest in records]
    made = {
        "method": config.method,
        "backbone": config.features.backbone,
        "weights": sorted({record.weights for record in finished}),
        "size": config.preparation.size,
        "common": common,
        "seeds": max(run.config.training.seed for run in plan) + 1,
        "machines": sorted({record.machine for record in finished}),
        "unflaw": __version__,
    }
    write_text(out / "table.md", markdown(rows, made))
    write_text(out / "table.csv", comma_separated(rows))
    write_text(out / "table.json", json.dumps(made | {"rows": rows}, indent=2, ensure_ascii=False) + "\n")


def markdown(rows: Sequence[dict[str, Any]], made: dict[str, Any]) -> str:
    """What it was made with and, per data set, a table of mean ± deviation (difference from `FULL`)."""
    settings = {name: value for name, value in made["common"].items() if name != "features.backbone"}
    setup = [
        f"`{made['method']}`",
        f"{made['backbone']} ({', '.join(made['weights']) or 'no'} weights)",
        f"{made['size']} × {made['size']}",
        *([f"`{written(settings)}`"] if settings else []),
        f"seeds 0 to {made['seeds'] - 1}" if made["seeds"] > 1 else "seed 0",
        *made["machines"],
        f"unflaw {made['unflaw']}",
    ]
    meaning = (
        f"Mean ± standard deviation over n seeds (difference from `{FULL.name}` of the same seeds). AUPRO: up to a "
        "rate of false positives of 0.3. Seconds: of training, without the features, which the variants share. "
        "–: undefined or not run."
    )
    lines, seen = [f"{', '.join(setup)}. {meaning}"], set()
    for row in rows:
        if row["data"] not in seen:
            seen.add(row["data"])
            heads = ["variant", *METRICS.values(), "seconds", "n", "changed"]
            lines += ["", f"## {row['data']}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        cells = [_cell(row[name], short, row["variant"] != FULL.name) for name in METRICS]
        cells += [
            _cell(row["seconds"], "{:.1f}".format),
            str(row["n"]),
            f"`{row['overrides']}`" if row["overrides"] else "",
        ]
        lines.append(f"| {' | '.join([row['variant'], *cells])} |")
    return "\n".join(lines) + "\n"


def _cell(summary: dict[str, float | None], show: Callable[[float], str], compared: bool = False) -> str:
    """`.976 ± .005 (−.003)`, with the difference where that is asked for and known."""
    mean, deviation, difference = summary["mean"], summary["deviation"], summary.get("difference")
    if mean is None:
        return "–"
    spread = "" if deviation is None else f" ± {show(deviation)}"
    return show(mean) + spread + (f" ({short(difference, '+')})" if compared and difference is not None else "")
