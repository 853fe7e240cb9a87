"""From good pictures to decisions: threshold, p-value, heat-map scale. NumPy only, so that every runtime shares it."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

from unflaw.results import Scale, Verdict


class Calibration(BaseModel):
    """What good pictures outside of training say about scores and maps.

    A good picture, exchangeable with those, gets `p_value(score) <= rate` with probability at most `rate` (split
    conformal prediction, valid for every n). The smallest rate that n pictures can certify is 1 / (n + 1).

    Attributes:
        scores: Their image scores, ascending.
        asked_rate: The false-alarm rate asked for.
        rate: The rate that `threshold` certifies: at most the asked one, or the smallest that n pictures can certify.
        threshold: Pictures that score above it are called defective.
        pixel_threshold: The same rule over the largest map value of each picture: at most a share `rate` of good
            pictures shows any region.
        low: Median of the maps' values, the zero of the heat-map scale.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    scores: tuple[float, ...]
    asked_rate: float
    rate: float
    threshold: float
    pixel_threshold: float
    low: float

    @property
    def scale(self) -> Scale:
        return Scale(self.low, self.pixel_threshold)

    @property
    def certified(self) -> bool:
        return self.rate <= self.asked_rate

    def p_value(self, score: float) -> float:
        """(1 + number of calibration scores ≥ score) / (n + 1), in [1 / (n + 1), 1]."""
        n = len(self.scores)
        return (1 + n - bisect.bisect_left(self.scores, score)) / (n + 1)

    def verdict(self, score: float) -> Verdict:
        return "defect" if score > self.threshold else "good"

    def describe(self) -> str:
        """One sentence for people."""
        n = len(self.scores)
        if self.certified:
            return f"false-alarm rate {self.rate:.2%} or less, certified by {n} good pictures outside of training"
        need = math.ceil(1 / self.asked_rate) - 1
        return (
            f"{n} good pictures outside of training certify a false-alarm rate of {self.rate:.2%}, not the "
            f"{self.asked_rate:.2%} asked for; {need} would"
        )


def calibrations(metadata: Mapping[str, Any]) -> dict[str, Calibration]:
    """Of every category, from the metadata of a detector file; "" is the category of a detector that has no others.

    Raises:
        KeyError, ValueError: There are none, or they are damaged.
    """
    found = metadata.get("categories") or {"": metadata["calibration"]}
    return TypeAdapter(dict[str, Calibration]).validate_python(found)


def calibrate(scores: Sequence[float], peaks: Sequence[float], low: float, rate: float = 0.01) -> Calibration:
    """Calibrates on good pictures that training did not see.

    Args:
        scores: Image scores, one per picture.
        peaks: Largest map value, one per picture.
        low: Median of the map values.
        rate: False-alarm rate asked for, in (0, 1).

    Raises:
        ValueError: No scores, or scores that are not finite.
    """
    if not scores or not all(map(math.isfinite, [*scores, *peaks])):
        raise ValueError("calibration needs finite scores of at least one good picture outside of training")
    n = len(scores)
    # p ≤ rate  ⇔  #{s_i ≥ s} ≤ rate·(n + 1) − 1  ⇔  s above the k-th largest score, k = ⌊rate·(n + 1)⌋
    k = max(1, math.floor(rate * (n + 1) + 1e-9))
    return Calibration(
        scores=tuple(sorted(scores)),
        asked_rate=rate,
        rate=k / (n + 1),
        threshold=sorted(scores)[-k],
        pixel_threshold=sorted(peaks)[-k],
        low=low,
    )
