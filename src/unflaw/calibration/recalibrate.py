"""Recalibration of a trained detector; see `Detector.calibrate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple

import numpy as np

from unflaw.calibration.commission import move, warnings
from unflaw.calibration.drift import Reference
from unflaw.calibration.outliers import ALL, outliers
from unflaw.calibration.scores import CalibrationScores
from unflaw.calibration.thresholds import Calibration
from unflaw.config import CalibrationOptions
from unflaw.datasets.samples import SHORT, digest, distinct, sha256_if_readable
from unflaw.errors import ImageError, TrainingError
from unflaw.imaging.inputs import Input
from unflaw.io.progress import Progress
from unflaw.postprocessing.results import Result


class Recalibrated(NamedTuple):
    """New calibration of one category of a detector.

    Attributes:
        calibration: Thresholds and p-values.
        reference: New drift reference; None if there was none before.
        record: Record of the detector, with an entry for this calibration.
    """

    calibration: Calibration
    reference: Reference | None
    record: dict[str, Any]


def recalibrate(
    inspect: Callable[[Sequence[Input]], Iterable[Result | ImageError]],
    before: Calibration,
    reference: Reference | None,
    record: Mapping[str, Any],
    good: Sequence[Input],
    defects: Sequence[Input],
    *,
    category: str,
    options: CalibrationOptions,
    rate: float | None,
    miss_rate: float | None,
    cost_ratio: float | None,
    append: bool,
    progress: Progress,
    suspected: float | None = None,
) -> Recalibrated:
    """Recalibrates one category of a detector; see `Detector.calibrate` for the other arguments and the errors.

    Args:
        inspect: Yields the result of each image, or its error.
        before: Present calibration.
        reference: Present drift reference.
        record: Record of the detector.
        category: Name; "" for a detector of a single category.
        options: Options of the detector with changed settings.
        suspected: Largest share of defects among the good images; the calibration is then moved to them
            (`commission.move`). None: they replace or, with `append`, join the present one.
    """
    contents = {path: sha256_if_readable(path) for path in [*good, *defects]}
    (good, good_again), (defects, defects_again) = distinct(good, contents), distinct(defects, contents)
    again = [*good_again, *defects_again]
    skipped = [[str(path), f"{path}: is the same image as {first} and counts once"] for path, first in again]
    paths = [good, defects]
    seen = set(record.get("seen", []))
    if known := [path for path in good if contents[path] and contents[path][:SHORT] in seen]:
        raise TrainingError(
            f"{known[0]}: the detector was trained on this image{_more(known)}, and scores such images lower than new "
            "ones; leave out training images"
        )
    digests = {contents[path][:SHORT]: path for path in good if contents[path]}
    if both := [path for path in defects if contents[path][:SHORT] in digests]:
        raise TrainingError(f"{both[0]}: is among the good images and among the defective ones; decide which it is")
    moved = suspected is not None
    known_already = counted(record, category) if append or moved else set()
    if known := [path for short, path in digests.items() if short in known_already]:
        raise TrainingError(
            f"{known[0]}: this image{_more(known)} calibrated the detector before and would count twice; leave out "
            f"such images, or {'take that back first with `unflaw undo`' if moved else 'calibrate without append'}"
        )
    found, missable, described = _scores(inspect, good, defects, skipped, options.minimum_area, progress)
    if not found.scores:
        raise TrainingError("; ".join(["there are no good images to calibrate with", *(why for _, why in skipped)]))
    strangest, suspects, warned = outliers(dict(zip(found.paths, found.scores, strict=True))), list[str](), list[str]()
    if suspected is not None:
        present = before
        before, suspects = move(present, found, suspected)
        warned = warnings(present, before, found)
    new = len(found.scores)
    if append or moved:
        found.merge(before)
    by_defects: dict[str, Any] = {"defects": missable, "miss_rate": miss_rate, "cost_ratio": cost_ratio}
    after = found.calibrate(options, rate=rate, out_of_fold=moved or (append and before.out_of_fold), **by_defects)
    if moved:
        after = after.model_copy(update={"median": before.median})
    if described and reference is not None:  # drift is measured against the new images
        described += list(reference.described) if append else []
        reference = Reference(np.random.default_rng(0).permutation(described))
    left_out = {path for path, _ in skipped}
    entry = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **({"category": category} if category else {}),
        "good": new,
        "defects": len(missable),
        "skipped": skipped,
        "kept": len(found.scores) - new,
        **({"commissioned": True, "suspects": suspects, "warnings": warned} if moved else {}),
        "digest": digest([path for part in paths for path in part], contents),
        "images": sorted(short for short, path in digests.items() if str(path) not in left_out),
        "threshold": after.threshold,
        "described": after.describe(),
        "numbers": after.numbers(),
        "strangest": strangest,
        "strangest_among": ALL,
    }
    history = list(record.get("calibrations", []))
    if history and history[-1] | {"when": ""} == entry | {
        "when": ""
    }:  # the same command again, such as after a power cut
        history.pop()
    return Recalibrated(after, reference, {**record, "calibrations": [*history, entry]})


def _scores(
    inspect: Callable[[Sequence[Input]], Iterable[Result | ImageError]],
    good: Sequence[Input],
    defects: Sequence[Input],
    skipped: list[list[str]],
    minimum_area: float,
    progress: Progress,
) -> tuple[CalibrationScores, list[float], list[np.ndarray]]:
    """Scores of good images, scores of defects, and statistics of good images; adds unreadable ones to `skipped`."""
    found, missable, described = CalibrationScores(minimum_area), list[float](), list[np.ndarray]()
    total = len(skipped) + len(good) + len(defects)
    for defective, part in enumerate((good, defects)):
        for path, outcome in zip(part, inspect(part), strict=True):
            if not isinstance(outcome, Result):
                skipped.append([str(path), str(outcome)])
            elif defective:
                missable.append(outcome.score)
            else:
                found.add(outcome.score, outcome.map, outcome.valid, outcome.uncertainty, outcome.counted)
                found.paths.append(str(path))
                described += [] if outcome.described is None else [outcome.described]
            progress("calibrating", len(found.scores) + len(missable) + len(skipped), total, None)
    return found, missable, described


def _more(known: Sequence[Input]) -> str:
    """Number of images beside the first, for a message; empty if there is none."""
    return f" and {len(known) - 1} more of the good images" if len(known) > 1 else ""


def counted(record: Mapping[str, Any], category: str) -> set[str]:
    """Short digests of the images that calibrate a category since training; with `append` they must not count twice.

    Args:
        record: `record_` of the detector. Images that calibrated it in training are in its "seen".
        category: Name; "" for a detector of a single category.
    """
    found: set[str] = set()
    for entry in record.get("calibrations", []):
        if entry.get("category", "") == category:
            found = (found if entry["kept"] else set()) | set(entry.get("images", []))
    return found
