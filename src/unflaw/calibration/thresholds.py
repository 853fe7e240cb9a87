"""From good images to decisions: thresholds, p-value, verdict, heat-map scale. No torch: every runtime shares it."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from unflaw.calibration import conformal
from unflaw.config import CalibrationOptions
from unflaw.imaging.tiling import Box
from unflaw.io.brief import brief
from unflaw.io.words import count
from unflaw.postprocessing.regions import region_level
from unflaw.postprocessing.results import Region, Scale, Verdict


@brief
class Calibration(BaseModel):
    """What good images outside of training say about scores and maps.

    A good image, exchangeable with those, gets `p_value(score) <= rate` with probability at most `rate` (split
    conformal prediction, valid for every n). The smallest rate that n images can certify is 1 / (n + 1).

    Attributes:
        scores: Their image scores, ascending.
        asked_rate: The false-alarm rate asked for.
        rate: The rate that `threshold` certifies: at most the asked one, or the smallest that n images can certify.
            Below that only as an estimate, where there is a `tail`.
        threshold: Images that score above it are called defective.
        pixel_threshold: The same rule over the map of each image: at most a share `rate` of good images, or the
            smallest that is certified, shows any region.
        low: Median of the maps' values, the zero of the heat-map scale.
        defects: Scores of labelled defects, ascending, where they set the threshold.
        miss_rate: The share of defects like those that `threshold` misses: certified where it was asked for, else None.
        review_rate: The share of good images, certified, that are called anything but good; None: no review.
        review_threshold: Images that score above it, and not above `threshold`, are for review.
        uncertainty_threshold: A region is dominated by uncertainty where that is higher on average. At most the share
            of good images that review was asked for has any such value; where no review was asked for (a rate of 0),
            at most the false-alarm rate asked for. None: there is no map.
        review_uncertain: Defects whose first region is so are for review.
        minimum_area: Smaller areas are no regions, share of the image.
        tail: Of the scores, where rates below the smallest certified one are estimated.
        out_of_fold: Each score is out of fold or leave-one-out, but the detector learned from all images. Rates are
            about so; `crossfit` states what is proved.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    scores: tuple[float, ...] = Field(min_length=1)
    asked_rate: float
    rate: float
    threshold: float
    pixel_threshold: float
    low: float
    defects: tuple[float, ...] = ()
    miss_rate: float | None = None
    review_rate: float | None = None
    review_threshold: float | None = None
    uncertainty_threshold: float | None = None
    review_uncertain: bool = False
    minimum_area: float = 0.0
    tail: conformal.Tail | None = None
    out_of_fold: bool = False

    @property
    def scale(self) -> Scale:
        return Scale(self.low, self.pixel_threshold)

    @property
    def certified(self) -> bool:
        """True where the good images prove the false-alarm rate that was asked for.

        A threshold that labelled defects set follows from them: its false-alarm rate is measured, not certified.
        """
        return self.rate <= self.asked_rate and not (self.estimated or self.out_of_fold or self.defects)

    @property
    def estimated(self) -> bool:
        """Whether `threshold` is one that the tail estimates."""
        return self.tail is not None and self.rate < self.smallest

    @property
    def smallest(self) -> float:
        """The smallest rate that is certified, 1 / (n + 1)."""
        return 1 / (len(self.scores) + 1)

    def p_value(self, score: float) -> float:
        """(1 + number of calibration scores ≥ score) / (n + 1), in [1 / (n + 1), 1]."""
        return conformal.p_value(self.scores, score)

    @property
    def smallest_p_value(self) -> float:
        """The smallest p-value that an image can have: `smallest`, or as far below it as the tail is trusted."""
        return self.smallest / conformal.REACH if self.estimated else self.smallest

    def estimated_p_value(self, score: float) -> float | None:
        """The tail's p-value of a score beyond all calibration scores; elsewhere `p_value`. None without a tail.

        It is at least `smallest` / `conformal.REACH`: the tail is not trusted further.
        """
        if self.tail is None:
            return None
        found = self.p_value(score)
        if found > self.smallest:
            return found
        return min(found, max(self.tail.p_value(score), self.smallest / conformal.REACH))

    def verdict(self, score: float, regions: Sequence[Region] = ()) -> Verdict:
        """ "good" up to `review_threshold`, "defect" above `threshold`, and "review" between.

        With `review_uncertain`, a defect is for review as well where the uncertainty map dominates its first region.
        That takes verdicts away from "defect" and none from "good": both rates hold.
        """
        if score > self.threshold:
            doubt = regions[0].uncertainty if self.review_uncertain and regions else None
            limit = self.uncertainty_threshold
            return "defect" if doubt is None or limit is None or doubt <= limit else "review"
        return "review" if self.review_threshold is not None and score > self.review_threshold else "good"

    def describe(self) -> str:
        """One sentence for people."""
        review = "" if self.review_rate is None else f"; with those for review {self.review_rate:.2%}"
        return self._promise() + review

    def numbers(self) -> dict[str, Any]:
        """The numbers behind `describe`, for JSON.

        Returns:
            "asked_rate": the false-alarm rate asked for; None where labelled defects set the threshold.
            "rate": the false-alarm rate of the threshold.
            "n": how many good images these rates come from.
            "certified": whether the good images prove the rate asked for.
            "smallest_rate": 1 / (n + 1), the smallest rate that n good images can certify.
            "estimated", "out_of_fold": why a rate may not be certified: it is estimated from a tail of the scores, or
                the detector has learned from the good images as well.
            "review_rate": the share of good images called anything but good; None: no review.
            "miss_rate": the share of defects missed, certified by `n_defects` labelled ones; None: not asked for.
            "n_defects": how many labelled defects set the threshold.
        """
        return {
            "asked_rate": None if self.defects else self.asked_rate,
            "rate": self.rate,
            "n": len(self.scores),
            "certified": self.certified,
            "smallest_rate": self.smallest,
            "estimated": self.estimated,
            "out_of_fold": self.out_of_fold,
            "review_rate": self.review_rate,
            "miss_rate": self.miss_rate,
            "n_defects": len(self.defects),
        }

    def reach(self) -> str:
        """One sentence on what so many images can certify."""
        found = conformal.certifiable(len(self.scores))
        words = "give about" if self.out_of_fold else "could certify" if self.defects else "certify"
        more = ", ".join(f"{rate:.2%} takes {conformal.needed(rate)}" for rate in (0.01, 0.001) if rate < found.rate)
        good = count(found.n, "good image")
        return (
            f"{good} {words} {found.rate:.2%} at best, on average over calibrations; 95 of 100 "
            f"calibrations stay below {found.unlucky:.2%}" + (f"; {more}" if more else "")
        )

    def _promise(self) -> str:
        n = len(self.scores)
        if self.defects:
            found = sum(score > self.threshold for score in self.defects)
            by = (
                f"miss rate {self.miss_rate:.2%} or less, certified"
                if self.miss_rate
                else "threshold of least cost, set"
            )
            are = "is" if found == 1 else "are"
            return (
                f"{by} by {count(len(self.defects), 'labelled defect')}, of which {found} {are} found; "
                f"false-alarm rate about {self.rate:.2%}, from {count(n, 'good image')}"
            )
        images = f"{count(n, 'good image')} " + (
            "judged without what they taught" if self.out_of_fold else "outside of training"
        )
        if self.certified:
            return f"false-alarm rate {self.rate:.2%} or less, certified by {images}"
        promise = "give a false-alarm rate of about" if self.out_of_fold else "certify a false-alarm rate of"
        reach = f"{images} {promise} {self.smallest:.2%}"
        if self.estimated and self.tail is not None:
            fit = f"goodness of fit p = {self.tail.goodness:.2g}"
            return f"false-alarm rate {self.rate:.2%}, estimated from the tail of the scores ({fit}); {reach}"
        if self.rate <= self.asked_rate:
            return f"false-alarm rate about {self.rate:.2%}, from {images}"
        return f"{reach}, not the {self.asked_rate:.2%} asked for; {conformal.needed(self.asked_rate)} would"


