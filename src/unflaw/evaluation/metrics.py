"""AUROC, AP, F1-max and AUPRO on raw scores: exact, without threshold grids, in bounded memory.

Every metric is a closed form over the distinct values of the positives and the numbers of negatives above, and at or
above, each of them. Positives (defect pixels) are few, and negatives are only sorted.

>>> r = ranking(negatives=np.array([0.1, 0.4, 0.4]), positives=np.array([0.4, 0.9]))
>>> auroc(r), average_precision(r), f1_max(r)[0]
(0.8333..., 0.75, 0.6666...)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from unflaw.io.brief import brief
from unflaw.io.words import count

Array = NDArray[Any]
SUMMARY = 64  # the n / 64 highest values of a full buffer of n stay exact in its summary


@brief
@dataclass(frozen=True, eq=False)
class Ranking:
    """Ranks of positives among negatives, for the T distinct values of the positives from the highest down."""

    thresholds: Array  # (T,) strictly decreasing
    tp: Array  # (T,) float64, weight of the positives >= threshold; the last entry is the weight of all
    fp_above: Array  # (T,) number of negatives > threshold
    fp: Array  # (T,) number of negatives >= threshold
    n_negatives: int

    @property
    def defined(self) -> bool:
        """True if there are positives and negatives; otherwise every metric is None."""
        return len(self.thresholds) > 0 and self.n_negatives > 0


def ranking(negatives: ArrayLike, positives: ArrayLike, weights: ArrayLike | None = None) -> Ranking:
    """Rank scores (any shape, any real dtype; higher is more anomalous) of positives among those of negatives.

    `weights`: one per positive, > 0; 1 by default. Raises ValueError on NaN or infinite scores and unequal lengths.
    """
    negatives, positives = np.sort(negatives, axis=None), np.ravel(positives)
    weights = np.ones(len(positives)) if weights is None else np.asarray(weights, np.float64).ravel()
    if len(weights) != len(positives):
        raise ValueError(f"{count(len(weights), 'weight')} for {count(len(positives), 'positive')}")
    if not (np.isfinite(negatives).all() and np.isfinite(positives).all()):
        raise ValueError("scores hold NaN or infinite values")
    thresholds, tp = _distinct(*_descending(positives, weights[:, None]))
    return Ranking(thresholds, tp[:, 0], *_count(negatives, thresholds), len(negatives))


def partial_auc(r: Ranking, limit: float) -> float | None:
    """Area under TPR over FPR from 0 to `limit` (in (0, 1]), divided by `limit`: in [0, 1]. None if undefined.

    Ties of positives and negatives are linear segments of the curve, and a limit inside a segment is interpolated. With
    `region_weights`, TPR is the per-region overlap and this is the AUPRO of Bergmann et al., "The MVTec Anomaly
    Detection Dataset" (IJCV 2021). Raises ValueError on another limit.
    """
    if not 0 < limit <= 1:
        raise ValueError(f"limit must be in (0, 1], got {limit}")
    if not r.defined:
        return None
    end = limit * r.n_negatives
    start, stop = np.minimum(r.fp_above, end), np.minimum(r.fp, end)
    ramp = (stop - start) ** 2 / (2 * np.maximum(r.fp - r.fp_above, 1))
    return float(np.diff(r.tp, prepend=0) @ (end - stop + ramp) / (r.tp[-1] * end))


def auroc(r: Ranking) -> float | None:
    """Probability that a positive ranks above a negative, ties counting half: in [0, 1]. None if undefined."""
    return partial_auc(r, 1.0)


def average_precision(r: Ranking) -> float | None:
    """Sum over thresholds of recall gained x precision, as scikit-learn defines it: in (0, 1]. None if undefined."""
    return float(np.diff(r.tp, prepend=0) @ (r.tp / (r.tp + r.fp)) / r.tp[-1]) if r.defined else None


def f1_max(r: Ranking) -> tuple[float, float] | None:
    """Highest F1 over all thresholds and the highest threshold (score >= threshold) reaching it. None if undefined.

    Only values of positives are candidates: in between, a lower threshold only adds false positives.
    """
    if not r.defined:
        return None
    f1 = 2 * r.tp / (r.tp + r.fp + r.tp[-1])
    best = int(np.argmax(f1))
    return float(f1[best]), float(r.thresholds[best])


def roc_curve(r: Ranking, n: int | None = None) -> Array | None:
    """Vertices (FPR, TPR) of the ROC curve from (0, 0) to (1, 1), float64 (V, 2), for plots. None if undefined.

    With `region_weights`, the PRO curve. `n`: maximum number of vertices, evenly spread along the curve.
    """
    if not r.defined:
        return None
    # at every threshold, flat until fp_above, then up until fp
    fp = np.concatenate([[0], np.column_stack([r.fp_above, r.fp]).ravel(), [r.n_negatives]])
    tp = np.concatenate([[0], np.column_stack([np.append(0, r.tp[:-1]), r.tp]).ravel(), r.tp[-1:]])
    points = np.column_stack([fp / r.n_negatives, tp / r.tp[-1]])
    return _thin(points, points.sum(axis=1), n)


def precision_recall_curve(r: Ranking, n: int | None = None) -> Array | None:
    """Points (recall, precision), float64 (T, 2), recall rising; at most `n` of them. None if undefined."""
    if not r.defined:
        return None
    points = np.column_stack([r.tp / r.tp[-1], r.tp / (r.tp + r.fp)])
    return _thin(points, points[:, 0], n)


def image_ranking(scores: ArrayLike, labels: ArrayLike) -> Ranking:
    """Ranking of image scores (N,) with labels (N,), 0 or False for good and 1 or True for anomalous images.

    Raises ValueError on unequal shapes, other labels, and NaN or infinite scores.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.shape != labels.shape or scores.ndim != 1:
        raise ValueError(f"scores and labels must be (N,) both, got {scores.shape} and {labels.shape}")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be 0 (good) or 1 (anomalous)")
    return ranking(scores[labels == 0], scores[labels == 1])


