"""Scores and maps of the good images that calibrate, before there are thresholds. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from unflaw.calibration import conformal
from unflaw.calibration.thresholds import Calibration, calibrate
from unflaw.config import CalibrationOptions
from unflaw.imaging.tiling import Box
from unflaw.postprocessing.regions import region_level


class CalibrationScores:
    """Out-of-sample scores of good images, used for calibration.

    Args:
        minimum_area: Smallest area of a region, as a share of the image.

    Attributes:
        scores: Image scores.
        paths: Paths of the images, as far as they are known.
        groups: Number of the group of each image, as far as there are groups.
        peaks: `region_level` of each anomaly map.
        medians: Median of each anomaly map.
        max_uncertainty: Largest value of each uncertainty map; empty if there are none.
    """

    def __init__(self, minimum_area: float = 0.0) -> None:
        self.minimum_area = minimum_area
        self.scores: list[float] = []
        self.paths: list[str] = []
        self.groups: list[int] = []
        self.peaks: list[float] = []
        self.medians: list[float] = []
        self.max_uncertainty: list[float] = []

    def add(
        self,
        score: float,
        anomaly_map: np.ndarray,
        valid: Box,
        uncertainty: np.ndarray | None = None,
        counted: np.ndarray | None = None,
    ) -> None:
        """Adds an image: its score, its maps (h, w), their box that it covers, and a mask (h, w) of what counts."""
        x0, y0, x1, y1 = valid
        inside = np.s_[y0:y1, x0:x1] if counted is None else counted
        self.scores.append(score)
        self.peaks.append(region_level(anomaly_map, valid, self.minimum_area, counted))
        self.medians.append(float(np.median(anomaly_map[inside])))
        if uncertainty is not None:
            self.max_uncertainty.append(float(uncertainty[inside].max()))

    def leave_out(self, numbers: Sequence[int]) -> None:
        """Removes images by their numbers, in the order in which they were added."""
        for name, values in vars(self).items():
            if isinstance(values, list):
                setattr(self, name, [value for i, value in enumerate(values) if i not in set(numbers)])

    def merge(self, before: Calibration) -> None:
        """Adds the scores of another calibration; call it after all images are added.

        Of its maps only thresholds are known, and the number of maps that may exceed them. Those get the highest value
        of all images here, so the rate of a new pixel threshold holds; a rate below that of `before` is approximate.
        """
        n = len(before.scores)
        above = min(conformal.rank(n, before.rate), n) - 1
        uncertain = min(conformal.rank(n, before.review_rate or before.rate), n) - 1
        self.scores += before.scores
        self.peaks += _merged_values(before.pixel_threshold, n, above, self.peaks)
        self.medians += [before.low] * n
        if before.uncertainty_threshold is not None:
            self.max_uncertainty += _merged_values(before.uncertainty_threshold, n, uncertain, self.max_uncertainty)

    def calibrate(self, options: CalibrationOptions, *, rate: float | None = None, **more: Any) -> Calibration:
        """Calls `calibrate` with the options, another rate if one is given, and further arguments.

        Of each group of images the highest values count.
        """
        numbers, images = self._groups(), len(self.scores)
        grouped = len(set(numbers)) < images
        found = calibrate(
            _highest(self.scores, numbers),
            _highest(self.peaks, numbers),
            float(np.median(self.medians)) if self.medians else 0.0,
            options.false_alarm_rate if rate is None else rate,
            review_rate=options.review_rate,
            max_uncertainty=_highest(self.max_uncertainty, numbers),
            review_uncertain=options.review_uncertain,
            minimum_area=self.minimum_area,
            extrapolate_tail=options.extrapolate_tail,
            **more,
        )
        return (
            found.model_copy(update={"images": images, "median": float(np.median(self.scores))}) if grouped else found
        )

    def _groups(self) -> list[int]:
        """Group of each score; what has none, such as scores of a calibration before, is a group of its own."""
        further = max(self.groups, default=-1) + 1
        return [*self.groups, *range(further, further + len(self.scores) - len(self.groups))]


def _highest(values: Sequence[float], groups: Sequence[int]) -> list[float]:
    """The highest value of each group, in the order in which groups appear."""
    found: dict[int, float] = {}
    for value, group in zip(values, groups, strict=False):  # not all maps have an uncertainty
        found[group] = max(value, found.get(group, -math.inf))
    return list(found.values())


def _merged_values(threshold: float, n: int, above: int, seen: Sequence[float]) -> list[float]:
    """n values: the threshold, and `above` times the highest value."""
    return [threshold] * (n - above) + [max([threshold, *seen])] * above
