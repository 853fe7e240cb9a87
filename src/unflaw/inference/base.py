"""Base class of trained and exported detectors: from files to results. NumPy only."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from unflaw.calibration.drift import Reference
from unflaw.calibration.thresholds import Calibration
from unflaw.config import Config
from unflaw.errors import DetectorError, ImageError
from unflaw.imaging.inputs import ImageLike, InMemory, Input, Readable, inputs
from unflaw.imaging.reading import read
from unflaw.imaging.transforms import ModelInput, PreparedImage, load_windows, try_load_windows
from unflaw.io.brief import brief
from unflaw.io.progress import ahead, batched
from unflaw.postprocessing.regions import find_regions
from unflaw.postprocessing.results import Result
from unflaw.postprocessing.stitching import TileStitcher


@brief
@dataclass(frozen=True)
class Outputs:
    """Outputs for N windows, before any decision.

    Attributes:
        maps: Raw anomaly maps (N, size, size) float32.
        scores: Raw image scores (N,).
        layers: Images of the method by name, as in `Result.layers`, with N in front.
    """

    maps: np.ndarray
    scores: np.ndarray
    layers: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, found: dict[str, np.ndarray]) -> Outputs:
        """Create outputs from "map", "score" and layers by name."""
        return cls(found.pop("map"), found.pop("score"), found)


class BasePredictor(ABC):
    """A fitted detector. Subclasses provide calibrations and `compute`. Threads may share it.

    Attributes:
        config: Its configuration; `config.preparation` defines the preparation of images.
        record_: Its training record.
    """

    config: Config
    record_: dict[str, Any]

    @property
    @abstractmethod
    def calibrations(self) -> Mapping[str, Calibration]:
        """Calibrations by category; "" is the only category of most detectors; empty before `fit`."""

    @property
    def references(self) -> Mapping[str, Reference]:
        """References for drift detection by category; empty if the detector has none."""
        return {}

    @abstractmethod
    def compute(self, images: Sequence[ModelInput], category: str) -> Outputs:
        """Compute the outputs for windows of images of one category. Must be thread-safe."""

    def category(self, wanted: str | None = None) -> str:
        """Return a key of `calibrations`; None is enough if there is only one.

        Raises:
            DetectorError: The detector is not fitted, or the category is missing or unknown.
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
        """Return the calibration of a category: threshold, p-values, heat-map scale.

        Raises:
            DetectorError: See `category`.
        """
        return self.calibrations[self.category(category)]

    def match(self, dataset: str) -> str | None:
        """Return the category to `select` for a data set of this name: the equal name, if there are several."""
        return dataset if len(self.calibrations) > 1 else None

    def inspect(self, image: ImageLike, *, category: str | None = None) -> Result:
        """Inspect one image.

        Args:
            image: A path or any other source of `reading.read`, such as a NumPy array (H, W) or (H, W, 1 to 4 channels)
                of uint8, uint16, or floats from 0 to 1.
            category: Category of the image, for a detector of several.

        Raises:
            ImageError: The image cannot be read.
            TypeError: The object is not an image.
            DetectorError: See `select`.
        """
        path = str(image) if isinstance(image, str | Path) else None
        found = next(self._inspect_prepared([(path, load_windows(read(image), self.config.preparation))], category, 8))
        assert isinstance(found, Result)
        return found

    @overload
    def inspect_many(
        self,
        images: Iterable[ImageLike],
        *,
        category: str | None = None,
        batch: int = 8,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> Iterator[Result]: ...

    @overload
    def inspect_many(
        self,
        images: Iterable[ImageLike],
        *,
        category: str | None = None,
        batch: int = 8,
        on_error: Literal["yield"],
    ) -> Iterator[Result | ImageError]: ...

    def inspect_many(
        self,
        images: Iterable[ImageLike],
        *,
        category: str | None = None,
        batch: int = 8,
        on_error: Literal["raise", "skip", "yield"] = "raise",
    ) -> Iterator[Result | ImageError]:
        """Inspect images in order, reading ahead in threads.

        Args:
            images: Each as for `inspect`; an array (N, H, W, C) is N images.
            category: Category of the images, for a detector of several.
            batch: Number of images, or of windows of images in tiles, that are computed together.
            on_error: Handling of images that cannot be read. "raise": the error is raised after the results before it.
                "skip": the image is skipped with a warning. "yield": the error is yielded instead of a result.

        Yields:
            A `Result` for each image, or, with "yield", an `ImageError`.

        Raises:
            ImageError: An image cannot be read, with "raise".
            TypeError: An object is not an image, or `images` is a single one.
            DetectorError: See `select`; raised with the first image.
            ValueError: `on_error` has another value.
        """
        if on_error not in ("raise", "skip", "yield"):
            raise ValueError(f"on_error={on_error!r} is not known; give raise, skip or yield")
        named = ((str(image), image) for image in inputs(images))
        return self._apply_on_error(self.inspect_named(named, category=category, batch=batch), on_error)

    @staticmethod
    def _apply_on_error(outcomes: Iterator[Result | ImageError], on_error: str) -> Iterator[Result | ImageError]:
        for outcome in outcomes:
            if isinstance(outcome, Result) or on_error == "yield":
                yield outcome
            elif on_error == "raise":
                raise outcome
            else:
                warnings.warn(f"skipped {outcome}", stacklevel=2)

    def inspect_named(
        self,
        images: Iterable[tuple[str, Input | bytes | Readable | ImageError]],
        *,
        category: str | None = None,
        batch: int = 8,
    ) -> Iterator[Result | ImageError]:
        """Like `inspect_many` with "yield", for images with names; the name of a file is the `path` of its result.

        An image is a path, the bytes of a file, an open file or similar that is read in another thread, an image in
        memory, or an `ImageError`, which is passed on.
        """
        self.select(category)

        def load(
            named: tuple[str, Input | bytes | Readable | ImageError],
        ) -> tuple[str | None, PreparedImage | ImageError]:
            name, source = named
            if isinstance(source, ImageError):
                return name, source
            return None if isinstance(source, InMemory) else name, try_load_windows(
                source, self.config.preparation, name
            )

        # images in tiles are kept whole while they wait, and may be large
        tiled = self.config.preparation.tile is not None
        yield from self._inspect_prepared(ahead(load, images, 1, 1) if tiled else ahead(load, images), category, batch)

    def _inspect_prepared(
        self,
        images: Iterable[tuple[str | None, PreparedImage | ImageError]],
        category: str | None,
        batch: int,
    ) -> Iterator[Result | ImageError]:
        """Inspect prepared images in order, in batches of windows; no more windows than a batch are held."""
        name = self.category(category)
        waiting: deque[tuple[TileStitcher, np.ndarray, str | None] | ImageError] = deque()

        def stream() -> Iterator[tuple[TileStitcher, ModelInput]]:
            for path, image in images:
                if isinstance(image, ImageError):
                    waiting.append(image)
                    continue
                stitcher: TileStitcher | None = None
                for window in image.windows:
                    if stitcher is None:
                        stitcher = TileStitcher(window.layout)
                        waiting.append((stitcher, image.described, path))
                    yield stitcher, window

        def finished() -> Iterator[Result | ImageError]:
            while waiting and (isinstance(waiting[0], ImageError) or waiting[0][0].complete):
                found = waiting.popleft()
                yield found if isinstance(found, ImageError) else self._result(*found, name)

        for group in batched(stream(), batch):
            outputs = self.compute([window for _, window in group], name)
            for i, (stitcher, window) in enumerate(group):
                layers = {layer: values[i] for layer, values in outputs.layers.items()}
                stitcher.add(float(outputs.scores[i]), {"map": outputs.maps[i], "image": window.image(), **layers})
            yield from finished()
        yield from finished()

    def _result(self, stitcher: TileStitcher, described: np.ndarray, path: str | None, category: str) -> Result:
        """Turn the stitched outputs of an image into a result."""
        calibration, reference = self.calibrations[category], self.references.get(category)
        score, layers = stitcher.result()
        anomaly_map, image, geometry = layers.pop("map"), layers.pop("image"), stitcher.layout
        regions = find_regions(
            anomaly_map,
            calibration.pixel_threshold,
            geometry,
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
            valid=geometry.box,
            layers=layers,
            path=path,
            drift=None if reference is None else reference.p_value(described),
            described=described,
            counted=geometry.counted,
            size=geometry.original_size,
            crop=geometry.crop,
            p_estimated=calibration.estimated_p_value(score),
        )
