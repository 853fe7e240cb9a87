"""From good images to decisions: thresholds, p-value, verdict, heat-map scale. No torch: every runtime shares it."""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from unflaw.calibration import conformal
from unflaw.io.brief import brief
from unflaw.io.words import count
from unflaw.postprocessing.results import Region, Scale, Verdict

CONTRADICTION = 0.005  # chance of the false alarms of an evaluation below which they contradict the promise


@brief
class Calibration(BaseModel):
    """Thresholds and p-values from the scores and maps of good images outside of training.

    A good image, exchangeable with the calibration images, gets `p_value(score) <= rate` with probability at most
    `rate` (split conformal prediction, valid for every n). The smallest rate that n images can certify is 1 / (n + 1).

    Attributes:
        scores: Image scores of the calibration images, ascending; of images in groups the highest of each group.
        asked_rate: Requested false-alarm rate.
        rate: False-alarm rate of `threshold`: at most the requested one, or the smallest that n images can certify.
            It is smaller than that only as an estimate from `tail`.
        threshold: Images that score above it are defective. The reserve is part of it.
        median: Median score of the images, where `scores` are the highest of groups or of two sessions; None: that of
            `scores`.
        reserve: What was added to the threshold that the images give, in units of the score: an estimate for other
            sessions, see `reserve`. Images that score in between are for review, if there is review.
        pixel_threshold: Threshold of the anomaly map. At most a share `rate` of good images, or the smallest certified
            share, shows any region above it.
        low: Median of the map values, the zero of the heat-map scale.
        defects: Scores of the labelled defects that set the threshold, ascending.
        miss_rate: Certified share of such defects that `threshold` misses; None: not requested.
        review_rate: Certified share of good images that are not called good; None: no review.
        review_threshold: Images that score above it, up to `threshold`, are for review.
        uncertainty_threshold: A region with a higher mean uncertainty is dominated by it. The share of good images
            with any higher value is at most the requested review rate, or false-alarm rate if there is no review.
            None: the method has no uncertainty map.
        review_uncertain: True: a defect whose first region is dominated by uncertainty is for review.
        minimum_area: Smallest area of a region, as a share of the image.
        tail: Fitted tail of the scores, which estimates rates below the smallest certified one.
        out_of_fold: True: scores are out of fold or leave-one-out, but the detector learned from all images. Rates are
            then approximate; see `crossfit` for what is proved.
        images: Number of images in the groups; None: each image stands for itself. p-values and rates count groups: at
            most the stated share of groups has any such image, and so of images of new groups.
        by_hand: True: a person has set `threshold`; `rate` is then what follows, not what was asked for.
        review_only: True: there are too few images to call anything defective; what scores above `threshold` is for
            review.
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
    images: int | None = None
    median: float | None = None
    reserve: float = 0.0
    by_hand: bool = False
    review_only: bool = False

    @property
    def scale(self) -> Scale:
        return Scale(self.low, self.pixel_threshold)

    @property
    def certified(self) -> bool:
        """True if the good images certify the requested false-alarm rate.

        The rate of a threshold that labelled defects set is measured, not certified.
        """
        return self.rate <= self.asked_rate and not (self.estimated or self.out_of_fold or self.defects or self.by_hand)

    @property
    def estimated(self) -> bool:
        """True if `threshold` is estimated from the tail."""
        return self.tail is not None and self.rate < self.smallest

    @property
    def centre(self) -> float:
        """Median score of the images that calibrate."""
        return statistics.median(self.scores) if self.median is None else self.median

    @property
    def smallest(self) -> float:
        """Smallest rate that n images can certify, 1 / (n + 1)."""
        return 1 / (len(self.scores) + 1)

    def p_value(self, score: float) -> float:
        """(1 + number of calibration scores ≥ score) / (n + 1), in [1 / (n + 1), 1]."""
        return conformal.p_value(self.scores, score)

    @property
    def smallest_p_value(self) -> float:
        """Smallest possible p-value of an image: `smallest`, or with a tail `smallest` / `MAX_EXTRAPOLATION`."""
        return self.smallest / conformal.MAX_EXTRAPOLATION if self.estimated else self.smallest

    def estimated_p_value(self, score: float) -> float | None:
        """`p_value`, or for a score above all calibration scores the tail's estimate; None without a tail.

        The estimate is at least `smallest` / `conformal.MAX_EXTRAPOLATION`.
        """
        if self.tail is None:
            return None
        found = self.p_value(score)
        if found > self.smallest:
            return found
        return min(found, max(self.tail.p_value(score), self.smallest / conformal.MAX_EXTRAPOLATION))

    def verdict(self, score: float, regions: Sequence[Region] = ()) -> Verdict:
        """ "good" up to `review_threshold`, "defect" above `threshold`, and "review" between.

        With `review_uncertain`, a defect whose first region is dominated by uncertainty is for review, too. That only
        moves verdicts from "defect" to "review", so both rates still hold.
        """
        if score > self.threshold and not self.review_only:
            uncertainty = regions[0].uncertainty if self.review_uncertain and regions else None
            limit = self.uncertainty_threshold
            return "defect" if uncertainty is None or limit is None or uncertainty <= limit else "review"
        limit = self.threshold if self.review_only or self.review_threshold is None else self.review_threshold
        return "review" if score > limit else "good"

    def at(self, threshold: float) -> Calibration:
        """This calibration with a threshold that a person has chosen, without reserve; its rate is what follows.

        Raises:
            ValueError: The threshold is not finite.
        """
        if not math.isfinite(threshold):
            raise ValueError(f"a threshold is a score, such as {self.threshold:.4g}, not {threshold:g}")
        n = len(self.scores)
        k = 1 + n - bisect.bisect_right(self.scores, threshold)
        review = self.review_threshold if self.review_threshold is None else min(self.review_threshold, threshold)
        band = review is not None and review < threshold
        changed: dict[str, Any] = {
            "threshold": threshold,
            "rate": min(k, n) / (n + 1),
            "by_hand": True,
            "asked_rate": min(k, n) / (n + 1),
            "reserve": 0.0,
            "tail": None,
            "defects": (),
            "miss_rate": None,
            "review_threshold": review if band else None,
            "review_rate": self.review_rate if band else None,
        }
        return self.model_copy(update=changed)

    def describe(self) -> str:
        """Describes the rates in one sentence."""
        review = "" if self.review_rate is None else f"; with those for review {self.review_rate:.2%}"
        return self._guarantee() + review + self._reserved()

    def check(self, alarms: int, images: int) -> tuple[float, str]:
        """Compares false alarms among other good images with the promised rate.

        Args:
            alarms: Number of good images called defective.
            images: Number of good images.

        Returns:
            The probability of so many alarms or more if the promise holds for these images, and a sentence.
        """
        chance = conformal.chance_of_alarms(alarms, images, len(self.scores), self.rate)
        seen = f"{alarms} of {count(images, 'good image')} called defective, {self.rate:.2%} promised"
        if chance >= CONTRADICTION:
            return chance, f"promise kept: {seen}" + ("" if alarms else ", none seen")
        return chance, (
            f"PROMISE BROKEN: {seen} (p = {chance:.1g}): these images are not like those that calibrated; "
            f"`unflaw commission MODEL DIR` with good images like these sets the threshold anew"
        )

    def numbers(self) -> dict[str, Any]:
        """The numbers behind `describe`, for JSON.

        Returns:
            "asked_rate", None if labelled defects set the threshold; "n", the number of good images; "n_defects", the
            number of labelled defects that set the threshold; "smallest_rate", 1 / (n + 1); "n_images", the number of
            images if "n" counts groups of them; and the attributes and properties
            "rate", "certified", "estimated", "out_of_fold", "review_rate", "review_only" and "miss_rate".
        """
        return {
            "asked_rate": None if self.defects or self.by_hand else self.asked_rate,
            "rate": self.rate,
            "n": len(self.scores),
            "n_images": self.images,
            "certified": self.certified,
            "smallest_rate": self.smallest,
            "estimated": self.estimated,
            "out_of_fold": self.out_of_fold,
            "review_rate": self.review_rate,
            "miss_rate": self.miss_rate,
            "n_defects": len(self.defects),
            "review_only": self.review_only,
            "by_hand": self.by_hand,
            "reserve": self.reserve,
        }

    def advise(self, model: str) -> str:
        """Command that makes the promise better, with what it needs; empty if the asked rate is certified.

        Args:
            model: Detector file, for the command.
        """
        if self.certified or self.defects or self.by_hand:
            return ""
        more = max(conformal.needed(self.asked_rate), 30)
        return (
            f"for a certified rate: `unflaw calibrate {model} --good DIR` with {more} good images of other days, which "
            "it was not trained on"
        )

    def describe_achievable_rate(self) -> str:
        """Describes in one sentence the smallest rate that this number of images can certify."""
        found = conformal.certifiable(len(self.scores))
        words = "give about" if self.out_of_fold else "could certify" if self.defects else "certify"
        more = ", ".join(f"{rate:.2%} takes {conformal.needed(rate)}" for rate in (0.01, 0.001) if rate < found.rate)
        good = self._counted("good image")
        return (
            f"{good} {words} {found.rate:.2%} at best, on average over calibrations; 95 of 100 "
            f"calibrations stay below {found.unlucky:.2%}" + (f"; {more}" if more else "")
        )

    def _reserved(self) -> str:
        """The part of `describe` on the reserve; empty if there is none."""
        if not self.reserve:
            return ""
        between = "" if self.review_threshold is None else "; scores within it are for review"
        return (
            f". The threshold has an estimated reserve of {self.reserve:.3g} for light, focus and noise of other days"
            f"{between}"
        )

    def _counted(self, image: str) -> str:
        """How many images calibrate: "12 good images", or "12 groups of 60 good images"."""
        n = len(self.scores)
        return count(n, image) if self.images is None else f"{count(n, 'group')} of {count(self.images, image)}"

    def _guarantee(self) -> str:
        n = len(self.scores)
        if self.review_only:
            need = conformal.needed(self.asked_rate)
            return (
                f"{count(n, 'good image')}: too few to call anything defective, so what is unlike "
                f"{'it' if n == 1 else 'them'} is for review; `unflaw calibrate` with other good images gives "
                f"verdicts, with {need} of them at a false-alarm rate of {self.asked_rate:.2%}"
            )
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
                f"false-alarm rate about {self.rate:.2%}, from {self._counted('good image')}"
            )
        images = self._counted("cross-validated good image" if self.out_of_fold else "good image")
        images += "" if self.out_of_fold else " outside of training"
        if self.certified:
            return f"false-alarm rate {self.rate:.2%} or less, certified by {images}"
        verb = "give a false-alarm rate of about" if self.out_of_fold else "certify a false-alarm rate of"
        smallest = f"{images} {verb} {self.smallest:.2%}"
        if self.estimated and self.tail is not None:
            fit = f"goodness of fit p = {self.tail.goodness:.2g}"
            return f"false-alarm rate {self.rate:.2%}, estimated from the tail of the scores ({fit}); {smallest}"
        if self.rate <= self.asked_rate:
            by_hand = "threshold set by hand: " if self.by_hand else ""
            about = "at most about" if self.by_hand and self.threshold >= self.scores[-1] else "about"
            return f"{by_hand}false-alarm rate {about} {self.rate:.2%}, from {images}"
        would = f"{conformal.needed(self.asked_rate)} {'' if self.images is None else 'groups '}would"
        return f"{smallest}, not the {self.asked_rate:.2%} asked for; {would}"


def calibrations(metadata: Mapping[str, Any]) -> dict[str, Calibration]:
    """Reads the calibration of each category from the metadata of a detector file; a single category has the name "".

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
    max_uncertainty: Sequence[float] = (),
    review_uncertain: bool = False,
    minimum_area: float = 0.0,
    extrapolate_tail: bool = False,
    out_of_fold: bool = False,
    reserve: float = 0.0,
    defects: Sequence[float] = (),
    miss_rate: float | None = None,
    cost_ratio: float | None = None,
) -> Calibration:
    """Calibrates on good images outside of training and, if there are any, labelled defects.

    `rate` sets the threshold unless `miss_rate` or `cost_ratio` is given. Then the defects set it, and the false-alarm
    rate follows: (1 + number of good scores above the threshold) / (n + 1).

    Args:
        scores: Image scores of good images.
        peaks: Lowest pixel threshold at which each good image shows no region (`regions.region_level`).
        low: Median of the map values.
        rate: Requested false-alarm rate, in (0, 1).
        review_rate: Share of good images that may be called anything but good, in [0, 1). There is no review if the
            certified share is not above the false-alarm rate.
        max_uncertainty: Largest value of the uncertainty map of each good image; empty if there are no such maps.
        review_uncertain: See `Calibration`.
        minimum_area: Smallest area of a region, as a share of the image, that `peaks` were found with.
        extrapolate_tail: Estimate the threshold if n images cannot certify the rate, down to a tenth of 1 / (n + 1).
            It is never below the highest score. Fewer than 40 images have no tail.
        out_of_fold: See `Calibration`.
        reserve: Expected rise of scores in another session (`reserve.reserve_of`), in units of the score, ≥ 0; it has
            no effect if defects set the threshold.
        defects: Image scores of defective images.
        miss_rate: Share of defects that may be missed, in (0, 1): a defect exchangeable with those given is missed with
            at most this probability (split conformal prediction, for every number of defects).
        cost_ratio: Cost of a missed defect relative to a false alarm. The threshold minimises the share of good images
            above it plus `cost_ratio` times the share of defects not above it. Nothing is certified.

    Raises:
        ValueError: No scores, scores that are not finite, or too few defects for the miss rate.
    """
    if not scores or not all(map(math.isfinite, [*scores, *peaks, *max_uncertainty])):
        raise ValueError("calibration needs finite scores of at least one good image outside of training")
    if not all(map(math.isfinite, defects)):
        raise ValueError("scores of defects must be finite")
    by_defects = miss_rate is not None or cost_ratio is not None
    if by_defects and not defects:
        raise ValueError("a miss rate and a cost ratio need labelled defects")
    n, good = len(scores), sorted(scores)
    k, asked, tail = conformal.rank(n, rate), rate, None
    threshold, certified, guaranteed = good[-k], k / (n + 1), None
    if by_defects:
        threshold, guaranteed = _by_defects(good, sorted(defects), miss_rate, cost_ratio)
        k = 1 + n - bisect.bisect_right(good, threshold)
        certified = asked = k / (n + 1)
    elif extrapolate_tail and asked < certified and (tail := conformal.fit_tail(good)):
        certified = max(asked, certified / conformal.MAX_EXTRAPOLATION)
        threshold = max(threshold, tail.threshold(certified))
    reviewed = conformal.rank(n, review_rate)
    lowest = good[-reviewed] if reviewed > k else threshold
    reserve = 0.0 if by_defects else reserve
    threshold += reserve
    band = review_rate > 0 and lowest < threshold
    uncertain = reviewed if review_rate else min(k, conformal.rank(n, rate))
    return Calibration(
        scores=tuple(good),
        asked_rate=asked,
        rate=certified,
        threshold=threshold,
        pixel_threshold=sorted(peaks)[-min(k, n)],
        low=low,
        defects=tuple(sorted(defects)) if by_defects else (),
        miss_rate=guaranteed,
        review_rate=max(reviewed, k) / (n + 1) if band else None,
        review_threshold=lowest if band else None,
        uncertainty_threshold=sorted(max_uncertainty)[-min(uncertain, len(max_uncertainty))]
        if max_uncertainty
        else None,
        review_uncertain=review_uncertain,
        minimum_area=minimum_area,
        tail=tail,
        out_of_fold=out_of_fold,
        reserve=reserve,
    )


def _by_defects(
    good: list[float], bad: list[float], miss_rate: float | None, cost_ratio: float | None
) -> tuple[float, float | None]:
    """Threshold that labelled defects set, and the certified miss rate; None if there is none."""
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
