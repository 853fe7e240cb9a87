"""The detectors that a station serves, and what becomes of an inspection: a line of the log."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import unflaw
from unflaw.calibration.thresholds import Calibration
from unflaw.datasets.samples import SHORT
from unflaw.datasets.samples import sha256 as file_digest
from unflaw.errors import DetectorError, TrainingError
from unflaw.imaging.reading import read
from unflaw.inference.base import BasePredictor
from unflaw.io.words import count
from unflaw.postprocessing.results import Result
from unflaw.station.log import Entry, Filter, Log, legible, sha256


@dataclass(frozen=True)
class Recalibrated:
    """What came of decisions.

    Attributes:
        before, after: Calibrations.
        good, defects: Images that took part.
        seen: Good ones left out because the detector has learned from them.
        counted: Good ones left out because their scores are among those that were kept.
        lost: Decided ones whose images are not kept.
    """

    before: Calibration
    after: Calibration
    good: int
    defects: int
    seen: int
    counted: int
    lost: int


class Served:
    """A detector under a name.

    Attributes:
        worker: Where it inspects: two threads of its own, so that one reads images while the other computes, and no
            detector waits for another.

    Raises:
        DetectorError: As `unflaw.load`.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self.worker = ThreadPoolExecutor(2, thread_name_prefix=f"inspect-{name}")
        self._changing = threading.Lock()
        # one name for both, so that other threads see them change in one step
        self._loaded: tuple[BasePredictor, str] = unflaw.load(str(path)), file_digest(path)

    @property
    def detector(self) -> BasePredictor:
        return self._loaded[0]

    @property
    def digest(self) -> str:
        """SHA-256 of its file, in hex: which detector judges."""
        return self._loaded[1]

    @property
    def fixed(self) -> str | None:
        """Why it cannot be calibrated anew; None: it can."""
        if hasattr(self.detector, "calibrate"):
            return None
        return f"{self.path.name} is an exported detector: calibrate the one it was made from, and export that again"

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
        """Inspects an image; the line for the log, and the maps.

        Args:
            data: The image's file.
            name: What it is called.
            max_pixels: As for `images.read`.
            source: As in `Entry`.
            sample: Share of images that are drawn at random for review.

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
            score=line["score"],
            p_value=line["p_value"],
            p_estimated=line.get("p_estimated"),
            threshold=detector.calibrations[category].threshold,
            verdict=line["verdict"],
            regions=line["regions"],
            sampled=random.random() < sample,
        )
        return entry, result

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

        It works on a second copy, so that inspections go on meanwhile, with the old thresholds.

        Args:
            keep, rate, miss_rate: As for `Detector.calibrate`; decided defects count where there is a `miss_rate`.
            sampled: Only good images drawn at random for review. Those that a person saw because of their verdict
                are not like images to come, and raise the threshold.

        Raises:
            TrainingError: An exported detector, a file that is not the one served, no images of good parts.
            ValueError, OSError: As for `Detector.calibrate` and `Detector.save`. Nothing has changed then.
        """
        with self._changing:
            return self._recalibrate(log, category, keep, sampled, rate, miss_rate)

    def _recalibrate(
        self, log: Log, category: str, keep: bool, sampled: bool, rate: float | None, miss_rate: float | None
    ) -> Recalibrated:
        if self.fixed:
            raise TrainingError(self.fixed)
        if log.images is None:
            raise TrainingError("calibrating needs images, and this station keeps none; start it with --keep")
        if file_digest(self.path) != self.digest:
            raise TrainingError(f"{self.path.name} has changed since the station loaded it; restart the station")
        from unflaw.calibration.recalibrate import counted  # which needs torch

        fresh: Any = unflaw.load(str(self.path))
        learned, known = set(fresh.record_.get("seen", [])), counted(fresh.record_, category) if keep else set()
        chosen = self._decided(log, category)
        good = [e.digest for e in chosen if e.decision == "good" and (e.sampled or not sampled)]
        defects = [e.digest for e in chosen if e.decision == "defect"] if miss_rate is not None else []
        unseen = [digest for digest in good if digest[:SHORT] not in learned]
        new = [digest for digest in unseen if digest[:SHORT] not in known]
        paths = [[path for digest in part if (path := log.image(digest))] for part in (new, defects)]
        left = {
            "seen": len(good) - len(unseen),
            "counted": len(unseen) - len(new),
            "lost": len(new) + len(defects) - sum(map(len, paths)),
        }
        if not paths[0]:
            why = "drawn at random and " * sampled + "decided to be good"
            already = count(left["counted"], "that counts already", "that count already")
            raise TrainingError(
                f"there are no images of {self.name} that were {why}, but for {left['seen']} that it has learned "
                f"from, {already} and {left['lost']} not kept; decide some first"
            )
        after = fresh.calibrate(
            paths[0], paths[1], rate=rate, miss_rate=miss_rate, category=category or None, keep=keep
        )
        fresh.save(self.path)
        before = self.detector.calibrations[category]
        self._loaded = fresh, file_digest(self.path)
        return Recalibrated(before, after, len(paths[0]), len(paths[1]), **left)

    def _decided(self, log: Log, category: str) -> Sequence[Entry]:
        """The last decision on each image of a category."""
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
        if not name:
            raise DetectorError(f"{model}: a detector needs a name before the =; give NAME=FILE")
        if name in served:
            raise DetectorError(f"two detectors are called {name}; give names: first={served[name].path} second={path}")
        served[name] = Served(name, Path(path))
    return served
