"""What an inspection returns: plain data without torch, the same from a trained detector and an exported one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from unflaw.io.brief import brief

if TYPE_CHECKING:
    pass

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
        contour: Corners (x, y) of the polygon around it, in pixels of the original image.
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
    """The inspection of one image. All maps are (h, w) float32 on the prepared canvas (see `Preparation`).

    h and w are the size of the canvas; of an image in tiles what it needs, up to `layout.MAP_PIXELS` in all.

    Attributes:
        score: Image score, raw and unbounded; comparable between images of one detector only.
        p_value: Share of held-out good images that score at least as high, in (0, 1]: `(1 + #{s_i >= s}) / (n + 1)`.
        verdict: "defect" where the score exceeds the threshold calibrated for the stated false-alarm rate; "review"
            where the evidence is ambiguous (see `Calibration.verdict`); else "good".
        map: Anomaly map, raw values.
        regions: Areas above the pixel threshold, largest peak first.
        image: (h, w, 3) uint8, the image as the detector saw it.
        valid: `(x0, y0, x1, y1)`, the part of the canvas which the image covers; the rest is padding.
        layers: The method's own images by name. Maps in [0, 1] such as "mean", "uncertainty" and "mask" (URA-Net's
            U, V and M_final); "restored" is (h, w, 3) uint8. Empty where the method has none.
        path: Where the image came from, if from a file.
        drift: p-value, in (0, 1], of the image as a whole being like those learned from (see `drift.Reference`);
            small where camera, light, focus or product have changed. None where the detector remembers none.
        described: What `drift.describe` says of the image, (D,).
        counted: (h, w) bool, what counts of the map; None where that is all of `valid`.
        size: (width, height) of the original image; (0, 0) where it is not known, and there are no regions.
        crop: `(x0, y0, x1, y1)`, what `valid` shows of the original image, in its pixels: all of it, or the region of
            interest.
        p_estimated: Where the calibration has a tail: an estimate of the share of good images that score higher,
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
    """The fixed colour scale of every heat map of a detector, set once from held-out good images.

    `low` (the median value on good images) is shown as 0 and `threshold` (the pixel threshold) as 0.5, so that a good
    part never glows, whatever its neighbours look like.
    """

    low: float
    threshold: float

    def __call__(self, anomaly_map: np.ndarray) -> np.ndarray:
        """Brings raw map values to [0, 1] for display."""
        return np.clip(0.5 * (anomaly_map - self.low) / max(self.threshold - self.low, 1e-12), 0, 1)
