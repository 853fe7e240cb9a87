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
        defects: Scores of labelled defects, ascending, where they set the threshold.
        miss_rate: The share of defects like those that `threshold` misses: certified where it was asked for, else None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    scores: tuple[float, ...]
    asked_rate: float
    rate: float
    threshold: float
    pixel_threshold: float
    low: float
    defects: tuple[float, ...] = ()
    miss_rate: float | None = None

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
        if self.defects:
            found = sum(score > self.threshold for score in self.defects)
            by = (
                f"miss rate {self.miss_rate:.2%} or less, certified"
                if self.miss_rate
                else "threshold of least cost, set"
            )
            return (
                f"{by} by {len(self.defects)} labelled defects, of which {found} are found; false-alarm rate about "
                f"{self.rate:.2%}, from {n} good pictures"
            )
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


def calibrate(
    scores: Sequence[float],
    peaks: Sequence[float],
    low: float,
    rate: float = 0.01,
    *,
    defects: Sequence[float] = (),
    miss_rate: float | None = None,
    cost_ratio: float | None = None,
) -> Calibration:
    """Calibrates on good pictures that training did not see and, where there are any, labelled defects.

    Without `miss_rate` and `cost_ratio` the threshold is that of `rate`. With one of them defects set it, and the
    false-alarm rate follows: (1 + number of good scores above the threshold) / (n + 1), at least 1 / (n + 1).

    Args:
        scores: Image scores of good pictures.
        peaks: Largest map value of each of them.
        low: Median of the map values.
        rate: False-alarm rate asked for, in (0, 1).
        defects: Image scores of defective pictures.
        miss_rate: Share of defects that may be missed, in (0, 1): a defect exchangeable with those given is missed with
            at most this probability (split conformal prediction, for every number of them).
        cost_ratio: What a missed defect costs, a false alarm costing 1: the threshold with the least sum of the share
            of good pictures above it and `cost_ratio` times the share of defects not above it. Nothing is certified.

    Raises:
        ValueError: No scores, scores that are not finite, or too few defects for the miss rate.
    """
    if not scores or not all(map(math.isfinite, [*scores, *peaks])):
        raise ValueError("calibration needs finite scores of at least one good picture outside of training")
    if not all(map(math.isfinite, defects)):
        raise ValueError("scores of defects must be finite")
    n = len(scores)
    good, bad = sorted(scores), sorted(defects)
    # p ≤ rate  ⇔  #{s_i ≥ s} ≤ rate·(n + 1) − 1  ⇔  s above the k-th largest score, k = ⌊rate·(n + 1)⌋
    k = max(1, math.floor(rate * (n + 1) + 1e-9))
    threshold, promised = good[-k], None
    by_defects = miss_rate is not None or cost_ratio is not None
    if by_defects and not bad:
        raise ValueError("a miss rate and a cost ratio need labelled defects")
    if miss_rate is not None:
        # missed ⇔ below the j-th smallest score of defects, j = ⌊miss_rate·(m + 1)⌋
        j = math.floor(miss_rate * (len(bad) + 1) + 1e-9)
        if j < 1:
            need = math.ceil(1 / miss_rate) - 1
            raise ValueError(f"{len(bad)} defects cannot certify a miss rate of {miss_rate:.2%}; {need} would")
        threshold, promised = math.nextafter(bad[j - 1], -math.inf), j / (len(bad) + 1)
    elif cost_ratio is not None:
        candidates = [math.nextafter(bad[0], -math.inf), *sorted({*good, *bad})]

        def cost(t: float) -> float:
            return (n - bisect.bisect_right(good, t)) / n + cost_ratio * bisect.bisect_right(bad, t) / len(bad)

        threshold = max((t for t in candidates), key=lambda t: (-cost(t), t))
    if by_defects:
        k = 1 + n - bisect.bisect_right(good, threshold)
        rate = k / (n + 1)
    return Calibration(
        scores=tuple(good),
        asked_rate=rate,
        rate=k / (n + 1),
        threshold=threshold,
        pixel_threshold=sorted(peaks)[-min(k, n)],
        low=low,
        defects=tuple(bad) if by_defects else (),
        miss_rate=promised,
    )
