"""Teaching of a trained detector: reviewed good images join its memory, without training; see `Detector.teach`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple

from unflaw.calibration.crossfit import feature_set
from unflaw.config import Config
from unflaw.datasets.samples import SHORT, sha256_if_readable
from unflaw.errors import TrainingError
from unflaw.features.cache import build_cache
from unflaw.imaging.inputs import Input
from unflaw.io.progress import Progress
from unflaw.methods import Method
from unflaw.training.loop import step_rng


class Taught(NamedTuple):
    """Result of a teaching.

    Attributes:
        prototypes: Number of prototypes that were added.
        skipped: Path and reason of each image that could not be read.
        record: Record of the detector with an entry for this teaching.
    """

    prototypes: int
    skipped: list[tuple[str, str]]
    record: dict[str, Any]


def teach(
    network: Method,
    config: Config,
    good: Sequence[Input],
    record: Mapping[str, Any],
    category: str,
    progress: Progress,
) -> Taught:
    """Adds images to the memory of a network of one category; see `Detector.teach` for the errors.

    Args:
        network: Network of the category; its memories are changed.
        config: Configuration of the detector.
        good: Reviewed good images.
        record: Record of the detector.
        category: Name; "" for a detector of a single category.
        progress: Called as `progress("features", done, total, None)`.
    """
    if network.memory is None:
        raise TrainingError(f"{config.method} has no memory to teach; train again with these images")
    every = list(dict.fromkeys(good))
    if not every:
        raise TrainingError("there are no good images to teach")
    known = set(record.get("seen", []))
    digests_of = {path: sha256_if_readable(path) or "" for path in every}
    given = [path for path in every if digests_of[path][:SHORT] not in known]
    again = [(str(path), f"{path}: the detector knows this image already") for path in every if path not in set(given)]
    if not given:
        raise TrainingError(
            f"{every[0]}: the detector knows this image and all others already; there is nothing to teach"
        )
    budget = config.training.cache_gb * 2**30
    cache = build_cache(network.features, given, config.preparation, budget, fit=False, progress=progress)
    before = list(record.get("taught", []))
    try:
        added = network.teach(feature_set(cache, network), step_rng(config.training.seed, 2**32 + len(before)))
    except ValueError as error:
        raise TrainingError(f"{cache.paths[0]}: {error}") from error
    digests = sorted({content[:SHORT] for content in cache.contents})
    entry = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **({"category": category} if category else {}),
        "good": cache.count,
        "prototypes": added,
        "images": digests,
    }
    seen = sorted({*record.get("seen", []), *digests})
    return Taught(added, again + cache.skipped, {**record, "taught": [*before, entry], "seen": seen})
