"""Drift of images from the training images: camera, light, focus or product have changed. No torch.

It is independent of the anomaly score. A local defect hardly changes the statistics, quantiles over cells and means of
cells; a moved camera, other light, lost focus or another product changes them in every image.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from unflaw.imaging.statistics import STATISTICS

KEPT = 256  # maximum number of good images in a reference
SHUFFLES = 1999  # permutations; the p-value of a batch is at least 1 / 2000
RIDGE = 0.1  # share of the mean variance in the covariance, which has more entries than there are images
RATE = 0.01  # false-alarm rate of a batch

_WORDS = {  # if the most deviating statistic is lower, and if it is higher
    "light": ("darker", "brighter"),
    "colour": ("other colours", "other colours"),
    "sharpness": ("less sharp", "sharper"),
    "place": ("light and dark elsewhere", "light and dark elsewhere"),
    "all together": ("all things together", "all things together"),
}
_MATTERS = [*STATISTICS.values(), "all together"]  # the last one is the distance that a test adds
_LIMITING = Lock()  # the number of threads is the whole process's


@dataclass(frozen=True)
class Drift:
    """Result of a drift test of a batch.

    Attributes:
        p_value: Probability that good images like those of training differ as much from them.
        rate: False-alarm rate of `alarm`.
        images: Number of images in the batch.
        moved: Changes in "light", "colour", "sharpness" and "place", or "all together" if none of these changed alone:
            1 if the most deviating statistic is higher than on the training images, −1 if it is lower.
    """

    p_value: float
    rate: float
    images: int
    moved: dict[str, int]

    @property
    def alarm(self) -> bool:
        return self.p_value <= self.rate

    def describe(self) -> str:
        """Describes the result in one sentence."""
        of = "one image" if self.images == 1 else f"{self.images} images"
        chance = f"p = {self.p_value:.2g} over {of}, alarm at {self.rate:.2g}"
        if not self.alarm:
            return f"no drift ({chance})"
        found = ", ".join(_WORDS[name][way > 0] for name, way in self.moved.items())
        return f"drift: these images differ from the training images: {found} ({chance})"

    def advise(self, model: str = "MODEL") -> str:
        """Says what an alarm means for the verdicts, and what to do; empty without an alarm.

        Args:
            model: Detector file, for the command.
        """
        if not self.alarm:
            return ""
        if set(self.moved) & {"place", "all together"}:
            means = "parts lie elsewhere, many are defective, or it is another product"
        else:
            means = "the light or the focus has changed"
        return (
            f"{means}: the promised false-alarm rate does not hold for these images. The same product in a new "
            f"session: `unflaw commission {model} DIR` with its first good images sets the threshold anew; another "
            "product: train a detector for it; many defects: look at them"
        )

    def to_json(self) -> dict[str, Any]:
        kept = {"p_value": self.p_value, "rate": self.rate, "images": self.images, "moved": self.moved}
        return {"alarm": self.alarm, **kept}


class Reference:
    """Statistics of good images, which drift is measured against.

    Args:
        described: (n, D), statistics of good images in random order; the first KEPT are stored. Training images may be
            among them, since nothing in these statistics is learned.
    """

    def __init__(self, described: np.ndarray) -> None:
        self.described = np.asarray(described, np.float16)[:KEPT]

    def __len__(self) -> int:
        return len(self.described)

    def p_value(self, described: np.ndarray) -> float:
        """p-value of one image: share of images at least as far from the mean of all, in [1 / (n + 1), 1].

        Full conformal prediction (Vovk et al. 2005): centre and spread include the image itself, as they include all
        others. So a good image exchangeable with them gets p ≤ rate with probability at most `rate`, and no image is
        held out.

        Args:
            described: (D,), its statistics.
        """
        distances = _distances(np.vstack([self.described, described]).astype(np.float64))
        return float(np.mean(distances >= distances[-1]))

    def test(self, described: Sequence[np.ndarray] | np.ndarray, rate: float = RATE) -> Drift:
        """Tests a batch by a permutation test of the largest rank sum of any statistic.

        For any distribution of the statistics, a batch of good images exchangeable with the reference raises an alarm
        with probability at most `rate`. With ranks, a few unusual images, such as defects, do not decide.

        Args:
            described: (m, D), statistics of m ≥ 1 images.
            rate: False-alarm rate, at least 1 / (SHUFFLES + 1).

        Raises:
            ValueError: A rate too small for this test.
        """
        from scipy.stats import rankdata  # slow to import

        check_rate(rate)
        batch = np.asarray(described, np.float16)
        pooled = np.vstack([self.described, batch]).astype(np.float64)
        pooled = np.hstack([pooled, _distances(pooled)[:, None]])
        ranks = rankdata(pooled, axis=0) - (len(pooled) + 1) / 2
        deviation = ranks.std(0)
        ranks /= np.where(deviation > 0, deviation, 1)  # a constant statistic has no influence
        sums = ranks[len(self) :].sum(0)
        largest = np.sort(_largest_sums(ranks, len(batch)))
        near = 1e-9 * len(pooled)  # the same ranks in another order may sum to another last digit
        p_value = (1 + np.sum(largest >= np.abs(sums).max() - near)) / (SHUFFLES + 1)
        limit = largest[-int(rate * (SHUFFLES + 1) + 1e-9)]
        moved: dict[str, int] = {}
        for i in np.argsort(-np.abs(sums), kind="stable"):
            if abs(sums[i]) > limit or not moved:
                moved.setdefault(_MATTERS[i], int(np.sign(sums[i])))
        if len(moved) > 1:
            moved.pop("all together", None)
        return Drift(float(p_value), rate, len(batch), moved if p_value <= rate else {})

    def to_json(self) -> dict[str, Any]:
        """Entry for the metadata of a detector file."""
        data = base64.b64encode(self.described.astype("<f2").tobytes()).decode()
        return {"statistics": self.described.shape[1], "float16": data}

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> Reference:
        """Raises: KeyError, ValueError: Damaged."""
        try:
            values = np.frombuffer(base64.b64decode(written["float16"], validate=True), "<f2")
            values = values.reshape(-1, written["statistics"])
        except (TypeError, OverflowError) as error:
            raise ValueError(f"its drift reference is damaged: {error}") from error
        if not (values.size and np.isfinite(values).all()):
            raise ValueError("its drift reference is empty or not finite")
        return cls(values)


def check_rate(rate: float) -> None:
    """Raises: ValueError: `Reference.test` has no such false-alarm rate."""
    if not 1 / (SHUFFLES + 1) <= rate < 1:
        raise ValueError(f"a drift alarm cannot have a false-alarm rate of {rate}; give {1 / (SHUFFLES + 1)} to 1")


def references(metadata: Mapping[str, Any]) -> dict[str, Reference]:
    """Reads the reference of each category from the metadata of a detector file, except those of other statistics.

    Raises:
        KeyError, ValueError: They are damaged.
    """
    known = metadata.get("drift", {})
    if not isinstance(known, Mapping):
        raise ValueError("its drift reference is damaged")
    found = {name: Reference.from_json(written) for name, written in known.items()}
    return {name: known for name, known in found.items() if known.described.shape[1] == len(STATISTICS)}


def _largest_sums(ranks: np.ndarray, size: int) -> np.ndarray:
    """(N, D) → (SHUFFLES,): largest absolute sum of any column over `size` random rows."""
    rng, found = np.random.default_rng(0), []
    for part in np.array_split(np.arange(SHUFFLES), 1 + SHUFFLES * len(ranks) // 2**22):  # some 64 MB at a time
        order = rng.random((len(part), len(ranks)))
        taken = order <= np.partition(order, size - 1, axis=1)[:, size - 1 : size]
        found.append(np.abs(taken.astype(float) @ ranks).max(1))
    return np.concatenate(found)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limits linear algebra to the calling thread.

    These matrices are too small for several threads, and OpenBLAS threads keep a core busy for a tenth of a second
    after each image.
    """
    with _LIMITING, _libraries().limit(limits=1, user_api="blas"):
        yield


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


def _distances(described: np.ndarray) -> np.ndarray:
    """Squared Mahalanobis distance of each image to the mean of all, (n, D) → (n,), for statistics of any units."""
    centred = described - np.median(described, 0)
    robust = 1.4826 * np.median(np.abs(centred), 0)
    scale = np.maximum(robust, 0.1 * centred.std(0))
    centred = centred / np.where(scale > 0, scale, 1)
    centred -= centred.mean(0)
    with _one_thread():
        covariance = centred.T @ centred / len(centred)
        ridge = RIDGE * max(np.trace(covariance), 1e-12) / len(covariance)
        solved = np.linalg.solve((1 - RIDGE) * covariance + ridge * np.eye(len(covariance)), centred.T).T
    return np.einsum("nd,nd->n", centred, solved)
