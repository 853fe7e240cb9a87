"""From what was found in windows to what is shown of an image: maps blended without seams. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from unflaw.imaging.tiling import TilingGeometry


def weights(starts: list[int], size: int, step: int = 1) -> np.ndarray:
    """The weight of each of several windows along one side, (K, n): they sum to 1 everywhere.

    A raised cosine over each window, divided by the sum of those that overlap; where there is one window only, it
    counts in full.

    Args:
        starts: Of the windows, ascending, on the canvas; multiples of `step`.
        size: Of each window, a multiple of `step`.
        step: Pixels of the canvas to one of the n places.
    """
    rise = np.sin(np.pi * (np.arange(0, size, step) + step / 2) / size) ** 2
    placed = np.zeros((len(starts), (starts[-1] + size) // step))
    for row, start in zip(placed, starts, strict=True):
        row[start // step : (start + size) // step] = rise
    return (placed / placed.sum(0)).astype(np.float32)


class TileStitcher:
    """Gathers what was found in the windows of one image, window by window.

    Args:
        layout: Of the image. Its `shape` is that of all that comes out.
    """

    def __init__(self, layout: TilingGeometry) -> None:
        size = layout.preparation.size
        self.layout, self.scores = layout, list[float]()
        self._across, self._down = (weights(s, size, layout.step) for s in (layout.columns, layout.rows))
        self._blended: dict[str, np.ndarray] = {}
        self._types: dict[str, np.dtype] = {}

    @property
    def complete(self) -> bool:
        return len(self.scores) == len(self.layout)

    def add(self, score: float, found: Mapping[str, np.ndarray]) -> None:
        """The next window, in the order of `TilingGeometry.places`.

        Args:
            score: Its image score.
            found: Maps (size, size) or images (size, size, 3) by name; uint8 stays so, "mask" stays 0 and 1.
        """
        layout, size = self.layout, self.layout.preparation.size
        (x, y), step = layout.places[len(self.scores)], layout.step
        here = np.s_[y // step : (y + size) // step, x // step : (x + size) // step]
        weight = np.outer(self._down[layout.rows.index(y)][here[0]], self._across[layout.columns.index(x)][here[1]])
        for name, values in found.items():
            if name not in self._blended:
                self._blended[name] = np.zeros((*layout.shape, *values.shape[2:]), np.float32)
                self._types[name] = values.dtype
            smaller = values
            if step > 1:
                smaller = values.reshape(size // step, step, size // step, step, *values.shape[2:]).mean((1, 3))
            self._blended[name][here] += smaller * weight.reshape(*weight.shape, *[1] * (values.ndim - 2))
        self.scores.append(score)

    def result(self) -> tuple[float, dict[str, np.ndarray]]:
        """The score of the image, which is that of its highest window, and everything blended, by name.

        In the map, what does not count has its lowest value.
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
