"""An exported detector beside the one it was made of, image by image."""

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
    """What differs, and how much at most. A difference is relative to what the trained detector says, see `compare`.

    Attributes:
        images: How many were compared.
        score: Largest difference of scores, and `score_path` where.
        map: Largest mean difference of a map, and `map_path` where.
        cell: Largest difference at any place of a map.
        layers: By name, the largest difference at any place of "mean" and "uncertainty", which lie in [0, 1].
        verdicts: Images with another verdict although neither score is as near to a threshold as the tolerance.
        edge: Images with another verdict whose scores are: any rounding may turn these.
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
        """Scores, maps and verdicts of at least one image, and all of them."""
        return not self.faults(tolerance)

    def faults(self, tolerance: float) -> list[str]:
        """Why they do not agree, a clause for each reason; none where they do."""
        if not self.images:
            return ["no image could be read, so nothing was compared"]
        above = [name for name, largest in (("scores", self.score), ("maps", self.map)) if largest > tolerance]
        found = [f"their {' and '.join(above)} differ by more than {tolerance:g}"] if above else []
        if self.verdicts:
            found.append(f"they give {count(len(self.verdicts), 'image')} another verdict")
        return found


def mismatch(trained: BasePredictor, exported: BasePredictor) -> str:
    """Why one is not made of the other as it is now, so that comparing them says nothing; "" where it may be."""
    if trained.config.preparation != exported.config.preparation:
        return "prepares images otherwise than the trained detector and was not made from it; export that one"
    if list(trained.calibrations) != list(exported.calibrations):
        return "has other categories than the trained detector and was not made from it; export that one"
    for name, calibration in trained.calibrations.items():
        other = exported.calibrations[name]
        if calibration != other:
            of = f" for the category {name}" if name else ""
            return (
                f"is calibrated otherwise than the trained detector{of} (thresholds {other.threshold:.4g} and "
                f"{calibration.threshold:.4g}): one of them was calibrated again since, or they belong to different "
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
    """Inspects the same files with both.

    The difference of two scores a and b, b the trained detector's, is |a − b| / max(|b|, σ), σ the deviation of the
    scores that calibrated it: scores count in deviations from normal, and one near 0 must not count as infinitely far.
    That of two maps is the mean of |a − b| over the image, divided by the largest |b| or the span of the heat map's
    scale, whichever is larger; `cell` is the same of the largest |a − b|. Single cells may differ by more than
    rounding: where two normal features are equally near, rounding decides which of them a memory recalls.

    Args:
        category: For detectors of several.
        tolerance: How near to a threshold a score may be for its verdict not to count.

    Raises:
        DetectorError: They are not made for the same images or categories, or not calibrated alike; see `mismatch`.
            A category is missing.
    """
    if reason := mismatch(trained, exported):
        raise DetectorError(f"the exported detector {reason}")
    calibration = trained.select(category)
    deviation = max(float(np.std(calibration.scores)), 1e-12)
    scale = calibration.scale
    found = Comparison()
    for i, path in enumerate(paths):
        progress("comparing", i + 1, len(paths), None)
        try:
            before, after = (detector.inspect(path, category=category) for detector in (trained, exported))
        except ImageError as error:
            found.skipped.append((str(path), str(error)))
            continue
        found.images += 1
        score = _size(abs(after.score - before.score) / max(abs(before.score), deviation))
        if score >= found.score:
            found.score, found.score_path = score, str(path)
        x0, y0, x1, y1 = before.valid
        a, b = after.map[y0:y1, x0:x1], before.map[y0:y1, x0:x1]
        apart = np.abs(a - b) / max(float(np.abs(b).max()), scale.threshold - scale.low)
        if (mean := _size(apart.mean())) >= found.map:
            found.map, found.map_path = mean, str(path)
        found.cell = max(found.cell, _size(apart.max()))
        for name in before.layers.keys() & {"mean", "uncertainty"}:
            worst = _size(np.abs(after.layers[name] - before.layers[name]).max())
            found.layers[name] = max(found.layers.get(name, 0.0), worst)
        if after.verdict != before.verdict:
            at_edge = any(
                max(abs(result.score - edge) for result in (before, after)) <= tolerance * max(abs(edge), deviation)
                for edge in (calibration.threshold, calibration.review_threshold)
                if edge is not None
            )
            (found.edge if at_edge else found.verdicts).append(str(path))
    return found


def _size(difference: float | np.floating) -> float:
    """What is no number differs without bound."""
    return float(difference) if np.isfinite(difference) else float("inf")
