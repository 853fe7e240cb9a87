"""Simple statistics of an image that drift detection compares."""

from __future__ import annotations

import numpy as np
from PIL import Image

SIDE = 256  # images are resized to this side, pixels
CELLS = 8  # cells per side of the grid over which quantiles are taken
BANDS = 4  # octaves of sharpness, each at half the resolution of the one before
FLOOR = 1 / 1024  # a quarter of a grey level: smaller steps count as flat
_BANDS = [f"{2**k} px {way}" for k in range(BANDS) for way in ("across", "down")]
_LEVELS = ("shadows", "lower quartile", "median", "upper quartile", "highlights")
STATISTICS = {  # name of each statistic -> aspect that it measures
    **{f"{level} of the light": "light" for level in _LEVELS},
    **{f"{channel} against green": "colour" for channel in ("red", "blue")},
    **{f"{part} edges, {band}": "sharpness" for part in ("median", "strong") for band in _BANDS},
    **{f"light of cell {row}, {column}": "place" for row in range(CELLS) for column in range(CELLS)},
}


def describe(image: np.ndarray) -> np.ndarray:
    """Compute the `STATISTICS` of an image (h, w, 3) uint8 without padding: (D,) float16."""
    if image.shape[:2] != (SIDE, SIDE):
        image = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    red, green, blue = (_cells(channel) for channel in np.moveaxis(image, 2, 0) / np.float32(255))
    grey = image.sum(2, dtype=np.float32) / (3 * 255)
    shadows, highlights = np.quantile(grey, (0.01, 0.99))
    light = _cells(grey)
    quartiles = np.quantile(light, (0.25, 0.5, 0.75))
    edges = []  # log of the mean step between neighbours, by cell
    for _ in range(BANDS):
        edges += [
            np.log(_cells(np.abs(np.diff(grey, axis=axis, append=grey.take([-1], axis)))) + FLOOR) for axis in (1, 0)
        ]
        grey = grey.reshape(len(grey) // 2, 2, -1, 2).mean((1, 3))
    sharpness = np.quantile(np.stack(edges), (0.5, 0.9), axis=(1, 2))
    colour = np.median(red - green), np.median(blue - green)
    described = [[shadows], quartiles, [highlights], colour, sharpness.ravel(), (light - quartiles[1]).ravel()]
    return np.concatenate(described).astype(np.float16)


def _cells(values: np.ndarray) -> np.ndarray:
    """Mean of each cell, (CELLS, CELLS)."""
    side = len(values) // CELLS
    return values.reshape(CELLS, side, CELLS, -1).mean((1, 3))
