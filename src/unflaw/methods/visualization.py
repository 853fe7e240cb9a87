"""Figures of the steps of a method. Methods name tensors (`Method.visualize`); `unflaw.report.figures` draws them."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor


class Stage(NamedTuple):
    """One tile.

    Attributes:
        kind: Drawing style of `values`, which are resized to the image:
            "image": (3, h, w) in [0, 1], as it is;
            "features": F (C, g, g), by the display decoder of the detector; left out if it has none;
            "mask": (1, h, w) in {0, 1}, white where 1;
            "cover": likewise, the row's image where 1 and covered where 0;
            "share": (1, h, w) in [0, 1], grey;
            "map": (1, h, w), at least 0, in colours from 0 to `limit`.
        values: Tensor to draw.
        limit: Value of a map that has the lightest colour; None: the largest one of its column.
        seen: (1, h, w) in {0, 1}, 0 where values are covered; None: nowhere.
    """

    kind: Literal["image", "features", "mask", "cover", "share", "map"]
    values: Tensor
    limit: float | None = None
    seen: Tensor | None = None


Row = tuple[str, dict[str, Stage]]  # title of the row, "" where it needs none; tiles by heading
Stages = dict[str, list[Row]]  # the rows of each figure, by the figure's name
