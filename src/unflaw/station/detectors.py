"""Detectors of a station: inspection with a log entry, and recalibration with people's decisions."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import unflaw
from unflaw.datasets.samples import SHORT
from unflaw.datasets.samples import sha256 as file_digest
from unflaw.errors import DetectorError, TrainingError
from unflaw.imaging.reading import read
from unflaw.inference.base import BasePredictor
from unflaw.io.words import count
from unflaw.postprocessing.results import Result
from unflaw.station.log import Entry, Filter, Log, legible, sha256
from unflaw.station.schemas import CalibrationState, RecalibrationDone


class Served:
    """Detector with a name.

    Attributes:
        worker: Two threads for inspections: one reads an image while the other computes.

    Raises:
        DetectorError: As `unflaw.load`.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self.worker = ThreadPoolExecutor(2, thread_name_prefix=f"inspect-{name}")
        self._recalibrating = threading.Lock()
        # one attribute for both, so that other threads see them change in one step
        self._loaded: tuple[BasePredictor, str] = unflaw.load(str(path)), file_digest(path)

    @property
    def detector(self) -> BasePredictor:
        return self._loaded[0]

    @property
    def digest(self) -> str:
        """SHA-256 of the detector file, in hex."""
        return self._loaded[1]

    @property
    def fixed(self) -> str | None:
        """Reason why the detector cannot be recalibrated; None if it can."""
        if hasattr(self.detector, "calibrate"):
            return None
        return f"{self.path.name} is an exported detector: calibrate the original and export it again"

    def inspect(
        self,
        data: bytes,
        *,
        name: str,
        category: str | None = None,
        max_pixels: int = 200_000_000,
        source: str | None = None,
        sample: float = 0.0,
    ) -> tuple[Entry, Result]:
        """Inspect an image; return the entry for the log, and the result with its maps.

        Args:
            data: The image file.
            name: Name of the image.
            max_pixels: As in `imaging.reading.read`.
            source: As in `Entry`.
            sample: Share of images drawn at random for review, in [0, 1].

        Raises:
            ImageError, DetectorError: As `BasePredictor.inspect`.
        """
        detector, digest = self._loaded
        category = detector.category(category or None)
        pixels = read(data, max_pixels=max_pixels, name=name)
        result = detector.inspect(pixels, category=category)
        line = result.to_json(contours=True)
        entry = Entry(
            time=datetime.now(timezone.utc),
            name=legible(name),
            digest=sha256(data),
            size=len(data),
            width=pixels.shape[1],
            height=pixels.shape[0],
            source=source,
            detector=self.name,
            detector_digest=digest,
            category=category,
            threshold=detector.calibrations[category].threshold,
            sampled=random.random() < sample,
            **{key: line.get(key) for key in ("score", "p_value", "p_estimated", "verdict", "regions")},
        )
        return entry, result

    def recalibrate(
        self,
        log: Log,
        category: str,
        *,
        append: bool = True,
        sampled: bool = False,
        rate: float | None = None,
        miss_rate: float | None = None,
    ) -> RecalibrationDone:
        """Recalibrate with the decisions of the log, and replace the detector file atomically.

        A second copy of the detector is calibrated. Inspections go on meanwhile, with the old thresholds. The replaced
        version is kept for `unflaw undo`.

        Args:
            append, rate, miss_rate: As in `Detector.calibrate`; decided defects are used only with a `miss_rate`.
            sampled: Use only good images drawn at random for review. Those reviewed because of their verdict are not
                representative of future images, and raise the threshold.

        Raises:
            TrainingError: The detector is exported, its file has changed, or there are no images of good parts.
            ValueError, OSError: As `Detector.calibrate` and `Detector.save`. Nothing has changed then.
        """
        with self._recalibrating:
            if self.fixed:
                raise TrainingError(self.fixed)
            if log.images is None:
                raise TrainingError("recalibration needs images, and this station keeps none; start it with --keep")
            if file_digest(self.path) != self.digest:
                raise TrainingError(f"{self.path.name} has changed since the station loaded it; restart the station")
            from unflaw.calibration.recalibrate import counted  # imports torch

            fresh: Any = unflaw.load(str(self.path))
            learned, known = set(fresh.record_.get("seen", [])), counted(fresh.record_, category) if append else set()
            decided = self._decided(log, category)
            good = [e.digest for e in decided if e.decision == "good" and (e.sampled or not sampled)]
            defects = [e.digest for e in decided if e.decision == "defect"] if miss_rate is not None else []
            unseen = [digest for digest in good if digest[:SHORT] not in learned]
            new = [digest for digest in unseen if digest[:SHORT] not in known]
            good_paths, defect_paths = ([p for digest in part if (p := log.image(digest))] for part in (new, defects))
            seen, already = len(good) - len(unseen), len(unseen) - len(new)
            lost = len(new) + len(defects) - len(good_paths) - len(defect_paths)
            if not good_paths:
                why = "drawn at random and " * sampled + "decided to be good"
                raise TrainingError(
                    f"there are no images of {self.name} that were {why}, except {seen} used in training, "
                    f"{count(already, 'that counts already', 'that count already')} and {lost} not kept; decide some "
                    "first"
                )
            after = fresh.calibrate(
                good_paths, defect_paths, rate=rate, miss_rate=miss_rate, category=category or None, append=append
            )
            fresh.save(self.path, keep=True)
            before = self.detector.calibrations[category]
            self._loaded = fresh, file_digest(self.path)
        return RecalibrationDone(
            before=CalibrationState.of(before),
            after=CalibrationState.of(after),
            good=len(good_paths),
            defects=len(defect_paths),
            seen=seen,
            counted=already,
            lost=lost,
            digest=self.digest,
        )

    def _decided(self, log: Log, category: str) -> Sequence[Entry]:
        """Return the entry with the last decision on each image of a category."""
        wanted = Filter(detector=self.name, category=category, decided=True)
        found = [entry for batch in log.stream(wanted) for entry in batch]
        return list({e.digest: e for e in sorted(found, key=lambda e: (e.decided_at, e.id))}.values())


def load_all(models: Sequence[str]) -> dict[str, Served]:
    """Load detectors, given as FILE or NAME=FILE, and return them by name; the default name is the stem of the file.

    Raises:
        DetectorError: As `unflaw.load`, or two detectors have one name.
    """
    served: dict[str, Served] = {}
    for model in models:
        name, equals, path = model.partition("=")
        if not equals or Path(model).exists():
            name, path = Path(model).stem, model
        if not name:
            raise DetectorError(f"{model}: a detector needs a name before the =; give NAME=FILE")
        if name in served:
            raise DetectorError(f"two detectors are called {name}; give names: first={served[name].path} second={path}")
        served[name] = Served(name, Path(path))
    return served
