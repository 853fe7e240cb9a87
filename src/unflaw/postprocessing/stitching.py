"""Seamless blending of the maps of windows into those of an image. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from unflaw.imaging.tiling import TilingGeometry


def weights(starts: list[int], size: int, step: int = 1) -> np.ndarray:
    """Weights of windows along one side, (K, n), which sum to 1: raised cosines, normalized where they overlap.

    Args:
        starts: Starts of the windows on the canvas, ascending multiples of `step`.
        size: Size of a window, a multiple of `step`.
        step: Pixels of the canvas per value.
    """
    rise = np.sin(np.pi * (np.arange(0, size, step) + step / 2) / size) ** 2
    placed = np.zeros((len(starts), (starts[-1] + size) // step))
    for row, start in zip(placed, starts, strict=True):
        row[start // step : (start + size) // step] = rise
    return (placed / placed.sum(0)).astype(np.float32)


class TileStitcher:
    """Accumulator of the maps of the windows of one image; `layout` is its geometry."""

    def __init__(self, layout: TilingGeometry) -> None:
        self.layout, self.scores = layout, list[float]()
        starts = zip((layout.columns, layout.rows), layout.preparation.canvas, strict=True)
        self._across, self._down = (weights(begun, side, layout.step) for begun, side in starts)
        self._blended: dict[str, np.ndarray] = {}
        self._types: dict[str, np.dtype] = {}

    @property
    def complete(self) -> bool:
        """True when all windows have been added."""
        return len(self.scores) == len(self.layout)

    def add(self, score: float, found: Mapping[str, np.ndarray]) -> None:
        """Add the next window, in the order of `TilingGeometry.places`.

        Args:
            score: Image score of the window.
            found: Maps (H, W) of the window or images (H, W, 3) by name; uint8 stays uint8, "mask" stays 0 and 1.
        """
        layout, (width, height) = self.layout, self.layout.preparation.canvas
        (x, y), step = layout.places[len(self.scores)], layout.step
        here = np.s_[y // step : (y + height) // step, x // step : (x + width) // step]
        weight = np.outer(self._down[layout.rows.index(y)][here[0]], self._across[layout.columns.index(x)][here[1]])
        for name, values in found.items():
            if name not in self._blended:
                self._blended[name] = np.zeros((*layout.shape, *values.shape[2:]), np.float32)
                self._types[name] = values.dtype
            smaller = values
            if step > 1:
                smaller = values.reshape(height // step, step, width // step, step, *values.shape[2:]).mean((1, 3))
            self._blended[name][here] += smaller * weight.reshape(*weight.shape, *[1] * (values.ndim - 2))
        self.scores.append(score)

    def result(self) -> tuple[float, dict[str, np.ndarray]]:
        """Return the highest score of the windows and the blended maps by name.

        Outside a region of interest, the map "map" has its lowest value.
        """
        found = {}
        for name, values in self._blended.items():
            if name == "mask":
                found[name] = (values >= 0.5).astype(np.float32)
            else:
                found[name] = values.round().astype(np.uint8) if self._types[name] == np.uint8 else values
        counted = self.layout.counted
        if "map" in found and counted is not None:
            found["map"][~counted] = found["map"][counted].min()
        return max(self.scores), found
