"""Results of an inspection: plain data without torch, equal for trained and exported detectors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from unflaw.io.brief import brief

Verdict = Literal["good", "review", "defect"]


@brief
@dataclass(frozen=True)
class Region:
    """A connected area of the anomaly map above the detector's pixel threshold.

    Attributes:
        box: `(x0, y0, x1, y1)` in pixels of the original image; x1 and y1 are exclusive.
        area: Pixels of the original image.
        peak: Largest map value inside.
        uncertainty: Mean of the uncertainty map inside; None where the method does not estimate one.
        contour: Corners (x, y) of its outline, in pixels of the original image.
    """

    box: tuple[int, int, int, int]
    area: int
    peak: float
    uncertainty: float | None = None
    contour: tuple[tuple[float, float], ...] = ()

    def to_json(self, contour: bool = False) -> dict[str, Any]:
        """Return the region as JSON, with its contour on request."""
        found: dict[str, Any] = {"box": list(self.box), "area": self.area, "peak": self.peak}
        if self.uncertainty is not None:
            found["uncertainty"] = self.uncertainty
        return found | ({"contour": [list(point) for point in self.contour]} if contour else {})


@brief
@dataclass(frozen=True)
class Result:
    """Result for one image. All maps are (h, w) float32 on the canvas (see `Preparation`).

    With tiles, h and w depend on the image, up to `tiling.MAP_PIXELS` in all.

    Attributes:
        score: Raw image score, unbounded; comparable only between images of one detector.
        p_value: Share of held-out good images that score at least as high, in (0, 1]: `(1 + #{s_i >= s}) / (n + 1)`.
        verdict: "defect" if the score exceeds the threshold calibrated for the stated false-alarm rate; "review" if the
            result is ambiguous (see `Calibration.verdict`); else "good".
        map: Anomaly map, raw values.
        regions: Areas above the pixel threshold, largest peak first.
        image: (h, w, 3) uint8, the prepared image.
        valid: `(x0, y0, x1, y1)`, the part of the canvas that the image fills; the rest is padding.
        layers: Images of the method by name: maps in [0, 1] such as "mean", "uncertainty" and "mask" (URA-Net's U, V
            and M_final); "restored" is (h, w, 3) uint8.
        path: Path of the image, if it is a file.
        drift: p-value, in (0, 1], of the whole image resembling the training images (see `drift.Reference`); small if
            camera, light, focus or product have changed. None if the detector has no reference.
        described: `statistics.describe` of the image, (D,).
        counted: Region of interest on the map, (h, w) bool; None: all of `valid`.
        size: (width, height) of the original image; (0, 0) if unknown, and there are no regions then.
        crop: `(x0, y0, x1, y1)`, the part of the original image that `valid` shows, in its pixels: all of it, or the
            region of interest.
        p_estimated: Estimated share of good images that score higher, below the smallest `p_value`; None if the
            calibration has no tail.
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
        """The uncertainty map V, or None if the method does not estimate one."""
        return self.layers.get("uncertainty")

    def to_json(self, contours: bool = False) -> dict[str, Any]:
        """Return a line of `results.jsonl`: numbers, no maps, with contours of regions on request."""
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
    """Colour scale of all heat maps of a detector, from held-out good images.

    `low` (the median value on good images) is shown as 0 and `threshold` (the pixel threshold) as 0.5, so that good
    images stay dark.
    """

    low: float
    threshold: float

    def up_to(self, anomaly_map: np.ndarray) -> Scale:
        """A scale on which the highest value of a map is shown as 1, where that is below the threshold's 0.5."""
        highest = float(anomaly_map.max())
        return self if highest >= self.threshold else Scale(self.low, (self.low + highest) / 2)

    def __call__(self, anomaly_map: np.ndarray) -> np.ndarray:
        """Scale raw map values to [0, 1] for display."""
        return np.clip(0.5 * (anomaly_map - self.low) / max(self.threshold - self.low, 1e-12), 0, 1)
