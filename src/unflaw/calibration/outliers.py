"""Good images that differ much from the others: possibly defective ones, which should be removed. No torch.

A defective image among the good ones raises the threshold if it calibrates; otherwise its defect is learned as normal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from unflaw.io.words import count

DEVIATIONS = 7.0  # robust deviations above the median from which an image is an outlier; see docs/reliability.md
FEWEST = 8  # minimum number of images for a median and a deviation
MOST = 20  # maximum number of images that are named
ALL, HELD_OUT = "good images", "good images held out of training"  # among which outliers are looked for


def outliers(scores: Mapping[str, float]) -> list[dict[str, Any]]:
    """Finds the images whose scores lie far above those of the others.

    Far is `DEVIATIONS` robust standard deviations (1.4826 times the median absolute deviation) above the median. A few
    outliers move neither the median nor this deviation much.

    Args:
        scores: Out-of-sample score of each image, by path.

    Returns:
        "path", "score" and "deviations" above the median of at most `MOST` images, highest first. Empty for fewer than
        `FEWEST` images, and if half of all scores are equal.
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
    """Returns a message per category that names the images to look at; empty if there are no outliers.

    Args:
        record: Record of a detector, or of one of its calibrations.
        again: Command to repeat after defective images are removed.
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
