"""Whether images still come from the world that a detector learned: camera, light, focus, product. No torch.

It is asked apart from the anomaly score. A local defect hardly moves what is looked at, quantiles over cells and the
means of cells; a moved camera, other light, lost focus or another product moves them in every image.
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

KEPT = 256  # good images that a detector remembers, at most
SHUFFLES = 1999  # behind the p-value of a batch, which so is at least 1 / 2000
RIDGE = 0.1  # share of the mean variance in the covariance, which has more entries than there are images
RATE = 0.01  # of false alarms of a batch

_WORDS = {  # where the most telling statistic is lower, and where it is higher
    "light": ("darker", "brighter"),
    "colour": ("other colours", "other colours"),
    "sharpness": ("less sharp", "sharper"),
    "place": ("light and dark elsewhere", "light and dark elsewhere"),
    "all together": ("all things together", "all things together"),
}
_MATTERS = [*STATISTICS.values(), "all together"]  # the distance that a test adds
_LIMITING = Lock()  # the number of threads is the whole process's


@dataclass(frozen=True)
class Drift:
    """What a batch says of drift.

    Attributes:
        p_value: Probability that good images like those learned from differ as much from them.
        rate: The false-alarm rate of `alarm`.
        images: How many there are in the batch.
        moved: What differs of "light", "colour", "sharpness" and "place"; "all together" where it is none of these
            alone. For each how: 1 where its most telling statistic is higher than on the images learned from, −1
            lower.
    """

    p_value: float
    rate: float
    images: int
    moved: dict[str, int]

    @property
    def alarm(self) -> bool:
        return self.p_value <= self.rate

    def describe(self) -> str:
        """One sentence for people."""
        of = "one image" if self.images == 1 else f"{self.images} images"
        chance = f"p = {self.p_value:.2g} over {of}, alarm at {self.rate:.2g}"
        if not self.alarm:
            return f"no drift ({chance})"
        found = ", ".join(_WORDS[name][way > 0] for name, way in self.moved.items())
        return f"drift: these images are unlike those learned from: {found} ({chance})"

    def to_json(self) -> dict[str, Any]:
        kept = {"p_value": self.p_value, "rate": self.rate, "images": self.images, "moved": self.moved}
        return {"alarm": self.alarm, **kept}


class Reference:
    """Good images that a detector remembers, as described.

    Args:
        described: (n, D), of good images in random order; the first KEPT are kept. Nothing in a description is
            learned, so those that the detector trained on are as good as any.
    """

    def __init__(self, described: np.ndarray) -> None:
        self.described = np.asarray(described, np.float16)[:KEPT]

    def __len__(self) -> int:
        return len(self.described)

    def p_value(self, described: np.ndarray) -> float:
        """Of one image: the share of images at least as far from all of them, in [1 / (n + 1), 1].

        Full conformal prediction (Vovk et al. 2005): the image takes part in the centre and spread that it is
        measured with, as do all others, so that a good image exchangeable with them gets p ≤ rate with probability
        at most `rate`, and none need be held out.

        Args:
            described: (D,).
        """
        distances = _distances(np.vstack([self.described, described]).astype(np.float64))
        return float(np.mean(distances >= distances[-1]))

    def test(self, described: Sequence[np.ndarray] | np.ndarray, rate: float = RATE) -> Drift:
        """Of a batch: a permutation test of the largest rank sum of any statistic.

        Whatever the statistics are like, a batch of good images exchangeable with those remembered raises the alarm
        with probability at most `rate`. Ranks see to it that a few odd images, such as defects, do not decide.

        Args:
            described: (m, D) of m ≥ 1 images.
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
        ranks /= np.where(deviation > 0, deviation, 1)  # a statistic that is the same everywhere says nothing
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
        """For the metadata of a detector file."""
        data = base64.b64encode(self.described.astype("<f2").tobytes()).decode()
        return {"statistics": self.described.shape[1], "float16": data}

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> Reference:
        """Raises: KeyError, ValueError: Damaged."""
        try:
            values = np.frombuffer(base64.b64decode(written["float16"], validate=True), "<f2")
            values = values.reshape(-1, written["statistics"])
        except (TypeError, OverflowError) as error:
            raise ValueError(f"what it remembers of images is damaged: {error}") from error
        if not (values.size and np.isfinite(values).all()):
            raise ValueError("what it remembers of images is empty or not finite")
        return cls(values)


def check_rate(rate: float) -> None:
    """Raises: ValueError: `Reference.test` has no such false-alarm rate."""
    if not 1 / (SHUFFLES + 1) <= rate < 1:
        raise ValueError(f"a drift alarm cannot have a false-alarm rate of {rate}; give {1 / (SHUFFLES + 1)} to 1")


def references(metadata: Mapping[str, Any]) -> dict[str, Reference]:
    """Of every category, from the metadata of a detector file; none where the statistics are those of another version.

    Raises:
        KeyError, ValueError: They are damaged.
    """
    known = metadata.get("drift", {})
    if not isinstance(known, Mapping):
        raise ValueError("what it remembers of images is damaged")
    found = {name: Reference.from_json(written) for name, written in known.items()}
    return {name: known for name, known in found.items() if known.described.shape[1] == len(STATISTICS)}


def _largest_sums(ranks: np.ndarray, size: int) -> np.ndarray:
    """(N, D) → (SHUFFLES,): the largest absolute sum of any column over `size` random rows."""
    rng, found = np.random.default_rng(0), []
    for part in np.array_split(np.arange(SHUFFLES), 1 + SHUFFLES * len(ranks) // 2**22):  # some 64 MB at a time
        order = rng.random((len(part), len(ranks)))
        taken = order <= np.partition(order, size - 1, axis=1)[:, size - 1 : size]
        found.append(np.abs(taken.astype(float) @ ranks).max(1))
    return np.concatenate(found)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Linear algebra stays in the thread that asks for it.

    For matrices as small as these, further threads gain nothing; and OpenBLAS lets them wait busily for a tenth of a
    second after each image, on cores that have images to inspect.
    """
    with _LIMITING, _libraries().limit(limits=1, user_api="blas"):
        yield


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


def _distances(described: np.ndarray) -> np.ndarray:
    """Squared Mahalanobis distance of each image to the mean of all, (n, D) → (n,), whatever the units of each."""
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
