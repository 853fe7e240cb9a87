"""Statistics of decisions: what n good images certify, what lies beyond, images of a part, many parts a day.

An image whose score is `s` has the conformal p-value `(1 + #{s_i ≥ s}) / (n + 1)` among n good images that the
detector did not learn from (Vovk et al. 2005): if it is good and exchangeable with them, P(p ≤ α) ≤ α for every n.
NumPy and SciPy only; `scipy.stats` takes most of a second to import and is only where it is used.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

EXCEEDANCES = 20  # scores that a tail is fitted to, at least; of many images it is a tenth of them
REACH = 10  # times below the smallest certified rate that a tail is trusted, at most
DRAWS = 999  # of the parametric bootstrap that judges a fit

Combination = Literal["bonferroni", "harmonic", "geometric", "mean"]
COMBINATIONS: tuple[Combination, ...] = ("bonferroni", "harmonic", "geometric", "mean")


def p_value(ordered: Sequence[float], score: float) -> float:
    """(1 + number of scores ≥ score) / (n + 1), in [1 / (n + 1), 1], of n scores in ascending order."""
    n = len(ordered)
    return (1 + n - bisect.bisect_left(ordered, score)) / (n + 1)


def rank(n: int, rate: float) -> int:
    """k, at least 1, such that new scores lie above the k-th largest of n with probability k / (n + 1) at most.

    That is at most `rate`, where n suffice: p ≤ rate ⇔ #{s_i ≥ s} ≤ rate·(n + 1) − 1 ⇔ s above the k-th largest.
    """
    return max(1, math.floor(rate * (n + 1) + 1e-9))


class Certificate(NamedTuple):
    """What n good images say of a false-alarm rate.

    Attributes:
        rate: Certified: the probability that a good image raises an alarm, the calibration images being as random
            as it is.
        unlucky: With these n images the rate of alarms is what it is; of 100 calibrations, 95 have one of at most
            this. It follows a Beta(k, n + 1 − k) distribution (Vovk 2012).
    """

    n: int
    rate: float
    unlucky: float


def certifiable(n: int, rate: float = 0.0) -> Certificate:
    """What n good images can certify of a rate; by default of the smallest one there is, 1 / (n + 1).

    Raises:
        ValueError: n is not positive.
    """
    from scipy import stats

    if n < 1:
        raise ValueError(f"{n} images certify nothing; at least one is needed")
    k = min(rank(n, rate), n)
    return Certificate(n, k / (n + 1), float(stats.beta.ppf(0.95, k, n + 1 - k)))


def needed(rate: float, k: int = 1, method: Combination = "bonferroni") -> int:
    """The least number of good images that certifies a rate in (0, 1): for k > 1, of k images together (`combine`).

    A rate is certified in steps of 1 / (n + 1), so the factor of a combination counts rounded up.
    """
    return math.ceil(math.ceil(combination_factor(k, method) - 1e-9) / rate - 1e-9) - 1


class Tail(BaseModel):
    """A generalised Pareto distribution over the highest scores: an estimate, no certificate (Pickands 1975).

    Fitted by probability-weighted moments (Hosking and Wallis 1987). A negative shape, which would say that scores
    beyond some value are impossible, is taken as 0, an exponential tail.

    Attributes:
        start: The highest score that is not an exceedance.
        share: How many of the scores exceed it, over n + 1.
        shape, scale: ξ and σ of the excess.
        goodness: p-value of the fit: Cramér–von Mises distance against that of samples of the fitted distribution,
            each fitted anew. Small: do not trust the tail.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    start: float
    share: float
    shape: float
    scale: float
    goodness: float

    def p_value(self, score: float) -> float:
        """Estimated share of good images above a score; of scores below `start`, `share`."""
        from scipy import stats

        return self.share * float(stats.genpareto.sf(max(score - self.start, 0.0), self.shape, scale=self.scale))

    def threshold(self, rate: float) -> float:
        """The score that a share `rate` of good images, at most `share`, is estimated to exceed."""
        from scipy import stats

        return self.start + float(stats.genpareto.isf(rate / self.share, self.shape, scale=self.scale))


