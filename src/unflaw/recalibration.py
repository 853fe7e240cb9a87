"""Thresholds anew for a detector that has learned already: see `Detector.calibrate`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from unflaw.calibration import Calibration, calibrate
from unflaw.datasets.samples import Sample, digest, short_digest
from unflaw.detector import Detector
from unflaw.drift import Reference
from unflaw.errors import TrainingError
from unflaw.results import Result
from unflaw.streams import Progress


def recalibrate(
    detector: Detector,
    good: Sequence[Path],
    defects: Sequence[Path],
    *,
    rate: float | None,
    miss_rate: float | None,
    cost_ratio: float | None,
    category: str | None,
    keep: bool,
    progress: Progress,
) -> Calibration:
    """What `Detector.calibrate` does; arguments, result and errors are said there. On an error nothing changes."""
    before, config = detector.select(category), detector.config.calibration
    paths = [good, defects]
    seen = set(detector.record_.get("seen", []))
    if known := [path for path in paths[0] if path.is_file() and short_digest(path) in seen]:
        raise TrainingError(
            f"{known[0]}: the detector has learned from this one and {len(known) - 1} more of the good pictures, "
            "and finds them more normal than new ones. Leave them out"
        )
    scores: list[list[float]] = [[], []]
    peaks, medians, described = list[float](), list[float](), list[np.ndarray]()
    total = sum(map(len, paths))
    for kind, part in enumerate(paths):
        for outcome in detector.inspect_many(part, category=category):
            if not isinstance(outcome, Result):
                raise TrainingError(f"{outcome[1]}; leave it out, or mend it")
            scores[kind].append(outcome.score)
            progress("calibrating", len(scores[0]) + len(scores[1]), total, None)
            if kind == 0:
                x0, y0, x1, y1 = outcome.valid
                values = outcome.map[y0:y1, x0:x1] if outcome.counted is None else outcome.map[outcome.counted]
                peaks.append(float(values.max()))
                medians.append(float(np.median(values)))
                described += [] if outcome.described is None else [outcome.described]
    if not scores[0]:
        raise TrainingError("there are no good pictures to calibrate with")
    if keep:
        # the peaks of before are not kept: its threshold stands for each of them
        scores[0] += before.scores
        peaks += [before.pixel_threshold] * len(before.scores)
        medians += [before.low] * len(before.scores)
    asked = config.false_alarm_rate if rate is None else rate
    low = float(np.median(medians))
    found = calibrate(scores[0], peaks, low, asked, defects=scores[1], miss_rate=miss_rate, cost_ratio=cost_ratio)
    name = detector.category(category)
    own = detector.categories_[name]
    if described and own.reference is not None:  # today's pictures are no drift from now on
        described += list(own.reference.described) if keep else []
        own = own._replace(reference=Reference(np.random.default_rng(0).permutation(described)))
    detector.categories_[name] = own._replace(calibration=found)
    entry = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **({"category": name} if name else {}),
        "good": len(paths[0]),
        "defects": len(paths[1]),
        "kept": len(before.scores) if keep else 0,
        "digest": digest([Sample(path, kind) for kind, part in enumerate(paths) for path in part]),
        "threshold": found.threshold,
        "described": found.describe(),
    }
    detector.record_ = detector.record_ | {"calibrations": [*detector.record_.get("calibrations", []), entry]}
    return found
