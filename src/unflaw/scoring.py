"""From an anomaly map to regions. NumPy and SciPy only, so that every runtime shares it."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from unflaw.layout import Layout
from unflaw.results import Region

EIGHT_CONNECTED = np.ones((3, 3), dtype=int)


def find_regions(anomaly_map: np.ndarray, threshold: float, layout: Layout, limit: int = 100) -> tuple[Region, ...]:
    """8-connected areas above the threshold, highest peak first, in pixels of the original picture.

    Args:
        anomaly_map: (h, w); what lies in the padding is ignored.
        threshold: The calibrated pixel threshold.
        layout: Of the picture.
        limit: At most this many regions.
    """
    x0, y0, x1, y1 = layout.box
    above = np.zeros(anomaly_map.shape, dtype=bool)
    above[y0:y1, x0:x1] = anomaly_map[y0:y1, x0:x1] > threshold
    labels, n = ndimage.label(above, EIGHT_CONNECTED)
    if n == 0:
        return ()
    index = range(1, n + 1)
    peaks = ndimage.maximum(anomaly_map, labels, index)
    areas = np.bincount(labels.ravel(), minlength=n + 1)[1:]
    regions = [
        Region(
            box=layout.to_original((cols.start, rows.start, cols.stop, rows.stop)),
            area=max(1, round(layout.area_to_original(float(area)))),
            peak=float(peak),
        )
        for (rows, cols), area, peak in zip(ndimage.find_objects(labels), areas, peaks, strict=True)
    ]
    return tuple(sorted(regions, key=lambda region: -region.peak)[:limit])
