"""The page of a benchmark: sortable tables, and quality against latency; one HTML file, nothing beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from unflaw.evaluation.bootstrap import METRICS as RESAMPLED
from unflaw.experiments.leaderboard import (
    HEADS,
    MEANING,
    Row,
    costs,
    difference,
    heading,
    measured,
    preamble,
    published,
    sections,
    shown,
)
from unflaw.report.html import templates

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 360, 56, 44  # of the plot, its margins for text
APART = 13  # pixels between labels
STEPS = (1, 2, 5)  # of a logarithmic axis, in each decade


def page(rows: Sequence[Row], bounds: Sequence[Row], pairs: Sequence[Row], made: Mapping[str, Any]) -> str:
    """The page as text; arguments as for `leaderboard.markdown`.

    Raises:
        ImportError: Jinja2 is not installed.
    """
    around, known = {(row["data"], row["method"], row["backbone"], row["size"]): row for row in bounds}, measured(rows)
    parts = [
        {
            "title": heading(data, members),
            "mean": not data,
            "rows": [
                {
                    "row": row,
                    "bounds": around.get((data, row["method"], row["backbone"], row["size"]), {}),
                    "costs": list(zip(costs(row, known), [row[name]["median"] for name in known], strict=True)),
                }
                for row in members
            ],
            "plot": plot(members),
        }
        for data, members in sections(rows).items()
    ]
    return (
        templates()
        .get_template("leaderboard.html.j2")
        .render(
            parts=sorted(parts, key=lambda part: not part["mean"]),
            names={name: HEADS[name] for name in shown(rows)},
            cost_names=known.values(),
            preamble=preamble(made),
            meaning=MEANING,
            published=published(rows),
            pairs=[(pair, [difference(pair[name]) for name in RESAMPLED]) for pair in pairs],
            resampled=[HEADS[name] for name in RESAMPLED],
        )
    )


def plot(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Image AUROC over milliseconds per image (logarithmic), in pixels of the plot; None where neither is known."""
    known = [
        (f"{row['method']} {row['backbone']} {row['size']}", row["latency_1"]["median"], row["image_auroc"]["median"])
        for row in rows
        if row["latency_1"]["median"] is not None and row["image_auroc"]["median"] is not None
    ]
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