class CalibrationScores:
    """What good images outside of training show, gathered one by one.

    Args:
        minimum_area: Of a region, share of the image.

    Attributes:
        scores: Of the images.
        paths: Of the images, as far as they are known.
        peaks: The `region_level` of their maps.
        medians: Of their maps.
        doubts: The largest values of their uncertainty maps, where there are some.
    """

    def __init__(self, minimum_area: float = 0.0) -> None:
        self.minimum_area = minimum_area
        self.scores: list[float] = []
        self.paths: list[str] = []
        self.peaks: list[float] = []
        self.medians: list[float] = []
        self.doubts: list[float] = []

    def add(
        self,
        score: float,
        anomaly_map: np.ndarray,
        valid: Box,
        uncertainty: np.ndarray | None = None,
        counted: np.ndarray | None = None,
    ) -> None:
        """One image: its score, its maps (h, w), the part of them that it covers, and what counts of that (h, w)."""
        x0, y0, x1, y1 = valid
        inside = np.s_[y0:y1, x0:x1] if counted is None else counted
        self.scores.append(score)
        self.peaks.append(region_level(anomaly_map, valid, self.minimum_area, counted))
        self.medians.append(float(np.median(anomaly_map[inside])))
        if uncertainty is not None:
            self.doubts.append(float(uncertainty[inside].max()))

    def keep(self, before: Calibration) -> None:
        """Counts the images of another calibration too, after all others.

        Of their maps only thresholds are known, and how many may exceed them: these count with the highest value seen.
        So the rate of a new pixel threshold holds, unless it is smaller than that of the old one: then about.
        """
        n = len(before.scores)
        above = min(conformal.rank(n, before.rate), n) - 1
        doubtful = min(conformal.rank(n, before.review_rate or before.rate), n) - 1
        self.scores += before.scores
        self.peaks += _kept(before.pixel_threshold, n, above, self.peaks)
        self.medians += [before.low] * n
        if before.uncertainty_threshold is not None:
            self.doubts += _kept(before.uncertainty_threshold, n, doubtful, self.doubts)

    def calibrate(self, options: CalibrationOptions, *, rate: float | None = None, **more: Any) -> Calibration:
        """`calibrate` as the options say, for another rate where one is given; what is more is passed on."""
        return calibrate(
            self.scores,
            self.peaks,
            float(np.median(self.medians)) if self.medians else 0.0,
            options.false_alarm_rate if rate is None else rate,
            review_rate=options.review_rate,
            doubts=self.doubts,
            review_uncertain=options.review_uncertain,
            minimum_area=self.minimum_area,
            extrapolate_tail=options.extrapolate_tail,
            **more,
        )


