"""Risk-coverage curves: errors that remain against the share of images that people review."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.integrate import trapezoid

from unflaw.calibration.thresholds import Calibration
from unflaw.evaluation.metrics import Array


def review_order(rows: Sequence[Mapping[str, Any]], calibration: Calibration, *, uncertainty: bool = False) -> Array:
    """Order of the rows of an evaluation, (N,), in which a growing review rate selects them.

    By p-value alone, as in `Calibration.verdict`: images below the threshold, highest score first; then the others,
    lowest first. With uncertainty, images above the threshold whose first region is dominated by it come first, the
    most uncertain of them first.

    Args:
        rows: Each with "score" and, for `uncertainty`, "uncertainty": that of the first region, or None.
        calibration: Defines the threshold and the uncertainty from which a region is dominated.
    """
    scores = np.array([row["score"] for row in rows], float)
    called = scores > calibration.threshold
    dominated = np.zeros(len(rows))
    limit = calibration.uncertainty_threshold
    if uncertainty and limit is not None:
        found = np.array([row["uncertainty"] or 0.0 for row in rows])
        dominated = np.where(called & (found > limit), found, 0.0)
    return np.lexsort((np.where(called, scores, -scores), called, -dominated))


def errors_left(wrong: Array, order: Array) -> tuple[Array, Array]:
    """Share of reviewed images, from 0 to 1, and errors among the others, as a share of all images.

    `wrong`: (N,) bool, True if the verdict without review is wrong. `order`: (N,) order of review.
    """
    n = len(wrong)
    return np.arange(n + 1) / n, (wrong.sum() - np.append(0, np.cumsum(wrong[order]))) / n


def risk(rows: Sequence[Mapping[str, Any]], calibration: Calibration) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compute the risk-coverage curves of an evaluation.

    Args:
        rows: See `review_order`; also with "label".

    Returns:
        A record and curves for plots. Record: "error_rate" without review; "areas" under the curves "p_value",
        "uncertainty" (if the method has it), "ideal" (errors first) and "random"; "errors_left" of the first two at the
        shares "reviewed". Curves, as shares of the errors: "risk" and, if there, "risk_uncertainty".
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
            **{name: float(trapezoid(left, share)) for name, (share, left) in found.items()},
            "ideal": float(trapezoid(ideal[1], ideal[0])),
            "random": float(wrong.mean()) / 2,
        },
        "reviewed": shares.round(2).tolist(),
        "errors_left": {name: np.interp(shares, *curve).round(6).tolist() for name, curve in found.items()},
    }
    names = {"p_value": "risk", "uncertainty": "risk_uncertainty"}
    return record, {names[name]: (share, left / max(left[0], 1e-12)) for name, (share, left) in found.items()}
