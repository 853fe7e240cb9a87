"""Inspecting many files: `results.jsonl`, one line per picture, and panels where asked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from unflaw.annotations import numbered
from unflaw.batch import Sink
from unflaw.inspector import Inspector
from unflaw.results import Result
from unflaw.streams import Progress, silent


def predict(
    detector: Inspector,
    paths: Sequence[Path],
    out: Path,
    *,
    category: str | None = None,
    pictures: bool = False,
    sinks: Sequence[Sink] = (),
    progress: Progress = silent,
) -> Counter[str]:
    """Inspects files in order and writes `out/results.jsonl`, line by line, so that an interruption loses nothing.

    A line holds path, score, p_value, verdict and regions, or path and error. With `pictures`, also
    `out/pictures/<number>_<name>.png`: picture, heat map on the detector's fixed scale, and the method's own maps.

    Args:
        sinks: See every outcome, after its line is written. The caller closes them.

    Returns:
        How many were "good", "review", "defect" and "error".

    Raises:
        DetectorError: As `Inspector.select`.
    """
    scale = detector.select(category).scale
    counts: Counter[str] = Counter()
    folder = out / "pictures"
    if pictures:
        from unflaw.report import panel

        folder.mkdir(parents=True, exist_ok=True)
    with (out / "results.jsonl").open("w", encoding="utf-8", errors="backslashreplace") as file:
        for i, outcome in enumerate(detector.inspect_many(paths, category=category)):
            if isinstance(outcome, Result):
                counts[outcome.verdict] += 1
                line = outcome.to_json()
                if pictures:
                    name = f"{numbered(i, paths[i])}.png"
                    panel(outcome, scale).save(folder / name)
                    line["picture"] = f"pictures/{name}"
            else:
                counts["error"] += 1
                line = {"path": outcome[0], "error": str(outcome[1])}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            for sink in sinks:
                sink.add(paths[i], outcome if isinstance(outcome, Result) else outcome[1])
            progress("inspecting", i + 1, len(paths), None)
    return counts
