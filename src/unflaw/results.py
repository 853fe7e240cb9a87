"""What an inspection returns: plain data without torch, the same from a trained detector and an exported one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from unflaw.brief import brief

if TYPE_CHECKING:
    from unflaw.statistics import PerPicture

Verdict = Literal["good", "review", "defect"]
# Figures of an evaluation that can be compared, in the order in which they are shown.
METRICS = (
    *("image_auroc", "image_ap", "image_f1_max"),
    *("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro_30", "aupro_05", "aupimo", "spro_05"),
)
RARE = ("aupimo", "spro_05")


@brief
@dataclass(frozen=True)
class Region:
    """A connected area of the anomaly map above the detector's pixel threshold.

    Attributes:
        box: `(x0, y0, x1, y1)` in pixels of the original picture; x1 and y1 are exclusive.
        area: Pixels of the original picture.
        peak: Largest map value inside.
        uncertainty: Mean of the uncertainty map inside; None where the method does not estimate one.
        contour: Corners (x, y) of the polygon around it, in pixels of the original picture.
    """

    box: tuple[int, int, int, int]
    area: int
    peak: float
    uncertainty: float | None = None
    contour: tuple[tuple[float, float], ...] = ()

    def to_json(self, contour: bool = False) -> dict[str, Any]:
        """What is known, as JSON; the contour where it is asked for."""
        found: dict[str, Any] = {"box": list(self.box), "area": self.area, "peak": self.peak}
        if self.uncertainty is not None:
            found["uncertainty"] = self.uncertainty
        return found | ({"contour": [list(point) for point in self.contour]} if contour else {})


@brief
@dataclass(frozen=True)
class Result:
    """The inspection of one picture. All maps are (h, w) float32 on the prepared canvas (see `Preparation`).

    h and w are the size of the canvas; of a picture in tiles what it needs, up to `layout.MAP_PIXELS` in all.

    Attributes:
        score: Image score, raw and unbounded; comparable between pictures of one detector only.
        p_value: Share of held-out good pictures that score at least as high, in (0, 1]: `(1 + #{s_i >= s}) / (n + 1)`.
        verdict: "defect" where the score exceeds the threshold calibrated for the stated false-alarm rate; "review"
            where the evidence is ambiguous (see `Calibration.verdict`); else "good".
        map: Anomaly map, raw values.
        regions: Areas above the pixel threshold, largest peak first.
        image: (h, w, 3) uint8, the picture as the detector saw it.
        valid: `(x0, y0, x1, y1)`, the part of the canvas which the picture covers; the rest is padding.
        layers: The method's own pictures by name. Maps in [0, 1] such as "mean", "uncertainty" and "mask" (URA-Net's
            U, V and M_final); "restored" is (h, w, 3) uint8. Empty where the method has none.
        path: Where the picture came from, if from a file.
        drift: p-value, in (0, 1], of the picture as a whole being like those learned from (see `drift.Reference`);
            small where camera, light, focus or product have changed. None where the detector remembers none.
        described: What `drift.describe` says of the picture, (D,).
        counted: (h, w) bool, what counts of the map; None where that is all of `valid`.
        size: (width, height) of the original picture; (0, 0) where it is not known, and there are no regions.
        crop: `(x0, y0, x1, y1)`, what `valid` shows of the original picture, in its pixels: all of it, or the region of
            interest.
        p_estimated: Where the calibration has a tail: an estimate of the share of good pictures that score higher,
            which goes below what `p_value` can reach.
    """

    score: float
    p_value: float
    verdict: Verdict
    map: np.ndarray
    regions: tuple[Region, ...]
    image: np.ndarray
    valid: tuple[int, int, int, int]
    layers: dict[str, np.ndarray] = field(default_factory=dict)
    path: str | None = None
    drift: float | None = None
    described: np.ndarray | None = field(default=None, repr=False)
    counted: np.ndarray | None = field(default=None, repr=False)
    size: tuple[int, int] = (0, 0)
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    p_estimated: float | None = None

    @property
    def uncertainty(self) -> np.ndarray | None:
        """The uncertainty map V, or None where the method does not estimate one."""
        return self.layers.get("uncertainty")

    def to_json(self, contours: bool = False) -> dict[str, Any]:
        """One line of `results.jsonl`: numbers only, no maps; contours of regions where they are asked for."""
        estimated = {} if self.p_estimated is None else {"p_estimated": self.p_estimated}
        return {
            "path": self.path,
            "score": self.score,
            "p_value": self.p_value,
            **estimated,
            "verdict": self.verdict,
            "drift": self.drift,
            "regions": [region.to_json(contours) for region in self.regions],
        }


@dataclass(frozen=True)
class Scale:
    """The fixed colour scale of every heat map of a detector, set once from held-out good pictures.

    `low` (the median value on good pictures) is shown as 0 and `threshold` (the pixel threshold) as 0.5, so that a good
    part never glows, whatever its neighbours look like.
    """

    low: float
    threshold: float

    def __call__(self, anomaly_map: np.ndarray) -> np.ndarray:
        """Brings raw map values to [0, 1] for display."""
        return np.clip(0.5 * (anomaly_map - self.low) / max(self.threshold - self.low, 1e-12), 0, 1)


@brief
@dataclass(frozen=True)
class Inspected:
    """One labelled test picture and its inspection."""

    result: Result
    label: int
    defect: str
    mask: np.ndarray | None


@brief
@dataclass
class Evaluation:
    """A detector measured on a labelled set.

    Attributes:
        metrics: The JSON record: METRICS, `per_defect n_images`, verdict counts, timing and configuration. None where a
            metric is undefined. "category" where the detector has several.
        rows: Per picture `path label defect score p_value verdict`.
        curves: Points for plots, `name -> (x, y)`: "roc" and "pr" over images, "pro" over pixels.
        shown: Pictures kept whole for the report: mistakes and a sample of each defect type, worst mistakes first.
        skipped: `(path, reason)` of pictures that could not be read.
        pictures: For `statistics`, where asked for.
    """

    metrics: dict[str, Any]
    rows: list[dict[str, Any]]
    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    shown: list[Inspected]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    pictures: PerPicture | None = None


def mean_metrics(evaluations: Mapping[str, Evaluation]) -> dict[str, float | None]:
    """Mean of each of METRICS over the data sets where it is defined; None where it is in none."""
    found = {name: [evaluation.metrics.get(name) for evaluation in evaluations.values()] for name in METRICS}
    known = {name: [value for value in values if value is not None] for name, values in found.items()}
    return {name: fmean(values) if values else None for name, values in known.items()}


def defined(metrics: Iterable[Mapping[str, Any]]) -> list[str]:
    """Those of METRICS to show: all, except that the rarer ones must be defined on one data set at least."""
    found = list(metrics)
    return [name for name in METRICS if name not in RARE or any(row.get(name) is not None for row in found)]