def _kept(threshold: float, n: int, above: int, seen: Sequence[float]) -> list[float]:
    """n values of which so many exceed a threshold."""
    return [threshold] * (n - above) + [max([threshold, *seen])] * above


def calibrations(metadata: Mapping[str, Any]) -> dict[str, Calibration]:
    """Of every category, from the metadata of a detector file; "" is the category of a detector that has no others.

    Raises:
        ValueError: There are none, or they are damaged.
    """
    if not (metadata.get("categories") or "calibration" in metadata):
        raise ValueError("it has no calibration")
    found = metadata.get("categories") or {"": metadata["calibration"]}
    return TypeAdapter(dict[str, Calibration]).validate_python(found)


def calibrate(
    scores: Sequence[float],
    peaks: Sequence[float],
    low: float,
    rate: float = 0.01,
    *,
    review_rate: float = 0.0,
    doubts: Sequence[float] = (),
    review_uncertain: bool = False,
    minimum_area: float = 0.0,
    extrapolate_tail: bool = False,
    out_of_fold: bool = False,
    defects: Sequence[float] = (),
    miss_rate: float | None = None,
    cost_ratio: float | None = None,
) -> Calibration:
    """Calibrates on good images that training did not see and, where there are any, labelled defects.

    Without `miss_rate` and `cost_ratio` the threshold is that of `rate`. With one of them defects set it, and the
    false-alarm rate follows: (1 + number of good scores above the threshold) / (n + 1), at least 1 / (n + 1).

    Args:
        scores: Image scores of good images.
        peaks: For each of them, the least pixel threshold at which it shows no region (`scoring.region_level`).
        low: Median of the map values.
        rate: False-alarm rate asked for, in (0, 1).
        review_rate: Share of good images that may be called anything but good, in [0, 1); where the rate that it
            certifies is not above that of alarms, there is no review.
        doubts: For each of the good images, the largest value of the uncertainty map; empty where there is none.
        review_uncertain: Whether that has a say in verdicts.
        minimum_area: Of a region, share of the image: the one that `peaks` were found with.
        extrapolate_tail: Estimate the threshold where n images cannot certify the rate, down to a tenth of
            1 / (n + 1). It is never below the highest score. Fewer than 40 images have no tail.
        out_of_fold: Each score was found without what was learned from its image.
        defects: Image scores of defective images.
        miss_rate: Share of defects that may be missed, in (0, 1): a defect exchangeable with those given is missed with
            at most this probability (split conformal prediction, for every number of them).
        cost_ratio: What a missed defect costs, a false alarm costing 1: the threshold with the least sum of the share
            of good images above it and `cost_ratio` times the share of defects not above it. Nothing is certified.

    Raises:
        ValueError: No scores, scores that are not finite, or too few defects for the miss rate.
    """
    if not scores or not all(map(math.isfinite, [*scores, *peaks, *doubts])):
        raise ValueError("calibration needs finite scores of at least one good image outside of training")
    if not all(map(math.isfinite, defects)):
        raise ValueError("scores of defects must be finite")
    by_defects = miss_rate is not None or cost_ratio is not None
    if by_defects and not defects:
        raise ValueError("a miss rate and a cost ratio need labelled defects")
    n, good = len(scores), sorted(scores)
    k, asked, found = conformal.rank(n, rate), rate, None
    threshold, certified, promised = good[-k], k / (n + 1), None
    if by_defects:
        threshold, promised = _by_defects(good, sorted(defects), miss_rate, cost_ratio)
        k = 1 + n - bisect.bisect_right(good, threshold)
        certified = asked = k / (n + 1)
    elif extrapolate_tail and asked < certified and (found := conformal.fit_tail(good)):
        certified = max(asked, certified / conformal.REACH)
        threshold = max(threshold, found.threshold(certified))
    reviewed = conformal.rank(n, review_rate)
    band = reviewed > k and good[-reviewed] < threshold
    doubtful = reviewed if review_rate else min(k, conformal.rank(n, rate))
    return Calibration(
        scores=tuple(good),
        asked_rate=asked,
        rate=certified,
        threshold=threshold,
        pixel_threshold=sorted(peaks)[-min(k, n)],
        low=low,
        defects=tuple(sorted(defects)) if by_defects else (),
        miss_rate=promised,
        review_rate=reviewed / (n + 1) if band else None,
        review_threshold=good[-reviewed] if band else None,
        uncertainty_threshold=sorted(doubts)[-min(doubtful, len(doubts))] if doubts else None,
        review_uncertain=review_uncertain,
        minimum_area=minimum_area,
        tail=found,
        out_of_fold=out_of_fold,
    )


def _by_defects(
    good: list[float], bad: list[float], miss_rate: float | None, cost_ratio: float | None
) -> tuple[float, float | None]:
    """The threshold that labelled defects set, and the miss rate it certifies, if that was asked for."""
    if miss_rate is not None:
        # missed ⇔ below the j-th smallest score of defects, j = ⌊miss_rate·(m + 1)⌋
        j = math.floor(miss_rate * (len(bad) + 1) + 1e-9)
        if j < 1:
            need = conformal.needed(miss_rate)
            raise ValueError(f"{count(len(bad), 'defect')} cannot certify a miss rate of {miss_rate:.2%}; {need} would")
        return math.nextafter(bad[j - 1], -math.inf), j / (len(bad) + 1)
    assert cost_ratio is not None
    candidates = [math.nextafter(bad[0], -math.inf), *sorted({*good, *bad})]

    def cost(t: float) -> float:
        alarms = (len(good) - bisect.bisect_right(good, t)) / len(good)
        return alarms + cost_ratio * bisect.bisect_right(bad, t) / len(bad)

    return max(candidates, key=lambda t: (-cost(t), t)), None
