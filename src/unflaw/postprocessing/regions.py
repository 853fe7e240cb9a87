"""From an anomaly map to regions. NumPy and SciPy only, so that every runtime shares it."""

from __future__ import annotations

from itertools import groupby

import numpy as np
from scipy import ndimage

from unflaw.imaging.tiling import Box, TilingGeometry
from unflaw.postprocessing.results import Region

EIGHT_CONNECTED = np.ones((3, 3), dtype=int)
# the four headings of a walk around an area: right, down, left, up, as (rows, columns)
_STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))
# of each: where to shift the area to see the neighbour beyond the edge, and the corner of a pixel that the edge leaves
_WALLS = (((1, 0), (0, 0)), ((0, -1), (0, 1)), ((-1, 0), (1, 1)), ((0, 1), (1, 0)))


def find_regions(
    anomaly_map: np.ndarray,
    threshold: float,
    layout: TilingGeometry,
    limit: int = 100,
    *,
    minimum_area: float = 0.0,
    uncertainty: np.ndarray | None = None,
) -> tuple[Region, ...]:
    """8-connected areas above the threshold, highest peak first, in pixels of the original image.

    Args:
        anomaly_map: (h, w); what lies in the padding or outside of a region of interest is ignored.
        threshold: The calibrated pixel threshold.
        layout: Of the image.
        limit: At most this many regions.
        minimum_area: Smaller areas are no regions: share of the image, in [0, 1).
        uncertainty: (h, w), the uncertainty map, where there is one.
    """
    labels, n = flagged(anomaly_map, threshold, layout.box, minimum_area, layout.counted)
    if n == 0:
        return ()
    index = np.arange(1, n + 1)
    peaks = ndimage.maximum(anomaly_map, labels, index)
    highest = np.argsort(-peaks, kind="stable")[:limit]
    doubts = None if uncertainty is None else ndimage.mean(uncertainty, labels, index)
    areas, places = np.bincount(labels.ravel(), minlength=n + 1)[1:], ndimage.find_objects(labels)
    return tuple(
        Region(
            box=layout.to_original((columns.start, rows.start, columns.stop, rows.stop)),
            area=max(1, round(layout.area_to_original(float(areas[i])))),
            peak=float(peaks[i]),
            uncertainty=None if doubts is None else float(doubts[i]),
            contour=_rounded(layout.points_to_original(outline(labels[rows, columns] == i + 1) + corner)),
        )
        for i in highest.tolist()
        for rows, columns in [places[i]]
        for corner in [(columns.start, rows.start)]
    )


def _rounded(points: np.ndarray) -> tuple[tuple[float, float], ...]:
    """To hundredths of a pixel; of small images corners fall together, of which one stays."""
    return tuple(point for point, _ in groupby((round(x, 2), round(y, 2)) for x, y in points.tolist()))


def flagged(
    anomaly_map: np.ndarray,
    threshold: float,
    valid: Box,
    minimum_area: float = 0.0,
    counted: np.ndarray | None = None,
) -> tuple[np.ndarray, int]:
    """The regions of a map as labels (h, w), 0 elsewhere, and their number; see `find_regions`.

    `counted`: (h, w) bool, what counts of the map; None: all of `valid`.
    """
    above = (anomaly_map > threshold) & _inside(anomaly_map.shape, valid, counted)
    labels, n = ndimage.label(above, EIGHT_CONNECTED)
    least = pixels(minimum_area, valid)
    if n == 0 or least == 1:
        return labels, n
    large = np.bincount(labels.ravel()) >= least
    large[0] = False
    return np.where(large, np.cumsum(large), 0)[labels], int(large.sum())


def _inside(shape: tuple[int, ...], valid: Box, counted: np.ndarray | None) -> np.ndarray:
    if counted is not None:
        return counted
    inside = np.zeros(shape, bool)
    x0, y0, x1, y1 = valid
    inside[y0:y1, x0:x1] = True
    return inside


def region_level(
    anomaly_map: np.ndarray, valid: Box, minimum_area: float = 0.0, counted: np.ndarray | None = None
) -> float:
    """The least threshold at which a map has no region: its largest value where there is no minimum area.

    Below it there is one, so the rule that calibrates image scores calibrates the pixel threshold with it. It is the
    lowest value where less counts than the minimum area.
    """
    least, inside = pixels(minimum_area, valid), _inside(anomaly_map.shape, valid, counted)
    values = anomaly_map[inside]
    if least == 1 or len(values) < least:
        return float(values.max() if least == 1 else values.min())
    values.sort()
    # a threshold just below values[i] has a region, one at values[i] has none: bisection, as regions only grow downward
    low, high = 0, len(values) - least  # of the candidates, at least `least` values are as high
    while low < high:
        middle = (low + high + 1) // 2
        labels, _ = ndimage.label((anomaly_map >= values[middle]) & inside, EIGHT_CONNECTED)
        if np.bincount(labels.ravel())[1:].max() >= least:
            low = middle
        else:
            high = middle - 1
    return float(values[low])


def pixels(minimum_area: float, valid: Box) -> int:
    """A share of the image in pixels of the canvas, one at least."""
    x0, y0, x1, y1 = valid
    return max(1, round(minimum_area * (x1 - x0) * (y1 - y0)))


def outline(mask: np.ndarray) -> np.ndarray:
    """The outer border of an 8-connected area, (V, 2) corners (x, y) of pixels, clockwise as seen; holes are ignored.

    It runs along the edges of pixels, so that the polygon covers just these; where two touch at a corner it passes
    twice. A contour between pixel centres would be smoother and cover others.
    """
    area = np.pad(mask, 1)
    walls: dict[tuple[int, int], set[int]] = {}  # corner -> headings of the edges that leave it, area to their right
    for heading, (beside, leaves) in enumerate(_WALLS):
        edges = area & ~np.roll(area, beside, (0, 1))
        for row, column in (np.argwhere(edges) + leaves).tolist():
            walls.setdefault((row, column), set()).add(heading)
    start = corner = min(walls)  # the top left one, from where an edge goes to the right
    heading, turns = 0, [start]
    while True:
        corner = corner[0] + _STEPS[heading][0], corner[1] + _STEPS[heading][1]
        if corner == start:
            return np.array(turns)[:, ::-1] - 1
        left, right = (heading - 1) % 4, (heading + 1) % 4
        if heading not in walls[corner]:
            turns.append(corner)
        # where two pixels touch, the one to the left is of the area too
        heading = next(way for way in (left, heading, right) if way in walls[corner])