def image_metrics(scores: ArrayLike, labels: ArrayLike) -> dict[str, float | None]:
    """`image_auroc`, `image_ap` and `image_f1_max` of image scores; see `image_ranking`."""
    return _classification_metrics("image", image_ranking(scores, labels))


def region_weights(mask: Array, valid: Array | None = None) -> Array:
    """1 / (area of its 8-connected region) for each defect pixel of a bool mask (H, W): float64 (P,), row by row.

    Each region has a total weight of 1. Pixels where the bool `valid` (H, W) is False are left out of the result and of
    the areas, but still connect regions.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return np.empty(0)
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    regions = ndimage.label(mask[box], structure=np.ones((3, 3)))[0]
    regions = regions[mask[box] if valid is None else mask[box] & valid[box]]
    areas = np.bincount(regions)
    return (1 / np.maximum(areas, 1))[regions]


def saturated_weights(scores: Array, regions: Iterable[tuple[Array, float]], mask: Array) -> Array:
    """Weights of defect pixels that turn the per-region overlap into the saturated one, sPRO: float64 (P,), row by row.

    sPRO of a region is min(found area / saturation, 1): its pixels with the highest scores weigh 1 / saturation each,
    until the saturation is reached. Bergmann et al., "Beyond Dents and Scratches" (IJCV 2022).

    `scores`: the anomaly map (H, W). `regions`: bool mask (H, W) and saturation > 0 of each region, in pixels; at most
    its area is used. `mask`: (H, W) bool, the union of the regions, with P pixels.
    """
    weights = np.zeros(mask.shape)
    for region, saturation in regions:
        inside = np.flatnonzero(region)
        if len(inside):
            ranked = inside[np.argsort(-scores.ravel()[inside], kind="stable")]
            full = min(saturation, len(ranked))
            weights.ravel()[ranked] += np.clip(full - np.arange(len(ranked)), 0, 1) / full
    return weights[mask]


class OverlapAccumulator:
    """AUPIMO: recall of each defective image at low false-positive rates, from 1e-5 to 1e-4.

    Area under the recall of an image over the logarithm of the FPR (share of the pixels of good images at or above the
    threshold) between `LOW` and `HIGH`, divided by the width: in [0, 1]. Bertoldo et al., "AUPIMO" (arXiv 2401.01984);
    their FPR is a mean over good images, which is equal if all have the same number of pixels.

    Exact up to 2^22 pixels of good images, above for the highest 2^16. At most `KEPT` defect pixels of an image are
    kept, evenly spread by rank.
    """

    LOW, HIGH, KEPT = 1e-5, 1e-4, 4096

    def __init__(self) -> None:
        self._good, self._found = _Store(2**22, weighted=False), list[Array]()

    def update(self, anomaly_map: Array, mask: Array | None = None) -> None:
        """Add an image: finite (H, W), and its bool mask, None for a good one. An empty mask is ignored."""
        if mask is None:
            self._good.add(np.ravel(anomaly_map))
        elif mask.any():
            values = np.sort(anomaly_map[mask])
            steps = np.linspace(0, len(values) - 1, min(len(values), self.KEPT)).round().astype(int)
            self._found.append(values[steps])

    def per_image(self) -> Array | None:
        """AUPIMO of each defective image, float64 (D,), in the order of the updates.

        None without defective images or with fewer good pixels than 1 / `LOW`.
        """
        if not self._found or self._good.total < 1 / self.LOW:
            return None
        values = np.concatenate(self._found)
        distinct, index = np.unique(values, return_inverse=True)
        rate = self._good.count(distinct)[1] / self._good.total
        share = np.log(self.HIGH / rate.clip(self.LOW, self.HIGH)) / np.log(self.HIGH / self.LOW)
        ends = np.cumsum([len(found) for found in self._found])[:-1]
        return np.array([part.mean() for part in np.split(share[index], ends)])


class PixelAccumulator:
    """Pixel metrics over all images of a test set, image by image; maps may differ in size.

    Exact up to `limit` defect-free and `limit` / 8 defect pixels. A full buffer is summarised: its highest 1/64 stay
    exact and the others are grouped by rank, which suits any distribution and keeps ties exact. A summary moves the
    rank of a pixel, counted from the highest, by at most 128 / buffer of that rank (twice that for defect-free pixels),
    up or down alike; the metrics change far less. Memory does not grow with the number of images: by default 350 MB in
    buffers that fill gradually, and 1.2 GB when they are summarised.

    >>> pixels = PixelAccumulator()
    >>> for anomaly_map, mask in results:
    ...     pixels.update(anomaly_map, mask)
    >>> pixels.compute()
    """

    def __init__(self, limit: int = 2**26) -> None:
        if limit < 8 * SUMMARY:
            raise ValueError(f"limit must be at least {8 * SUMMARY}, got {limit}")
        self._negatives, self._positives = _Store(limit, weighted=False), _Store(limit // 8, weighted=True)
        self._updates = 0
        self._rankings: tuple[Ranking, Ranking] | None = None

    def update(
        self,
        anomaly_map: ArrayLike,
        mask: ArrayLike | None = None,
        valid: ArrayLike | None = None,
        regions: Iterable[tuple[Array, float]] | None = None,
    ) -> None:
        """Add one image.

        `anomaly_map`: (H, W), cast to float32. `mask`: (H, W) bool, True on defects; None for a good image. `valid`:
        (H, W) bool, the pixels that count; all by default. `regions`: masks and saturations as for `saturated_weights`,
        instead of the connected regions of the mask, all of it valid; AUPRO is then AU-sPRO. Raises ValueError, without
        adding anything, on unequal shapes and on NaN or infinite values where `valid`.
        """
        with np.errstate(over="ignore"):  # checked below
            scores = np.asarray(anomaly_map, np.float32)
        mask = np.zeros(scores.shape, bool) if mask is None else np.asarray(mask, bool)
        valid = None if valid is None else np.asarray(valid, bool)
        for name, array in (("mask", mask), ("valid", valid)):
            if array is not None and array.shape != scores.shape:
                raise ValueError(f"anomaly map {scores.shape} and {name} {array.shape} differ in shape")
        if scores.ndim != 2:
            raise ValueError(f"anomaly map must be (H, W), got {scores.shape}")
        if not np.isfinite(scores if valid is None else scores[valid]).all():
            raise ValueError(f"anomaly map of update {self._updates} (from 0) holds NaN or infinite values")
        negative, positive = (~mask, mask) if valid is None else (~mask & valid, mask & valid)
        self._negatives.add(scores[negative])
        weights = region_weights(mask, valid) if regions is None else saturated_weights(scores, regions, mask)
        self._positives.add(scores[positive], weights)
        self._updates += 1
        self._rankings = None

    def compute(self) -> dict[str, float | None]:
        """`pixel_auroc`, `pixel_ap`, `pixel_f1_max`, `aupro_30`, `aupro_05`; None without defect or defect-free pixels.

        The last two are AUPRO (see `partial_auc`) up to an FPR of 0.3 and 0.05.
        """
        by_pixel, by_region = self.rankings()
        aupro = {"aupro_30": partial_auc(by_region, 0.3), "aupro_05": partial_auc(by_region, 0.05)}
        return _classification_metrics("pixel", by_pixel) | aupro

    def curves(self, n: int = 200) -> dict[str, Array | None]:
        """Points for plots, at most `n` each: `roc` (FPR, TPR), `pro` (FPR, PRO) and `pr` (recall, precision)."""
        by_pixel, by_region = self.rankings()
        return {
            "roc": roc_curve(by_pixel, n),
            "pro": roc_curve(by_region, n),
            "pr": precision_recall_curve(by_pixel, n),
        }

    def rankings(self) -> tuple[Ranking, Ranking]:
        """Rankings of defect pixels among defect-free ones: with weight 1 per pixel, and with weight 1 per region."""
        if self._rankings is None:
            thresholds, tp = _distinct(*_descending(*self._positives.content()))
            fp_above, fp = self._negatives.count(thresholds)
            by_pixel = Ranking(thresholds, tp[:, 0], fp_above, fp, self._negatives.total)
            self._rankings = by_pixel, replace(by_pixel, tp=tp[:, 1])
        return self._rankings


class _Store:
    """Values with weights in bounded memory: a buffer of raw values and a summary of earlier ones.

    A value has its count as weight and, if `weighted`, one more.
    """

    def __init__(self, limit: int, weighted: bool) -> None:
        self.keep = limit // SUMMARY
        self.values = np.empty(limit, np.float32)  # the system commits pages only as they fill
        self.weights = np.empty(limit if weighted else 0)
        self.weighted = weighted
        self.size = self.total = 0  # raw values held, values ever added
        self.summary = np.empty(0, np.float32), np.empty((0, 1 + weighted))  # descending (S,), weights (S, 1 or 2)

    def add(self, values: Array, weights: Array | None = None) -> None:
        self.total += len(values)
        done = 0
        while done < len(values):
            if self.size == len(self.values):
                self.summary = _grouped(*_descending(*self.content()), self.keep)
                self.size = 0
            n = min(len(values) - done, len(self.values) - self.size)
            self.values[self.size : self.size + n] = values[done : done + n]
            if weights is not None:
                self.weights[self.size : self.size + n] = weights[done : done + n]
            self.size, done = self.size + n, done + n

    def content(self) -> tuple[Array, Array]:
        """Values (N,) and weights (N, 1 or 2) of everything added; raw values without weights are grouped."""
        values = self.values[: self.size]
        if self.weighted:
            weights = np.column_stack([np.ones(self.size), self.weights[: self.size]])
        else:
            values.sort()
            values, weights = _grouped(values[::-1], np.arange(1, self.size + 1, dtype=np.int32)[:, None], self.keep)
        return np.concatenate([values, self.summary[0]]), np.concatenate([weights, self.summary[1]])

    def count(self, thresholds: Array) -> tuple[Array, Array]:
        """Numbers of values above and at or above each threshold."""
        raw = self.values[: self.size]
        raw.sort()
        above, at_or_above = _count(raw, thresholds)
        if len(self.summary[0]):
            summarised = _count(self.summary[0][::-1], thresholds, self.summary[1][::-1, 0])
            above, at_or_above = above + summarised[0], at_or_above + summarised[1]
        return above, at_or_above


def _count(values: Array, thresholds: Array, counts: Array | None = None) -> tuple[Array, Array]:
    """Numbers of ascending values, each representing `counts`, above and at or above each threshold."""
    right, left = (np.searchsorted(values, thresholds, side) for side in ("right", "left"))
    if counts is None:
        return len(values) - right, len(values) - left
    from_here = np.append(np.cumsum(counts[::-1])[::-1], 0)
    return from_here[right], from_here[left]


def _descending(values: Array, weights: Array) -> tuple[Array, Array]:
    """Sort values (N,) from the highest down and accumulate their weights (N, W)."""
    order = np.argsort(values)[::-1]
    return values[order], np.cumsum(weights[order], axis=0, dtype=np.float64)


def _distinct(values: Array, cumulative: Array) -> tuple[Array, Array]:
    """Return the distinct ones of descending values (N,) and the cumulative weights (N, W) at the last of each."""
    last = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=last[:-1])
    return values[last], cumulative[last]


def _grouped(values: Array, cumulative: Array, keep: int) -> tuple[Array, Array]:
    """Summarise descending values (N,) with cumulative weights (N, W); return fewer values and their weights.

    Equal values merge, and the first `keep` distinct ones stay separate. Below, cumulative weights are divided at
    factors of exp(1 / keep), and the values that end in the same cell are represented by one of them, drawn by count so
    that ranks shift neither up nor down. Only the first value can outweigh its cell; then it represents it. So no rank
    moves by more than the weight of two cells.
    """
    values, cumulative = _distinct(values, cumulative)
    begins = np.zeros(len(values) + 1, bool)
    begins[:keep] = True
    for column in cumulative.T:
        head, total = column[:keep][-1], column[-1]
        cuts = head * np.exp(np.arange(keep * np.log(total / head)) / keep)
        begins[np.searchsorted(column, cuts.astype(column.dtype), side="right")] = True
    first = np.flatnonzero(begins[:-1])
    last = np.append(first[1:], len(values)) - 1
    weights = np.diff(cumulative[last], axis=0, prepend=0)
    own = weights - (cumulative[last] - cumulative[first])
    count, spread = cumulative[:, 0], np.arange(len(first)) * 0.6180339887 % 1  # golden ratio: evenly spread
    drawn = np.searchsorted(count, count[last] - (spread * weights[:, 0]).astype(count.dtype))
    stays = (own * keep > cumulative[first]).any(axis=1)
    return values[np.where(stays, first, drawn)], weights.astype(np.float64)


def _thin(points: Array, position: Array, n: int | None) -> Array:
    """Keep at most n >= 2 of the points (V, 2), nearest from above to n even steps of the rising position (V,)."""
    if n is None or len(points) <= n:
        return points
    steps = np.linspace(position[0], position[-1], n)
    return points[np.unique(np.searchsorted(position, steps).clip(max=len(points) - 1))]


def _classification_metrics(name: str, r: Ranking) -> dict[str, float | None]:
    best = f1_max(r)
    return {f"{name}_auroc": auroc(r), f"{name}_ap": average_precision(r), f"{name}_f1_max": best and best[0]}
