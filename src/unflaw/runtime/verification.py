"""Comparison of an exported detector with the trained one, image by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from unflaw.errors import DetectorError, ImageError
from unflaw.inference.base import BasePredictor
from unflaw.io.progress import Progress, silent
from unflaw.io.words import count


@dataclass
class Comparison:
    """Largest relative differences between two detectors; `compare` defines them.

    Attributes:
        images: Number of images compared.
        score: Largest difference of scores, of the image `score_path`.
        map: Largest mean difference of a map, of the image `map_path`.
        cell: Largest difference at any place of a map.
        layers: Largest absolute difference at any place of "mean" and "uncertainty", which lie in [0, 1].
        verdicts: Images with another verdict, whose scores are not within the tolerance of a threshold.
        edge: Images with another verdict, whose scores are: rounding may change these.
        skipped: (path, reason) of images that could not be read.
    """

    images: int = 0
    score: float = 0.0
    score_path: str = ""
    map: float = 0.0
    map_path: str = ""
    cell: float = 0.0
    layers: dict[str, float] = field(default_factory=dict)
    verdicts: list[str] = field(default_factory=list)
    edge: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def agrees(self, tolerance: float) -> bool:
        """True if scores, maps and verdicts of all images agree, and there is at least one image."""
        return not self.faults(tolerance)

    def faults(self, tolerance: float) -> list[str]:
        """Reasons why the detectors do not agree, a clause each; empty if they do."""
        if not self.images:
            return ["no image could be read, so nothing was compared"]
        above = [name for name, largest in (("scores", self.score), ("maps", self.map)) if largest > tolerance]
        faults = [f"their {' and '.join(above)} differ by more than {tolerance:g}"] if above else []
        if self.verdicts:
            faults.append(f"they give {count(len(self.verdicts), 'image')} another verdict")
        return faults


def mismatch(trained: BasePredictor, exported: BasePredictor) -> str:
    """Reason why the exported detector cannot be made of the trained one as it is now; "" if there is none."""
    unrelated = "than the trained detector and was not made from it; export that one"
    if trained.config.preparation != exported.config.preparation:
        return f"prepares images otherwise {unrelated}"
    if list(trained.calibrations) != list(exported.calibrations):
        return f"has other categories {unrelated}"
    for (name, own), other in zip(trained.calibrations.items(), exported.calibrations.values(), strict=True):
        if own != other:
            of = f" for the category {name}" if name else ""
            return (
                f"is calibrated otherwise than the trained detector{of} (thresholds {other.threshold:.4g} and "
                f"{own.threshold:.4g}): one of them was calibrated again since, or they belong to different "
                "trainings; export the trained one again"
            )
    return ""


def compare(
    trained: BasePredictor,
    exported: BasePredictor,
    paths: Sequence[Path],
    *,
    category: str | None = None,
    tolerance: float = 1e-4,
    progress: Progress = silent,
) -> Comparison:
    """Inspect the same files with both detectors.

    The difference of scores a (exported) and b (trained) is |a − b| / max(|b|, σ), where σ is the standard deviation
    of the calibration scores: a score near 0 must not give an infinite difference. The difference of maps is the mean
    of |a − b| over the image, divided by the larger of max |b| and the span of the heat-map scale; `cell` uses the
    maximum of |a − b| instead of the mean. Single cells may differ by more than rounding: where two normal features
    are equally near, rounding decides which one a memory bank retrieves.

    Args:
        category: Category of the images, for detectors of several categories.
        tolerance: Relative distance to a threshold within which another verdict counts as rounding.

    Raises:
        DetectorError: The detectors do not belong together (see `mismatch`), or a category is missing.
    """
    if reason := mismatch(trained, exported):
        raise DetectorError(f"the exported detector {reason}")
    calibration = trained.select(category)
    deviation = max(float(np.std(calibration.scores)), 1e-12)
    scale = calibration.scale
    result = Comparison()
    for i, path in enumerate(paths):
        progress("comparing", i + 1, len(paths), None)
        try:
            b, a = (detector.inspect(path, category=category) for detector in (trained, exported))
        except ImageError as error:
            result.skipped.append((str(path), str(error)))
            continue
        result.images += 1
        score = _number(abs(a.score - b.score) / max(abs(b.score), deviation))
        if score >= result.score:
            result.score, result.score_path = score, str(path)
        x0, y0, x1, y1 = b.valid
        map_a, map_b = a.map[y0:y1, x0:x1], b.map[y0:y1, x0:x1]
        cells = np.abs(map_a - map_b) / max(float(np.abs(map_b).max()), scale.threshold - scale.low)
        if (mean := _number(cells.mean())) >= result.map:
            result.map, result.map_path = mean, str(path)
        result.cell = max(result.cell, _number(cells.max()))
        for name in b.layers.keys() & {"mean", "uncertainty"}:
            largest = _number(np.abs(a.layers[name] - b.layers[name]).max())
            result.layers[name] = max(result.layers.get(name, 0.0), largest)
        if a.verdict != b.verdict:
            at_edge = any(
                max(abs(a.score - edge), abs(b.score - edge)) <= tolerance * max(abs(edge), deviation)
                for edge in (calibration.threshold, calibration.review_threshold)
                if edge is not None
            )
            (result.edge if at_edge else result.verdicts).append(str(path))
    return result


def _number(difference: float | np.floating) -> float:
    """Return infinity for NaN, which would compare as no difference."""
    return float(difference) if np.isfinite(difference) else float("inf")
