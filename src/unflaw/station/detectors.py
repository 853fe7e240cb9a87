"""The detectors that a station serves, and what becomes of an inspection: a line of the log."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

import unflaw
from unflaw.calibration import Calibration
from unflaw.datasets.samples import SHORT
from unflaw.datasets.samples import sha256 as file_digest
from unflaw.files import DetectorError
from unflaw.results import Result
from unflaw.station.log import Entry, Filter, Log, legible, sha256


class CalibrationRefused(ValueError):
    """A calibration that cannot be done as things stand. The message says what to do."""


@dataclass(frozen=True)
class Recalibrated:
    """What came of decisions.

    Attributes:
        before, after: Calibrations.
        good, defects: Pictures that took part.
        seen: Good ones left out because the detector has learned from them.
        lost: Decided ones whose pictures are not kept.
    """

    before: Calibration
    after: Calibration
    good: int
    defects: int
    seen: int
    lost: int


class Served:
    """A detector under a name.

    Inspections of one detector take turns in `worker`, its only thread: categories share one network.

    Attributes:
        digest: SHA-256 of the file, in hex: which detector has judged.
        calibrations: Of each category; "" is the category of a detector that has no others.

    Raises:
        DetectorError: As `unflaw.load`.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self.worker = ThreadPoolExecutor(1, thread_name_prefix=f"inspect-{name}")
        self._load()

    def _load(self) -> None:
        self.digest = file_digest(self.path) if self.path.is_file() else ""
        self.detector: Any = unflaw.load(str(self.path))
        self.calibrations: dict[str, Calibration] = {
            category: self.detector.select(category) for category in self.detector.categories_
        }

    @property
    def fixed(self) -> str | None:
        """Why it cannot be calibrated anew; None: it can."""
        if hasattr(self.detector, "calibrate"):
            return None
        return f"{self.path.name} is an exported detector: calibrate the one it was made from, and export that again"

    def category(self, asked: str | None) -> str:
        """The category meant.

        Raises:
            DetectorError: Missing or not known.
        """
        known = list(self.calibrations)
        if not asked and len(known) == 1:
            return known[0]
        if known == [""]:
            raise DetectorError(f"detector {self.name} has no categories, so no {asked!r} either; name none")
        if asked not in self.calibrations:
            fault = f"has no category {asked!r}" if asked else "needs a category"
            raise DetectorError(f"detector {self.name} {fault}; name one of {', '.join(known)}")
        return asked

    def inspect(self, pixels: np.ndarray, category: str) -> tuple[Result, Calibration]:
        """Result, and the calibration that judged it."""
        return self.detector.inspect(pixels, category=category), self.calibrations[category]

    def recalibrate(
        self,
        log: Log,
        category: str,
        *,
        keep: bool = True,
        sampled: bool = False,
        rate: float | None = None,
        miss_rate: float | None = None,
    ) -> Recalibrated:
        """Sets thresholds by what people decided, and replaces the detector's file in one step.

        It works on a second copy, so that inspections go on meanwhile; the last step takes its turn in `worker`.

        Args:
            keep, rate, miss_rate: As for `Detector.calibrate`; decided defects count where there is a `miss_rate`.
            sampled: Only good pictures drawn at random for review. Those that a person saw because of their verdict
                are not like pictures to come, and raise the threshold.

        Raises:
            CalibrationRefused: An exported detector, a file that is not the one served, no pictures of good parts.
            ValueError, OSError: As for `Detector.calibrate` and `Detector.save`. Nothing has changed then.
        """
        if self.fixed:
            raise CalibrationRefused(self.fixed)
        if log.pictures is None:
            raise CalibrationRefused("calibrating needs the pictures, and this station keeps none; start it with --keep")
        if file_digest(self.path) != self.digest:
            raise CalibrationRefused(f"{self.path.name} has changed since the station loaded it; start the station anew")
        fresh: Any = unflaw.load(str(self.path))
        learned = set(fresh.record_.get("seen", []))
        chosen = self._decided(log, category)
        good = [e.digest for e in chosen if e.decision == "good" and (e.sampled or not sampled)]
        defects = [e.digest for e in chosen if e.decision == "defect"] if miss_rate is not None else []
        new = [digest for digest in good if digest[:SHORT] not in learned]
        paths = [[path for digest in part if (path := log.picture(digest))] for part in (new, defects)]
        lost = len(new) + len(defects) - sum(map(len, paths))
        if not paths[0]:
            why = "drawn at random and " * sampled + "decided to be good"
            raise CalibrationRefused(
                f"there are no pictures of {self.name} that were {why} ({len(good) - len(new)} that it has learned "
                f"from, {lost} not kept); decide some first"
            )
        after = fresh.calibrate(
            paths[0], paths[1], rate=rate, miss_rate=miss_rate, category=category or None, keep=keep
        )
        fresh.save(self.path)
        before = self.calibrations[category]
        self.worker.submit(self._load).result()
        return Recalibrated(before, after, len(paths[0]), len(paths[1]), len(good) - len(new), lost)

    def _decided(self, log: Log, category: str) -> Sequence[Entry]:
        """The last decision on each picture of a category."""
        wanted = Filter(detector=self.name, category=category, decided=True)
        found = [entry for batch in log.stream(wanted) for entry in batch]
        return list({e.digest: e for e in sorted(found, key=lambda e: (e.decided_at, e.id))}.values())


def load_all(models: Sequence[str]) -> dict[str, Served]:
    """Detectors by name: that of their file without its suffix, or what stands before `=` in NAME=FILE.

    Raises:
        DetectorError: As `unflaw.load`, or two of one name.
    """
    served: dict[str, Served] = {}
    for model in models:
        name, equals, path = model.partition("=")
        if not equals or Path(model).exists():
            name, path = Path(model).stem, model
        if name in served:
            raise DetectorError(f"two detectors are called {name}; give names: first={served[name].path} second={path}")
        served[name] = Served(name, Path(path))
    return served


def entry(
    served: Served,
    category: str,
    data: bytes,
    shape: tuple[int, ...],
    result: Result,
    calibration: Calibration,
    *,
    name: str,
    source: str | None = None,
    sample: float = 0.0,
) -> Entry:
    """The line of the log for an inspection that has just been done.

    Args:
        data: The picture's file.
        shape: Of the picture as it was read: (height, width, …).
        name: What the picture is called.
        sample: Share of pictures that are drawn at random for review.
    """
    line = result.to_json()
    return Entry(
        time=datetime.now(timezone.utc),
        name=legible(name),
        digest=sha256(data),
        size=len(data),
        width=shape[1],
        height=shape[0],
        source=source,
        detector=served.name,
        detector_digest=served.digest,
        category=category,
        score=line["score"],
        p_value=line["p_value"],
        threshold=calibration.threshold,
        verdict=line["verdict"],
        regions=line["regions"],
        sampled=random.random() < sample,  # noqa: S311 - nothing is secret here
    )
