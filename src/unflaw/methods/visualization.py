"""What a method shows of its work. Methods name tensors (`Method.stages`); `unflaw.report.figures` draws them."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor


class Stage(NamedTuple):
    """One tile.

    Attributes:
        kind: How `values` are drawn, all brought to the size of the image:
            "image": (3, h, w) in [0, 1], as it is;
            "features": F (C, g, g), by the detector's display decoder; left out where it has none;
            "mask": (1, h, w) in {0, 1}, white where 1;
            "cover": likewise, the row's image where 1 and covered where 0;
            "share": (1, h, w) in [0, 1], grey;
            "map": (1, h, w), at least 0, in colours from 0 to `limit`.
        values: What is drawn.
        limit: Of a map, the value shown in the lightest colour; None: the largest one of its column.
        seen: (1, h, w) in {0, 1}: values are covered where it is 0; None: nowhere.
    """

    kind: Literal["image", "features", "mask", "cover", "share", "map"]
    values: Tensor
    limit: float | None = None
    seen: Tensor | None = None


Row = tuple[str, dict[str, Stage]]  # what the row shows, "" where its image says it all; tiles by heading
Stages = dict[str, list[Row]]  # the rows of each figure, by the figure's name
