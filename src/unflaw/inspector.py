"""What every detector offers, trained or exported: from files to results. NumPy only; what computes is a subclass."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unflaw.calibration import Calibration
from unflaw.config import Config
from unflaw.drift import Reference, describe
from unflaw.errors import DetectorError
from unflaw.images import ImageError, Prepared, prepare, read, try_prepare
from unflaw.results import Result
from unflaw.scoring import find_regions
from unflaw.streams import ahead, batched


@dataclass(frozen=True)
class Outputs:
    """What is computed of N prepared pictures, before any decision.

    Attributes:
        maps: Anomaly maps (N, size, size) float32, raw.
        scores: Image scores (N,), raw.
        layers: The method's own pictures by name, as in `Result.layers`, with N in front.
    """

    maps: np.ndarray
    scores: np.ndarray
    layers: dict[str, np.ndarray] = field(default_factory=dict)


class Inspector(ABC):
    """A fitted detector: subclasses say what it is calibrated with and compute.

    Attributes:
        config: How it was made; `config.preparation` is how pictures enter.
        record_: How it was trained.
    """

    config: Config
    record_: dict[str, Any]

    def __init__(self) -> None:
        self._busy = threading.RLock()  # what is normal for a category is put into the network: one picture at a time

    @property
    @abstractmethod
    def calibrations(self) -> Mapping[str, Calibration]:
        """By category; "" is the category of a detector that has no others; empty before it has learned."""

    @property
    def references(self) -> Mapping[str, Reference]:
        """By category, the good pictures that tell drift; without those of a detector that remembers none."""
        return {}

    @abstractmethod
    def compute(self, pictures: Sequence[Prepared], category: str) -> Outputs:
        """What it finds in pictures of a category that it has."""

    def category(self, wanted: str | None = None) -> str:
        """The name in `calibrations` that is meant; None will do where there is one only.

        Raises:
            DetectorError: Not fitted, or a category is missing or not known.
        """
        names = list(self.calibrations)
        if not names:
            raise DetectorError("this detector has not learned yet; call fit first, or load a saved one")
        if wanted is None and len(names) == 1:
            return names[0]
        if wanted is None or wanted not in names:
            if names == [""]:
                raise DetectorError(f"this detector has no categories, so no {wanted!r} either; name none")
            fault = "needs a category" if wanted is None else f"has no category {wanted!r}"
            remedy = "category=… in Python, --category on the command line"
            raise DetectorError(f"this detector {fault}; name one of {', '.join(names)} ({remedy})")
        return wanted

    def select(self, category: str | None = None) -> Calibration:
        """The calibration of a category: threshold, p-values, heat-map scale.

        Raises:
            DetectorError: As `category`.
        """
        return self.calibrations[self.category(category)]

    def match(self, dataset: str) -> str | None:
        """The category to `select` for a data set of this name: the one called so, where there are several."""
        return dataset if len(self.calibrations) > 1 else None

    def inspect(self, image: str | Path | bytes | np.ndarray, *, category: str | None = None) -> Result:
        """Inspects one picture.

        Args:
            image: Whatever `images.read` takes.
            category: Of what it shows, for a detector of several categories.

        Raises:
            ImageError: The picture cannot be read. DetectorError: as for `select`.
        """
        path = str(image) if isinstance(image, str | Path) else None
        return self._conclude([prepare(read(image), self.config.preparation)], [path], category)[0]

    def inspect_many(
        self, paths: Iterable[str | Path], *, category: str | None = None, batch: int = 8
    ) -> Iterator[Result | tuple[str, ImageError]]:
        """Inspects files in order, decoding ahead in threads. A file that cannot be read comes as (path, error).

        Raises:
            DetectorError: As for `select`, with the first file.
        """
        self.select(category)
        loaded = ahead(lambda path: (str(path), try_prepare(Path(path), self.config.preparation)), paths)
        for group in batched(loaded, batch):
            good = [(path, picture) for path, picture in group if isinstance(picture, Prepared)]
            pictures, names = [picture for _, picture in good], [path for path, _ in good]
            results = iter(self._conclude(pictures, names, category) if good else [])
            for path, picture in group:
                yield next(results) if isinstance(picture, Prepared) else (path, picture)

    def _conclude(
        self, pictures: Sequence[Prepared], paths: Sequence[str | None], category: str | None
    ) -> list[Result]:
        """From pictures to decisions."""
        name = self.category(category)
        calibration, reference = self.calibrations[name], self.references.get(name)
        with self._busy:
            outputs = self.compute(pictures, name)
        described = [describe(picture.view()) for picture in pictures]
        return [
            Result(
                score=score,
                p_value=calibration.p_value(score),
                verdict=calibration.verdict(score),
                map=outputs.maps[i],
                regions=find_regions(outputs.maps[i], calibration.pixel_threshold, picture),
                image=(picture.pixels.transpose(1, 2, 0) * 255).round().astype(np.uint8),
                valid=picture.box,
                layers={layer: values[i] for layer, values in outputs.layers.items()},
                path=path,
                drift=None if reference is None else reference.p_value(described[i]),
                described=described[i],
            )
            for i, (picture, path, score) in enumerate(zip(pictures, paths, outputs.scores.tolist(), strict=True))
        ]
