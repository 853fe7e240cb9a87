"""Regions of an anomaly map. NumPy and SciPy only, for every runtime."""

from __future__ import annotations

from itertools import groupby

import numpy as np
from scipy import ndimage

from unflaw.imaging.tiling import Box, TilingGeometry
from unflaw.postprocessing.results import Region

EIGHT_CONNECTED = np.ones((3, 3), dtype=int)
# Headings of a walk around an area: right, down, left, up, as (rows, columns)
_STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))
# For each heading: the shift that brings the neighbour beyond the edge, and the corner of a pixel where the edge starts
_EDGES = (((1, 0), (0, 0)), ((0, -1), (0, 1)), ((-1, 0), (1, 1)), ((0, 1), (1, 0)))


def find_regions(
    anomaly_map: np.ndarray,
    threshold: float,
    layout: TilingGeometry,
    limit: int = 100,
    *,
    minimum_area: float = 0.0,
    uncertainty: np.ndarray | None = None,
) -> tuple[Region, ...]:
    """Find 8-connected areas above the threshold, highest peak first, in pixels of the original image.

    Args:
        anomaly_map: (h, w); padding and pixels outside a region of interest are ignored.
        threshold: Calibrated pixel threshold.
        layout: Geometry of the image.
        limit: Maximum number of regions.
        minimum_area: Smallest area of a region, share of the image in [0, 1).
        uncertainty: Uncertainty map (h, w), if the method has one.
    """
    labels, n = flagged(anomaly_map, threshold, layout.box, minimum_area, layout.counted)
    if n == 0:
        return ()
    index = np.arange(1, n + 1)
    peaks = ndimage.maximum(anomaly_map, labels, index)
    highest = np.argsort(-peaks, kind="stable")[:limit]
    means = None if uncertainty is None else ndimage.mean(uncertainty, labels, index)
    areas, places = np.bincount(labels.ravel(), minlength=n + 1)[1:], ndimage.find_objects(labels)
    regions = []
    for i in highest.tolist():
        rows, columns = places[i]
        corner = columns.start, rows.start
        points = layout.points_to_original(outline(labels[rows, columns] == i + 1) + corner).tolist()
        rounded = ((round(x, 2), round(y, 2)) for x, y in points)
        region = Region(
            box=layout.to_original((columns.start, rows.start, columns.stop, rows.stop)),
            area=max(1, round(layout.area_to_original(float(areas[i])))),
            peak=float(peaks[i]),
            uncertainty=None if means is None else float(means[i]),
            contour=tuple(point for point, _ in groupby(rounded)),  # in small images, rounded corners coincide
        )
        regions.append(region)
    return tuple(regions)


def flagged(
    anomaly_map: np.ndarray,
    threshold: float,
    valid: Box,
    minimum_area: float = 0.0,
    counted: np.ndarray | None = None,
) -> tuple[np.ndarray, int]:
    """Label the regions of a map, (h, w) with 0 elsewhere, and return their number; see `find_regions`.

    `counted`: region of interest, (h, w) bool; None: all of `valid`.
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
    """Least threshold at which a map has no region: its largest value if there is no minimum area.

    At any lower threshold there is a region, so the pixel threshold is calibrated with it like an image score. If
    fewer pixels count than the minimum area has, it is the lowest value.
    """
    least, inside = pixels(minimum_area, valid), _inside(anomaly_map.shape, valid, counted)
    values = anomaly_map[inside]
    if least == 1 or len(values) < least:
        return float(values.max() if least == 1 else values.min())
    values.sort()
    # bisection, as regions grow with a falling threshold: there is one just below the result, and none at it
    low, high = 0, len(values) - least  # at least `least` values are as high as a candidate
    while low < high:
        middle = (low + high + 1) // 2
        labels, _ = ndimage.label((anomaly_map >= values[middle]) & inside, EIGHT_CONNECTED)
        if np.bincount(labels.ravel())[1:].max() >= least:
            low = middle
        else:
            high = middle - 1
    return float(values[low])


def pixels(minimum_area: float, valid: Box) -> int:
    """Convert a share of the image to pixels of the canvas, at least one."""
    x0, y0, x1, y1 = valid
    return max(1, round(minimum_area * (x1 - x0) * (y1 - y0)))


def outline(mask: np.ndarray) -> np.ndarray:
    """Trace the outer border of an 8-connected area: corners of pixels (V, 2) as (x, y), clockwise; holes are ignored.

    The polygon follows pixel edges and thus covers exactly the area; it passes twice where two pixels touch at a
    corner. A contour between pixel centres would be smoother, but cover another area.
    """
    area = np.pad(mask, 1)
    headings: dict[tuple[int, int], set[int]] = {}  # corner -> headings of the edges from it, area to their right
    for heading, (shift, start) in enumerate(_EDGES):
        edges = area & ~np.roll(area, shift, (0, 1))
        for row, column in (np.argwhere(edges) + start).tolist():
            headings.setdefault((row, column), set()).add(heading)
    first = corner = min(headings)  # the top left one, from which an edge leads to the right
    heading, turns = 0, [first]
    while True:
        corner = corner[0] + _STEPS[heading][0], corner[1] + _STEPS[heading][1]
        if corner == first:
            return np.array(turns)[:, ::-1] - 1
        left, right = (heading - 1) % 4, (heading + 1) % 4
        if heading not in headings[corner]:
            turns.append(corner)
        # where two pixels touch at a corner, the one to the left belongs to the area too
        heading = next(turn for turn in (left, heading, right) if turn in headings[corner])
