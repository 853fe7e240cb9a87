"""The page of an experiment: sortable tables, and quality against latency; one HTML file, nothing beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from unflaw.experiments.tables import Section, row_label
from unflaw.report.html import templates

if TYPE_CHECKING:
    from pandas import DataFrame

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 360, 56, 44  # of the plot, its margins for text
APART = 13  # pixels between labels
WORDS = ("", "method", "variant", "backbone", "changed", "data", "difference", "source")  # columns that hold no numbers
STEPS = (1, 2, 5)  # of a logarithmic axis, in each decade


def page(parts: Sequence[Section], preamble: str) -> str:
    """The sections as a page, the means first, with a plot of each that holds latencies.

    Raises:
        ImportError: Jinja2 is not installed.
    """
    drawn = [(part, None if part.rows is None else plot(part.rows)) for part in parts]
    drawn.sort(key=lambda item: item[0].rows is None or item[0].rows.index[0][0] != "")
    template = templates().get_template("leaderboard.html.j2")
    return template.render(parts=drawn, preamble=preamble, words=WORDS, zip=zip)


def plot(rows: DataFrame) -> dict[str, Any] | None:
    """Image AUROC over milliseconds per image (logarithmic), in pixels of the plot; None where neither is known."""
    medians = zip(rows.index, rows["latency_1", "median"], rows["image_auroc", "median"], strict=True)
    known = [(row_label(row, size=True), x, y) for row, x, y in medians if not (math.isnan(x) or math.isnan(y))]
    if not known:
        return None
    ticks = [step * 10.0**power for power in range(-2, 6) for step in STEPS]
    low = max([t for t in ticks if t <= 0.95 * min(x for _, x, _ in known)] or ticks[:1])
    high = min([t for t in ticks if t >= 1.05 * max(x for _, x, _ in known)] or ticks[-1:])
    step = 0.01 if max(y for *_, y in known) - min(y for *_, y in known) < 0.08 else 0.05
    floor = step * math.floor(min(y for *_, y in known) / step - 0.2)
    ceiling = min(step * math.ceil(max(y for *_, y in known) / step + 0.2), 1.0)

    def right(x: float) -> float:
        return round(LEFT + (WIDTH - LEFT - 20) * math.log(x / low) / math.log(high / low), 1)

    def down(y: float) -> float:
        return round(10 + (HEIGHT - BOTTOM - 10) * (ceiling - y) / (ceiling - floor), 1)

    points: list[tuple[Any, ...]] = []
    for name, x, y in sorted(known, key=lambda point: -point[2]):  # labels from above, none on another
        label = down(y) + 4
        while any(abs(label - other[-1]) < APART and abs(right(x) - other[1]) < WIDTH / 2 for other in points):
            label += 1
        points.append((name, right(x), down(y), x, y, label))
    levels = [floor + step * i for i in range(round((ceiling - floor) / step) + 1)]
    return {
        "points": points,
        "across": [(f"{t:g}", right(t)) for t in ticks if low <= t <= high],
        "up": [(f"{level:.2f}", down(level)) for level in levels],
    }
