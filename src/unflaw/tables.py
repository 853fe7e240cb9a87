"""Metrics of an evaluation as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unflaw.results import defined


def lines(metrics: Mapping[str, Any]) -> str:
    """What was measured on one data set, a line for each kind of metric."""
    known = defined([metrics])
    kinds = [[name for name in known if name.startswith(kind)] for kind in ("image", "pixel", ("au", "spro"))]
    shown = ["  ".join(f"{name} {_number(metrics[name])}" for name in names) for names in kinds]
    return "\n".join([*shown, _verdicts(metrics), metrics["calibration"]])


def table(metrics: Mapping[str, Mapping[str, Any]], mean: Mapping[str, float | None]) -> str:
    """A row of metrics per category and their means, then the verdicts on each category."""
    side, mean = max(map(len, [*metrics, "mean"])), {name: mean[name] for name in defined(metrics.values())}
    rows = [
        "  ".join([name.ljust(side), *(_number(row[key]).rjust(len(key)) for key in mean)])
        for name, row in [*metrics.items(), ("mean", mean)]
    ]
    verdicts = [f"{name}: {_verdicts(row)}; {row['calibration']}" for name, row in metrics.items()]
    return "\n".join(["  ".join([" " * side, *mean]), *rows, *verdicts])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _verdicts(metrics: Mapping[str, Any]) -> str:
    return (
        f"{metrics['n_images']} pictures: {metrics['false_alarms']} false alarms among {metrics['n_good']} good ones, "
        f"{metrics['missed']} missed of {metrics['n_images'] - metrics['n_good']} defective ones"
    )
