"""What review is worth: errors left against the share of images that people look at (risk and coverage)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unflaw.calibration.thresholds import Calibration
from unflaw.evaluation.metrics import Array


def review_order(rows: Sequence[Mapping[str, Any]], calibration: Calibration, *, uncertainty: bool = False) -> Array:
    """Rows of an evaluation in the order in which widening review takes them.

    By p-value alone, as the band of `Calibration.verdict` does: images below the threshold, highest score first;
    then the others, lowest first. With uncertainty, first come the others whose first region it dominates, the most
    uncertain first.

    Args:
        rows: Each with "score" and, for `uncertainty`, "uncertainty": that of the first region, None without one.
        calibration: Says the threshold, and from which uncertainty on a region is dominated.
    """
    scores = np.array([row["score"] for row in rows], float)
    called = scores > calibration.threshold
    doubts = np.zeros(len(rows))
    limit = calibration.uncertainty_threshold
    if uncertainty and limit is not None:
        found = np.array([row["uncertainty"] or 0.0 for row in rows])
        doubts = np.where(called & (found > limit), found, 0.0)
    return np.lexsort((np.where(called, scores, -scores), called, -doubts))


def errors_left(wrong: Array, order: Array) -> tuple[Array, Array]:
    """The share sent to review, rising from 0 to 1, and the errors among the others, as a share of all images.

    Args:
        wrong: (N,) bool, which verdicts would be wrong without review.
        order: (N,) in which images are reviewed.
    """
    n = len(wrong)
    return np.arange(n + 1) / n, (wrong.sum() - np.append(0, np.cumsum(wrong[order]))) / n


def risk(rows: Sequence[Mapping[str, Any]], calibration: Calibration) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `errors_left` makes of an evaluation.

    Args:
        rows: As for `review_order`, with "label".

    Returns:
        "error_rate" without review; "areas" under the curves "p_value", "uncertainty" (with it; left out where the
        method has none), "ideal" (errors first) and "random"; "errors_left" of the first two when the shares "reviewed"
        are. Then whole curves for plots, as shares of the errors: "risk" and, if there, "risk_uncertainty".
    """
    scores, labels = (np.array([row[name] for row in rows], float) for name in ("score", "label"))
    wrong = (scores > calibration.threshold) != (labels == 1)
    found = {"p_value": errors_left(wrong, review_order(rows, calibration))}
    if calibration.uncertainty_threshold is not None:
        found["uncertainty"] = errors_left(wrong, review_order(rows, calibration, uncertainty=True))
    ideal = errors_left(wrong, np.argsort(~wrong, kind="stable"))
    shares = np.linspace(0, 1, 21)
    record = {
        "error_rate": float(wrong.mean()),
        "areas": {
            **{name: _area(*curve) for name, curve in found.items()},
            "ideal": _area(*ideal),
            "random": float(wrong.mean()) / 2,
        },
        "reviewed": shares.round(2).tolist(),
        "errors_left": {name: np.interp(shares, *curve).round(6).tolist() for name, curve in found.items()},
    }
    names = {"p_value": "risk", "uncertainty": "risk_uncertainty"}
    return record, {names[name]: (share, left / max(left[0], 1e-12)) for name, (share, left) in found.items()}


def _area(x: Array, y: Array) -> float:
    return float(np.diff(x) @ (y[1:] + y[:-1]) / 2)
