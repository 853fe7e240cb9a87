"""Results of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from unflaw.io.brief import brief
from unflaw.postprocessing.results import Result

if TYPE_CHECKING:
    from unflaw.evaluation.bootstrap import PerImage


# Metrics of an evaluation, in the order in which they are shown
METRICS = (
    *("image_auroc", "image_ap", "image_f1_max"),
    *("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro_30", "aupro_05", "aupimo", "spro_05"),
)
RARE = ("aupimo", "spro_05")  # shown only if defined


@brief
@dataclass(frozen=True)
class Inspected:
    """One labelled test image and its inspection."""

    result: Result
    label: int
    defect: str
    mask: np.ndarray | None


@brief
@dataclass
class Evaluation:
    """Metrics of a detector on a labelled set.

    Attributes:
        metrics: The JSON record: METRICS, `per_defect n_images`, verdict counts, timing and configuration. None if a
            metric is undefined. "category" if the detector has several.
        rows: Per image `path label defect score p_value verdict`.
        curves: Points for plots, `name -> (x, y)`: "roc" and "pr" over images, "pro" over pixels.
        shown: Images for the report: mistakes and a sample of each defect type, worst mistakes first.
        skipped: `(path, reason)` of images that could not be read.
        images: Data of each image for `bootstrap`, on request.
    """

    metrics: dict[str, Any]
    rows: list[dict[str, Any]]
    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    shown: list[Inspected]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    images: PerImage | None = None


def mean_metrics(evaluations: Mapping[str, Evaluation]) -> dict[str, float | None]:
    """Mean of each of METRICS over the data sets on which it is defined; None if it is on none."""
    found = {name: [evaluation.metrics.get(name) for evaluation in evaluations.values()] for name in METRICS}
    known = {name: [value for value in values if value is not None] for name, values in found.items()}
    return {name: fmean(values) if values else None for name, values in known.items()}


def defined(metrics: Iterable[Mapping[str, Any]]) -> list[str]:
    """List METRICS to show: all, except RARE ones that are defined on no data set."""
    found = list(metrics)
    return [name for name in METRICS if name not in RARE or any(row.get(name) is not None for row in found)]
