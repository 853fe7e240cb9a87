"""What every detector offers, trained or exported: from files to results. NumPy only; what computes is a subclass."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unflaw.brief import brief
from unflaw.calibration import Calibration
from unflaw.config import Config
from unflaw.drift import Reference
from unflaw.errors import DetectorError
from unflaw.images import ImageError, Picture, Prepared, Readable, read, show, try_show
from unflaw.mosaic import Mosaic
from unflaw.results import Result
from unflaw.scoring import find_regions
from unflaw.streams import ahead, batched


@brief
@dataclass(frozen=True)
class Outputs:
    """What is computed of N windows, before any decision.

    Attributes:
        maps: Anomaly maps (N, size, size) float32, raw.
        scores: Image scores (N,), raw.
        layers: The method's own pictures by name, as in `Result.layers`, with N in front.
    """

    maps: np.ndarray
    scores: np.ndarray
    layers: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, found: dict[str, np.ndarray]) -> Outputs:
        """From "map", "score" and layers, each by its name."""
        return cls(found.pop("map"), found.pop("score"), found)


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
        """What it finds in windows, of pictures of a category that it has."""

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
        found = next(self._inspected([(path, show(read(image), self.config.preparation))], category, 8))
        assert isinstance(found, Result)
        return found

    def inspect_many(
        self, paths: Iterable[str | Path], *, category: str | None = None, batch: int = 8
    ) -> Iterator[Result | tuple[str, ImageError]]:
        """Inspects files in order, decoding ahead in threads. A file that cannot be read comes as (path, error).

        Raises:
            DetectorError: As for `select`, with the first file.
        """
        yield from self.inspect_named(((str(path), Path(path)) for path in paths), category=category, batch=batch)

    def inspect_named(
        self,
        pictures: Iterable[tuple[str, Path | bytes | Readable | ImageError]],
        *,
        category: str | None = None,
        batch: int = 8,
    ) -> Iterator[Result | tuple[str, ImageError]]:
        """As `inspect_many`, of pictures that are not all files: each with its name, which is the `path` of its result.

        A picture is a path, the bytes of a file, what reads them when a thread that reads ahead asks for it, or why
        there is none.
        """
        self.select(category)

        def load(named: tuple[str, Path | bytes | Readable | ImageError]) -> tuple[str, Picture | ImageError]:
            name, source = named
            if isinstance(source, ImageError):
                return name, source
            return name, try_show(source, self.config.preparation, name)

        # pictures in tiles wait whole, and may be large
        tiled = self.config.preparation.tile is not None
        loaded = ahead(load, pictures, 1, 1) if tiled else ahead(load, pictures)
        for found in self._inspected(loaded, category, batch):
            yield found if isinstance(found, Result) else (str(found[0]), found[1])

    def _inspected(
        self,
        pictures: Iterable[tuple[str | None, Picture | ImageError]],
        category: str | None,
        batch: int,
    ) -> Iterator[Result | tuple[str | None, ImageError]]:
        """Pictures in order; windows of several are computed together, and no more are held than a batch."""
        name = self.category(category)
        waiting: deque[tuple[str | None, Picture | ImageError, Mosaic | None]] = deque()

        def stream() -> Iterator[tuple[Mosaic, Prepared]]:
            for path, picture in pictures:
                if isinstance(picture, ImageError):
                    waiting.append((path, picture, None))
                    continue
                mosaic: Mosaic | None = None
                for window in picture.windows:
                    if mosaic is None:
                        mosaic = Mosaic(window.layout)
                        waiting.append((path, picture, mosaic))
                    yield mosaic, window

        def finished() -> Iterator[Result | tuple[str | None, ImageError]]:
            while waiting:
                path, picture, mosaic = waiting[0]
                if mosaic is not None and not mosaic.complete:
                    return
                waiting.popleft()
                if isinstance(picture, ImageError):
                    yield path, picture
                elif mosaic is not None:
                    yield self._concluded(mosaic, picture.described, path, name)

        for group in batched(stream(), batch):
            with self._busy:
                outputs = self.compute([window for _, window in group], name)
            for i, (mosaic, window) in enumerate(group):
                layers = {layer: values[i] for layer, values in outputs.layers.items()}
                mosaic.add(float(outputs.scores[i]), {"map": outputs.maps[i], "image": window.picture(), **layers})
            yield from finished()
        yield from finished()

    def _concluded(self, mosaic: Mosaic, described: np.ndarray, path: str | None, category: str) -> Result:
        """From what was found in all windows of a picture to decisions."""
        calibration, reference = self.calibrations[category], self.references.get(category)
        score, layers = mosaic.result()
        anomaly_map, image, laid = layers.pop("map"), layers.pop("image"), mosaic.layout
        regions = find_regions(
            anomaly_map,
            calibration.pixel_threshold,
            laid,
            minimum_area=calibration.minimum_area,
            uncertainty=layers.get("uncertainty"),
        )
        return Result(
            score=score,
            p_value=calibration.p_value(score),
            verdict=calibration.verdict(score, regions),
            map=anomaly_map,
            regions=regions,
            image=image,
            valid=laid.box,
            layers=layers,
            path=path,
            drift=None if reference is None else reference.p_value(described),
            described=described,
            counted=laid.counted,
            size=laid.original_size,
            crop=laid.crop,
            p_estimated=calibration.estimated_p_value(score),
        )
