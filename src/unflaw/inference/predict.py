"""Inspection of many files: `results.jsonl` with one line per image, and optional panels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL.Image import Image

from unflaw.calibration.drift import RATE, Drift, check_rate
from unflaw.inference.aggregation import Sink
from unflaw.inference.annotations import numbered
from unflaw.inference.base import BasePredictor
from unflaw.io.files import growing, write_png, write_text
from unflaw.io.outputs import PANELS
from unflaw.io.progress import Progress, silent
from unflaw.postprocessing.results import Result, Scale


class Predicted(NamedTuple):
    """Numbers of images by verdict and "error", and drift of all images together; None without a reference."""

    counts: Counter[str]
    drift: Drift | None


def predict(
    detector: BasePredictor,
    paths: Sequence[Path],
    out: Path,
    *,
    category: str | None = None,
    draw: Callable[[Result, Scale], Image] | None = None,
    drift_rate: float = RATE,
    sinks: Sequence[Sink] = (),
    progress: Progress = silent,
) -> Predicted:
    """Inspect files in order and write a line for each to `out/results.jsonl.part`, which is renamed at the end.

    A line holds path, score, p_value, verdict, drift and regions, or path and error. Lines survive an interruption, and
    `out/results.jsonl` is always complete. `out/drift.json` reports whether all images together differ from the
    training images (`drift.Reference.test`).

    Args:
        draw: Function that draws a result with the scale of the detector, such as `report.panel`, to
            `out/images/<number>_<name>.png`.
        drift_rate: False-alarm rate of the drift alarm.
        sinks: Receive every outcome after its line is written. The caller closes them.

    Raises:
        DetectorError: See `BasePredictor.select`.
        ValueError: See `drift.Reference.test`.
    """
    scale = detector.select(category).scale
    reference = detector.references.get(detector.category(category))
    check_rate(drift_rate)
    counts: Counter[str] = Counter()
    described: list[np.ndarray] = []
    folder = out / PANELS
    if draw is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with growing(out / "results.jsonl", [sink.amend for sink in sinks]) as file:
        for i, outcome in enumerate(detector.inspect_many(paths, category=category, on_error="yield")):
            if isinstance(outcome, Result):
                counts[outcome.verdict] += 1
                described += [] if outcome.described is None else [outcome.described]
                line = outcome.to_json()
                if draw is not None:
                    name = f"{numbered(i, paths[i])}.png"
                    write_png(folder / name, draw(outcome, scale), drawn=True)
                    line["image"] = f"{PANELS}/{name}"
            else:
                counts["error"] += 1
                line = {"path": str(paths[i]), "error": str(outcome)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            for sink in sinks:
                sink.add(paths[i], outcome)
            progress("inspecting", i + 1, len(paths), None)
    drift = None if reference is None or not described else reference.test(described, drift_rate)
    write_text(out / "drift.json", json.dumps(drift and drift.to_json(), indent=2) + "\n")
    return Predicted(counts, drift)
