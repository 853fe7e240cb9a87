"""Evaluation of a detector on a labelled set: metrics on raw scores, in bounded memory, and images for a report."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from unflaw.datasets import Dataset, load_dataset
from unflaw.errors import TrainingError
from unflaw.evaluation.accumulate import Measurement
from unflaw.evaluation.results import Evaluation, Inspected
from unflaw.evaluation.risk_coverage import risk
from unflaw.inference.base import BasePredictor
from unflaw.io.progress import Progress, silent
from unflaw.io.words import count
from unflaw.postprocessing.results import Result

SHOWN = 40  # images kept for the report


def evaluate_all(
    detector: BasePredictor,
    datasets: Mapping[str, Dataset],
    *,
    category: str | None = None,
    progress: Progress = silent,
) -> dict[str, Evaluation]:
    """Apply `evaluate` to several data sets by name; errors of `category` are raised before any evaluation.

    `category`: category of all images, for a detector of several; None: for each data set the one of its name.
    """
    matched = {name: detector.match(name) if category is None else category for name in datasets}
    for chosen in matched.values():
        detector.select(chosen)
    shown = max(8, SHOWN // max(1, len(datasets)))
    return {
        name: evaluate(detector, dataset, category=matched[name], shown=shown, progress=progress)
        for name, dataset in datasets.items()
    }


def evaluate(
    detector: BasePredictor,
    dataset: Dataset | str | Path,
    *,
    category: str | None = None,
    shown: int | None = None,
    spool: bool = False,
    progress: Progress = silent,
) -> Evaluation:
    """Inspect the test images of a data set and compute metrics; see `Measurement`.

    Args:
        dataset: A data set, or its path.
        category: Category of the images, for a detector of several; None: the one named like the data set.
        shown: Number of images kept for the report; None: SHOWN.
        spool: Also return the data of each image for `bootstrap`; maps are kept in a temporary file meanwhile.

    Raises:
        TrainingError: The data set has no test images, or none could be read.
        DetectorError: See `BasePredictor.select`.
    """
    dataset = load_dataset(dataset) if isinstance(dataset, str | Path) else dataset
    category = detector.match(dataset.name) if category is None else category
    calibration = detector.select(category)
    if not dataset.test:
        raise TrainingError(f"{dataset.name}: there are no test images; give a folder with test/good and test/<defect>")
    regions = calibration.pixel_threshold, calibration.minimum_area
    measured = Measurement(dataset, detector.config.preparation, regions=regions, spool=spool)
    skipped: list[tuple[str, str]] = []
    gallery = _Gallery(SHOWN if shown is None else shown)
    started, cpu = time.perf_counter(), time.process_time()
    outcomes = detector.inspect_many((sample.path for sample in dataset.test), category=category, on_error="yield")
    for i, (sample, result) in enumerate(zip(dataset.test, outcomes, strict=True)):
        if isinstance(result, Result):
            uncertainty = result.regions[0].uncertainty if result.regions else None
            facts = {"p_value": result.p_value, "verdict": result.verdict, "uncertainty": uncertainty}
            mask = measured.add(sample, result.score, result.map, result.valid, result.counted, **facts)
            gallery.add(Inspected(result, sample.label, sample.defect, mask))
        else:
            skipped.append((str(sample.path), str(result)))
        progress("evaluating", i + 1, len(dataset.test), None)
    elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu
    rows = measured.rows
    if not rows:
        raise TrainingError(
            f"{dataset.name}: none of {count(len(skipped), 'test image')} could be read; {skipped[0][1]}"
        )
    started_metrics = time.perf_counter()
    risks, curves = risk(rows, calibration)
    verdicts = Counter((row["verdict"], bool(row["label"])) for row in rows)
    n_good = sum(not row["label"] for row in rows)
    chance, promise = calibration.check(verdicts["defect", False], n_good)
    metrics: dict[str, Any] = {
        **measured.metrics(),
        "false_alarms": verdicts["defect", False],
        "missed": verdicts["good", True],
        "review_good": verdicts["review", False],
        "review_defective": verdicts["review", True],
        "promise": promise
        if n_good and not (calibration.defects or calibration.review_only or calibration.by_hand)
        else None,
        "promise_p_value": chance,
        "risk": risks,
        "skipped": skipped,
        "problems": [*dataset.problems, *measured.problems],
        "dataset": dataset.name,
        **({"category": category} if category else {}),
        "threshold": calibration.threshold,
        "review_threshold": calibration.review_threshold,
        "calibration": calibration.describe(),
        "calibration_numbers": calibration.numbers(),
        "timing": {
            "seconds": round(elapsed, 2),
            "seconds_per_image": round(elapsed / len(rows), 4),
            "cpu_seconds_per_image": round(cpu / len(rows), 4),
            "metric_seconds": 0.0,
            "training": detector.record_.get("seconds"),
        },
        "config": detector.config.model_dump(mode="json"),
    }
    metrics["timing"]["metric_seconds"] = round(time.perf_counter() - started_metrics, 3)
    images = measured.per_image() if spool else None
    return Evaluation(metrics, rows, measured.curves() | curves, gallery.images(), skipped, images)


class _Gallery:
    """Images for a report, in bounded memory: mistakes first, then the least certain of each kind."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.kept: dict[tuple[bool, str], list[Inspected]] = defaultdict(list)

    def add(self, item: Inspected) -> None:
        wrong = item.result.verdict == ("good" if item.label else "defect")
        group = self.kept[wrong, item.defect]
        group.append(replace(item, result=replace(item.result, image=item.result.image.copy())))
        # the worst mistakes, and the correct verdicts nearest to the threshold
        group.sort(key=lambda i: i.result.score if (i.label == 1) else -i.result.score)
        del group[self.size // 2 if wrong else self.size // 4 :]

    def images(self) -> list[Inspected]:
        mistakes = [i for (wrong, _), group in self.kept.items() if wrong for i in group]
        right = [group for (wrong, _), group in sorted(self.kept.items(), key=lambda g: g[0]) if not wrong]
        in_turn = [i for row in zip_longest(*right) for i in row if i is not None]  # every kind is represented
        half = self.size // 2
        shown = mistakes[: max(half, self.size - len(in_turn))]
        return shown + in_turn[: self.size - len(shown)]
