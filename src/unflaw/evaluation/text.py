"""Figures of an evaluation as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unflaw.evaluation.results import defined
from unflaw.io.words import count


def lines(metrics: Mapping[str, Any]) -> str:
    """Metrics of one data set, a line for each kind of metric."""
    known = defined([metrics])
    kinds = [[name for name in known if name.startswith(kind)] for kind in ("image", "pixel", ("au", "spro"))]
    shown = ["  ".join(f"{name} {_number(metrics[name])}" for name in names) for names in kinds]
    return "\n".join([*shown, _verdicts(metrics), *_regions(metrics), metrics["calibration"], *_promise(metrics)])


def table(metrics: Mapping[str, Mapping[str, Any]], mean: Mapping[str, float | None]) -> str:
    """A row of metrics per category and their means, then the verdicts on each category."""
    side, mean = max(map(len, [*metrics, "mean"])), {name: mean[name] for name in defined(metrics.values())}
    rows = [
        "  ".join([name.ljust(side), *(_number(row[key]).rjust(len(key)) for key in mean)])
        for name, row in [*metrics.items(), ("mean", mean)]
    ]
    verdicts = [
        "; ".join([f"{name}: {_verdicts(row)}", row["calibration"], *_promise(row)]) for name, row in metrics.items()
    ]
    return "\n".join(["  ".join([" " * side, *mean]), *rows, *verdicts])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _verdicts(metrics: Mapping[str, Any]) -> str:
    return (
        f"{count(metrics['n_images'], 'image')}: {count(metrics['false_alarms'], 'false alarm')} among "
        f"{count(metrics['n_good'], 'good one')}, "
        f"{metrics['missed']} missed of {count(metrics['n_images'] - metrics['n_good'], 'defective one')}, "
        f"for review {metrics['review_good']} good and {count(metrics['review_defective'], 'defective one')}"
    )


def _promise(metrics: Mapping[str, Any]) -> list[str]:
    return [metrics["promise"]] if metrics.get("promise") else []


def _regions(metrics: Mapping[str, Any]) -> list[str]:
    """A line on predicted regions, where there are masks or good images to compare them with."""
    found = []
    if metrics["region_recall"] is not None:
        number = metrics["regions_found"]
        true = count(metrics["regions_true"], "true region")
        found.append(f"{number} of {true} {'is' if number == 1 else 'are'} touched by one")
    if metrics["false_regions"] is not None:
        found.append(f"{metrics['false_regions']:.3g} per good image, on {metrics['good_with_regions']:.2%} of these")
    return [f"regions: {'; '.join(found)}"] if found else []
