"""Statistics of decisions: conformal p-values, certified rates, tail estimates, combined p-values, discoveries.

An image whose score is `s` has the conformal p-value `(1 + #{s_i ≥ s}) / (n + 1)` among n good images that the
detector did not learn from (Vovk et al. 2005): if it is good and exchangeable with them, P(p ≤ α) ≤ α for every n.
NumPy and SciPy only. `scipy.stats` takes most of a second to import, so functions import it.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

EXCEEDANCES = 20  # minimum number of scores that a tail is fitted to; a tenth of the scores if that is more
MAX_EXTRAPOLATION = 10  # largest factor by which an estimated rate may lie below the smallest certified one
DRAWS = 999  # samples of the parametric bootstrap for the goodness of fit

Combination = Literal["bonferroni", "harmonic", "geometric", "mean"]
COMBINATIONS: tuple[Combination, ...] = ("bonferroni", "harmonic", "geometric", "mean")


def p_value(ordered: Sequence[float], score: float) -> float:
    """(1 + number of scores ≥ score) / (n + 1), in [1 / (n + 1), 1], of n scores in ascending order."""
    n = len(ordered)
    return (1 + n - bisect.bisect_left(ordered, score)) / (n + 1)


def rank(n: int, rate: float) -> int:
    """Rank k ≥ 1 such that a new score exceeds the k-th largest of n with probability at most k / (n + 1).

    That is at most `rate`, if n is large enough: p ≤ rate ⇔ #{s_i ≥ s} ≤ rate·(n + 1) − 1 ⇔ s above the k-th largest.
    """
    return max(1, math.floor(rate * (n + 1) + 1e-9))


class Certificate(NamedTuple):
    """False-alarm rate that n good images certify.

    Attributes:
        rate: Certified rate, the average over random calibration images.
        unlucky: 95th percentile of the rate over calibrations, which follows a Beta(k, n + 1 − k) distribution
            (Vovk 2012).
    """

    n: int
    rate: float
    unlucky: float


def certifiable(n: int, rate: float = 0.0) -> Certificate:
    """Certificate of n good images for a rate, by default the smallest possible one, 1 / (n + 1).

    Raises:
        ValueError: n is not positive.
    """
    from scipy import stats

    if n < 1:
        raise ValueError(f"{n} images certify nothing; at least one is needed")
    k = min(rank(n, rate), n)
    return Certificate(n, k / (n + 1), float(stats.beta.ppf(0.95, k, n + 1 - k)))


def chance_of_alarms(alarms: int, images: int, n: int, rate: float) -> float:
    """Probability of so many false alarms, or more, if good images are exchangeable with n calibration images.

    Among `images` new ones, the number above the k-th largest of n scores follows a beta-binomial distribution, which
    includes how lucky the calibration was. Below 1 / (n + 1), where rates are estimates, it is taken as binomial.

    Args:
        alarms: Number of false alarms.
        images: Number of good images that were inspected.
        n: Number of calibration images.
        rate: Rate of the threshold.
    """
    from scipy import stats

    if rate < 1 / (n + 1) - 1e-12:
        return float(stats.binom.sf(alarms - 1, images, rate))
    k = min(rank(n, rate), n)
    return float(stats.betabinom.sf(alarms - 1, images, k, n + 1 - k))


def needed(rate: float, k: int = 1, method: Combination = "bonferroni") -> int:
    """Smallest number of good images that certifies a rate in (0, 1); for k > 1, that of k images combined (`combine`).

    Rates come in steps of 1 / (n + 1), so the factor of the combination is rounded up.
    """
    return math.ceil(math.ceil(combination_factor(k, method) - 1e-9) / rate - 1e-9) - 1


class Tail(BaseModel):
    """A generalised Pareto distribution over the highest scores: an estimate, no certificate (Pickands 1975).

    Fitted by probability-weighted moments (Hosking and Wallis 1987). A negative shape, which would exclude scores above
    some value, is replaced by 0, an exponential tail.

    Attributes:
        start: Highest score that is not an exceedance.
        share: Number of scores above `start`, divided by n + 1.
        shape, scale: ξ and σ of the excess.
        goodness: p-value of the fit, from the Cramér–von Mises distance and a parametric bootstrap. A small value means
            that the tail fits badly.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    start: float
    share: float
    shape: float
    scale: float
    goodness: float

    def p_value(self, score: float) -> float:
        """Estimated share of good images above a score; `share` for scores below `start`."""
        from scipy import stats

        return self.share * float(stats.genpareto.sf(max(score - self.start, 0.0), self.shape, scale=self.scale))

    def threshold(self, rate: float) -> float:
        """Score that an estimated share `rate` ≤ `share` of good images exceeds."""
        from scipy import stats

        return self.start + float(stats.genpareto.isf(rate / self.share, self.shape, scale=self.scale))


def fit_tail(ordered: Sequence[float]) -> Tail | None:
    """Fits the tail of scores in ascending order to the highest tenth of them, at least 20 (peaks over threshold).

    None if there are fewer than twice as many scores, or if the exceedances are all equal.
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
    """Combines p-values, such as those of the images of one part, under arbitrary dependence.

    Images of a part share orientation and light, and all p-values share the calibration images. Fisher's product and
    Cauchy's sum are not offered: they need independence or hold only in the limit.

    Args:
        p_values: K p-values.
        method: "bonferroni", K times the smallest, is best if a defect shows in one image. "harmonic", "geometric" and
            "mean" are multiples of means (Vovk and Wang 2020); in this order they suit defects in more images.

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
    """Smallest p-value that `combine` can give for k images, as a multiple of the smallest one of a single image.

    With n calibration images a combined p-value is at least `combination_factor(k, method) / (n + 1)`.
    """
    if k == 1:
        return 1.0
    factors = {"bonferroni": k, "harmonic": _harmonic_factor(k), "geometric": math.e, "mean": 2}
    return float(factors[method])


@lru_cache
def _harmonic_factor(k: int) -> float:
    """Smallest multiple of the harmonic mean of k p-values that is a p-value (Vovk and Wang 2020, proposition 6)."""
    from scipy.optimize import brentq

    y = brentq(lambda y: y**2 - k * ((y + 1) * math.log1p(y) - y), 1e-3, 1e9) if k > 2 else 0.0
    return (y + k) ** 2 / ((y + 1) * k)


def discoveries(p_values: Sequence[float], rate: float) -> list[bool]:
    """Selects defective images of a batch with a false discovery rate of at most `rate` (Benjamini and Hochberg 1995).

    It holds for conformal p-values of independent parts, which all share one calibration set (Bates et al. 2023).

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
    """Smallest possible number of discoveries among m images, apart from none; if it exceeds m, there can be none.

    r discoveries have p-values up to rate · r / m, and no p-value lies below `smallest`.
    """
    return max(1, math.ceil(m * smallest / rate - 1e-9))
