"""Bootstrap over test images: confidence intervals, and differences between methods on the same images.

Good and defective images are resampled separately. Image AUROC is recomputed exactly, pixel AUROC and AUPRO from counts
per image at a few hundred thresholds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.integrate import trapezoid

from unflaw.evaluation.metrics import Array, Ranking, region_weights
from unflaw.io.brief import brief
from unflaw.io.files import write_atomically

THRESHOLDS = 512
METRICS = ("image_auroc", "pixel_auroc", "aupro_30")


@brief
@dataclass(frozen=True, eq=False)
class PixelTables:
    """Counts of I images at T falling thresholds; rows of images without pixel metrics are 0.

    Attributes:
        clean: (I, T) defect-free pixels at or above each threshold; the last threshold lies below all values.
        found: (I, T) defect pixels at or above each threshold.
        overlap: (I, T) the same, each pixel weighted with 1 / area of its region.
    """

    clean: Array
    found: Array
    overlap: Array


@brief
@dataclass(frozen=True, eq=False)
class PerImage:
    """Results of a method on the I test images of a data set.

    Attributes:
        names: Names of the images.
        labels: (I,) 0 or 1.
        scores: (I,) image scores.
        pixels: Counts of pixels; None without masks.
    """

    names: list[str]
    labels: Array
    scores: Array
    pixels: PixelTables | None

    def save(self, path: Path) -> None:
        """Write `.npz` atomically."""
        arrays = {"names": np.array(self.names), "labels": self.labels, "scores": self.scores}
        if self.pixels is not None:
            arrays |= {name: getattr(self.pixels, name) for name in ("clean", "found", "overlap")}

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, write)

    @classmethod
    def load(cls, path: Path) -> PerImage:
        """Read a file of `save`. Raises OSError or ValueError if that is not possible."""
        with np.load(path, allow_pickle=False) as file:
            tables = PixelTables(file["clean"], file["found"], file["overlap"]) if "clean" in file else None
            return cls(file["names"].tolist(), file["labels"], file["scores"], tables)

    def values(self, metric: str, counts: Array) -> Array | None:
        """Compute a metric of METRICS for resamples (B, I), the counts of each image → (B,). None if undefined."""
        if metric == "image_auroc":
            return self._image_auroc(counts)
        if self.pixels is None:
            return None
        clean = counts @ self.pixels.clean
        found = counts @ (self.pixels.found if metric == "pixel_auroc" else self.pixels.overlap)
        if not (clean[:, -1].all() and found[:, -1].all()):
            return None
        limit = 1.0 if metric == "pixel_auroc" else 0.3
        return np.array([_area(x / x[-1], y / y[-1], limit) for x, y in zip(clean, found, strict=True)])

    def _image_auroc(self, counts: Array) -> Array | None:
        bad = self.labels == 1
        if bad.all() or not bad.any():
            return None
        high, low = self.scores[bad][:, None], self.scores[~bad]
        wins = (high > low) + 0.5 * (high == low)
        drawn, others = counts[:, bad], counts[:, ~bad]
        return ((drawn @ wins) * others).sum(1) / (drawn.sum(1) * others.sum(1))


class MapSpool:
    """Maps and masks in a temporary file, until the thresholds are known."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="unflaw-maps-")  # noqa: SIM115 - closed with this object
        self._shapes: list[tuple[int, tuple[int, ...], bool]] = []

    def add(self, row: int, anomaly_map: Array, mask: Array | None) -> None:
        """Add a map (H, W), NaN outside the region of interest, and the bool mask of the image `row`."""
        self._file.write(np.ascontiguousarray(anomaly_map, np.float32).tobytes())
        if mask is not None:
            self._file.write(np.ascontiguousarray(mask, bool).tobytes())
        self._shapes.append((row, anomaly_map.shape, mask is not None))

    def tables(self, images: int, ranking: Ranking) -> PixelTables:
        """Count pixels at thresholds spread evenly over recall and over the logarithm of the FPR."""
        thresholds = _thresholds(ranking)
        clean, found, overlap = np.zeros((3, images, len(thresholds)), np.float32)
        self._file.seek(0)
        for row, shape, masked in self._shapes:
            values = np.frombuffer(self._file.read(4 * int(np.prod(shape))), np.float32).reshape(shape)
            mask = np.zeros(shape, bool)
            if masked:
                mask = np.frombuffer(self._file.read(int(np.prod(shape))), bool).reshape(shape)
            clean[row] = _at_or_above(values[~mask & ~np.isnan(values)], None, thresholds)
            found[row] = _at_or_above(values[mask], None, thresholds)
            overlap[row] = _at_or_above(values[mask], region_weights(mask), thresholds)
        return PixelTables(clean, found, overlap)


def resamples(labels: Array, draws: int = 1000, seed: int = 0) -> Array:
    """Draw resamples (draws, I): counts of each image, separately for good and defective ones; deterministic."""
    rng = np.random.default_rng(seed)
    counts = np.zeros((draws, len(labels)))
    for kind in (0, 1):
        rows = np.flatnonzero(labels == kind)
        if len(rows):
            counts[:, rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), draws)
    return counts


def interval(values: Array, level: float = 0.95) -> tuple[float, float]:
    """Bounds of the central share `level` of resampled values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resampled(runs: Sequence[PerImage], metric: str, draws: int = 1000) -> Array | None:
    """Mean of a metric over runs (seeds) on the same images, for every resample: (draws,). None if undefined.

    The spread is that of the images: seeds do not count as further images. Raises ValueError for runs of other images.
    """
    if any((run.names, run.labels.tolist()) != (runs[0].names, runs[0].labels.tolist()) for run in runs):
        raise ValueError("runs of different images cannot be compared")
    counts = resamples(runs[0].labels, draws)
    values = [run.values(metric, counts) for run in runs]
    known = [value for value in values if value is not None]
    return np.mean(known, axis=0) if len(known) == len(values) else None


def _thresholds(ranking: Ranking) -> Array:
    if not ranking.defined:
        return np.array([-np.inf], np.float32)
    half = THRESHOLDS // 2
    by_recall = np.searchsorted(ranking.tp, np.linspace(0, ranking.tp[-1], half))
    rates = np.geomspace(1, ranking.n_negatives, half)
    by_rate = np.searchsorted(ranking.fp, rates)
    rows = np.unique(np.concatenate([by_recall, by_rate]).clip(max=len(ranking.thresholds) - 1))
    return np.append(ranking.thresholds[rows], -np.inf)


def _at_or_above(values: Array, weights: Array | None, thresholds: Array) -> Array:
    """Number, or weight, of the values at or above each threshold."""
    order = np.argsort(values)
    number = np.searchsorted(values[order], thresholds, "left")
    if weights is None:
        return len(values) - number
    below = np.append(0, np.cumsum(weights[order]))
    return below[-1] - below[number]


def _area(x: Array, y: Array, limit: float) -> float:
    """Area under the curve through (0, 0) and the points (x, y), x rising to 1, from 0 to `limit`, over `limit`."""
    x, y = np.append(0, x), np.append(0, y)
    end, inside = np.interp(limit, x, y), x < limit
    x, y = np.append(x[inside], limit), np.append(y[inside], end)
    return float(trapezoid(y, x)) / limit