def fit_tail(ordered: Sequence[float]) -> Tail | None:
    """The tail of scores in ascending order: peaks over threshold, the highest tenth of them and 20 at least.

    None where it cannot be had: fewer than twice as many scores, or exceedances without spread.
    """
    from scipy import stats

    n = len(ordered)
    k = max(EXCEEDANCES, math.ceil(n / 10))
    if n < 2 * k:
        return None
    start = ordered[-k - 1]
    excess = np.array(ordered[-k:]) - start
    if np.ptp(excess) == 0:
        return None
    shape, scale = _moments(excess)
    drawn = stats.genpareto.rvs(shape, scale=scale, size=(DRAWS, k), random_state=np.random.default_rng(0))
    drawn.sort(axis=1)
    distance, expected = _distance(excess, shape, scale), _distance(drawn, *_moments(drawn))
    goodness = (1 + int((expected >= distance).sum())) / (DRAWS + 1)
    return Tail(start=start, share=k / (n + 1), shape=float(shape), scale=float(scale), goodness=goodness)


def _moments(excess: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shape and scale, (...), of excesses (..., k) in ascending order."""
    k = excess.shape[-1]
    first = excess.mean(-1)
    second = (excess * (1 - (np.arange(1, k + 1) - 0.35) / k)).mean(-1)
    shape = 2 - first / (first - 2 * second)
    heavy = shape > 0
    return np.where(heavy, shape, 0.0), np.where(heavy, 2 * first * second / (first - 2 * second), first)


def _distance(excess: np.ndarray, shape: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Cramér–von Mises W², (...), of excesses (..., k) in ascending order."""
    from scipy import stats

    k = excess.shape[-1]
    found = stats.genpareto.cdf(excess, np.expand_dims(shape, -1), scale=np.expand_dims(scale, -1))
    return 1 / (12 * k) + ((found - (2 * np.arange(1, k + 1) - 1) / (2 * k)) ** 2).sum(-1)


def combine(p_values: Sequence[float], method: Combination = "bonferroni") -> float:
    """One p-value of several, such as those of the images of one part; valid however they depend on each other.

    Images of a part share its orientation and light, and all p-values share the calibration images; so Fisher's
    product and Cauchy's sum, which want independence or hold in the limit only, are not offered.

    Args:
        p_values: K of them.
        method: "bonferroni": K times the smallest, best where a defect shows in one image. The others are multiples
            of means (Vovk and Wang 2020): "harmonic", "geometric" (e times it) and "mean" (twice it), in this order
            better where it shows in more and more of them.

    Raises:
        ValueError: None given, or outside (0, 1].
    """
    from scipy import stats

    p = np.array(p_values, float)
    if not p.size or not ((p > 0) & (p <= 1)).all():
        raise ValueError("p-values to combine must lie in (0, 1], one at least")
    if p.size == 1:
        return float(p[0])
    means: dict[Combination, Callable[[np.ndarray], float]] = {
        "bonferroni": np.min,
        "harmonic": stats.hmean,
        "geometric": stats.gmean,
        "mean": np.mean,
    }
    return float(min(1.0, combination_factor(p.size, method) * means[method](p)))


def combination_factor(k: int, method: Combination = "bonferroni") -> float:
    """The smallest p-value that `combine` can give for k images, as a multiple of the smallest one of a single image.

    With n calibration images that is 1 / (n + 1), so no observation brings the combined p-value of k images below
    `combination_factor(k, method) / (n + 1)`.
    """
    if k == 1:
        return 1.0
    factors = {"bonferroni": k, "harmonic": _harmonic_factor(k), "geometric": math.e, "mean": 2}
    return float(factors[method])


@lru_cache
def _harmonic_factor(k: int) -> float:
    """The least multiple of the harmonic mean of k p-values that is one (Vovk and Wang 2020, proposition 6)."""
    from scipy.optimize import brentq

    y = brentq(lambda y: y**2 - k * ((y + 1) * math.log1p(y) - y), 1e-3, 1e9) if k > 2 else 0.0
    return (y + k) ** 2 / ((y + 1) * k)


def discoveries(p_values: Sequence[float], rate: float) -> list[bool]:
    """Which of a batch to take for defective so that, expected, at most a share `rate` of those are good.

    Benjamini and Hochberg 1995. That it holds for conformal p-values, which all share one calibration set, is shown in
    Bates et al. 2023, for parts that do not depend on each other.

    Raises:
        ValueError: The rate is not in (0, 1).
    """
    from scipy import stats

    if not 0 < rate < 1:
        raise ValueError(f"a false discovery rate must lie between 0 and 1, such as 0.1, not {rate:g}")
    if not p_values:
        return []
    return (stats.false_discovery_control(np.array(p_values), method="bh") <= rate + 1e-12).tolist()


def least_discoveries(m: int, smallest: float, rate: float) -> int:
    """How many discoveries there are at least among m images, if there are any; above m, there can be none.

    r discoveries have p-values up to rate · r / m, and no p-value lies below `smallest`.
    """
    return max(1, math.ceil(m * smallest / rate - 1e-9))
