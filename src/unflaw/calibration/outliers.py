"""Good images that stand out among their own kind: possibly defective ones, which should not be learned from.

One defective image among the good ones sets the threshold where it calibrates, and teaches a memory that its defect is
normal where it does not. No torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from unflaw.io.words import count

DEVIATIONS = 7.0  # above the median from which an image stands out; docs/reliability.md says what was measured
FEWEST = 8  # images that a median and a deviation are taken from
MOST = 5  # images that are named
ALL, HELD_OUT = "good images", "good images held out of training"  # among which outliers are looked for


def outliers(scores: Mapping[str, float]) -> list[dict[str, Any]]:
    """Finds the images whose scores lie far above those of the others.

    Far is `DEVIATIONS` robust standard deviations (1.4826 times the median absolute deviation) above the median. A few
    outliers move neither the median nor this deviation much.

    Args:
        scores: Of each image by its path, each found without what was learned from that image.

    Returns:
        "path", "score" and "deviations" above the median of each, highest first, at most `MOST`. None of fewer than
        `FEWEST` images, and none where half of all scores are equal.
    """
    values = np.array(list(scores.values()), float)
    if len(values) < FEWEST:
        return []
    deviation = 1.4826 * np.median(np.abs(values - np.median(values)))
    if deviation == 0:
        return []
    deviations = dict(zip(scores, ((values - np.median(values)) / deviation).tolist(), strict=True))
    far = sorted((path for path in scores if deviations[path] > DEVIATIONS), key=lambda path: -deviations[path])
    return [{"path": path, "score": scores[path], "deviations": round(deviations[path], 1)} for path in far[:MOST]]


def describe_outliers(record: Mapping[str, Any], again: str = "train") -> list[str]:
    """Returns a message per category that names the images to look at; none where none stand out.

    Args:
        record: Of a detector, or of one of its calibrations.
        again: What to do once defective images are removed.
    """
    named: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for entry in record.get("strangest", []):
        named[entry.get("category", "")].append(entry)
    return [
        f"{f'category {name}: ' if name else ''}look at {count(len(entries), 'image')} far apart from the other "
        f"{record['strangest_among']}; remove what is defective, and {again} again:"
        + "".join(f"\n  {entry['path']} ({entry['deviations']:.0f} deviations above the median)" for entry in entries)
        for name, entries in named.items()
    ]
