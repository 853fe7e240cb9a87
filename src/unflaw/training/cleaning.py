"""Training images that are presumed defective: the strangest are left out (`calibration.drop_outliers`)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from unflaw.calibration.crossfit import feature_set, fit_normalization, memory_distances, strangeness
from unflaw.errors import TrainingError
from unflaw.features.cache import MINIMUM, Cache
from unflaw.io.words import count
from unflaw.methods import Method
from unflaw.training.loop import step_rng


def drop_strangest(network: Method, cache: Cache, share: float, seed: int, budget: float) -> tuple[Cache, list[str]]:
    """Leaves out the strangest images of each category, leave-one-out to a memory of all of them.

    Args:
        network: Untrained network, its extractor fitted; not changed.
        cache: Good images, perhaps with some defective ones among them.
        share: Share of the images of a category to leave out.
        seed: Seed of the memory.
        budget: See `Cache.take`.

    Returns:
        The other images, and the paths of those left out, the strangest first.

    Raises:
        TrainingError: The method has no memory, or too few images are left.
    """
    judge = copy.deepcopy(network)
    judge.fit_memory(feature_set(cache, judge), step_rng(seed, 2**31 + 2))
    if judge.memory is None:
        raise TrainingError(f"calibration.drop_outliers needs a memory, which {network.config.method} does not have")
    out: list[str] = []
    for number, (name, rows) in enumerate(cache.rows().items()):
        fit_normalization(judge, cache, number, rows)
        distances = memory_distances(judge, cache, rows, exclude_own=True)
        scored = strangeness(distances, float(judge.patch_weight))
        chosen = sorted(scored, key=lambda path: -scored[path])[: int(share * len(scored))]
        if len(scored) - len(chosen) < MINIMUM:
            left = count(len(scored) - len(chosen), "good image")
            raise TrainingError(f"{name or 'calibration.drop_outliers'}: leaves {left}, {MINIMUM} are needed; lower it")
        out += chosen
    dropped = set(out)
    return cache.take([row for row in range(len(cache)) if str(cache.paths[row]) not in dropped], budget), out


def describe_dropped(dropped: Sequence[str], images: int) -> str:
    """Says what leaving images out does to the promise, and names them.

    Args:
        dropped: Paths of those left out.
        images: Number of all good images.
    """
    return "\n  ".join(
        [
            f"left out the strangest {len(dropped)} of {count(images, 'good image')}; where they were good, up to "
            f"{len(dropped) / images:.1%} more images than promised raise a false alarm:",
            *dropped,
        ]
    )
