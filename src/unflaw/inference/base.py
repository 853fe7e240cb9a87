"""What every detector offers, trained or exported: from files to results. NumPy only; what computes is a subclass."""

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
    """What is computed of N windows, before any decision.

    Attributes:
        maps: Anomaly maps (N, size, size) float32, raw.
        scores: Image scores (N,), raw.
        layers: The method's own images by name, as in `Result.layers`, with N in front.
    """

    maps: np.ndarray
    scores: np.ndarray
    layers: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, found: dict[str, np.ndarray]) -> Outputs:
        """From "map", "score" and layers, each by its name."""
        return cls(found.pop("map"), found.pop("score"), found)


class BasePredictor(ABC):
    """A fitted detector: subclasses say what it is calibrated with and compute. Threads may share it.

    Attributes:
        config: How it was made; `config.preparation` is how images enter.
        record_: How it was trained.
    """

    config: Config
    record_: dict[str, Any]

    @property
    @abstractmethod
    def calibrations(self) -> Mapping[str, Calibration]:
        """By category; "" is the category of a detector that has no others; empty before it has learned."""

    @property
    def references(self) -> Mapping[str, Reference]:
        """By category, the good images that tell drift; without those of a detector that remembers none."""
        return {}

    @abstractmethod
    def compute(self, images: Sequence[ModelInput], category: str) -> Outputs:
        """What it finds in windows, of images of a category that it has. Threads may call it at the same time."""

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

    def inspect(self, image: ImageLike, *, category: str | None = None) -> Result:
        """Inspects one image.

        Args:
            image: A path, or whatever else `images.read` takes, such as a NumPy array (H, W) or (H, W, 1 to 4
                channels) of uint8, uint16, or floats from 0 to 1.
            category: Of what it shows, for a detector of several categories.

        Raises:
            ImageError: The image cannot be read. TypeError: It is none. DetectorError: as for `select`.
        """
        path = str(image) if isinstance(image, str | Path) else None
        found = next(self._inspected([(path, load_windows(read(image), self.config.preparation))], category, 8))
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
        """Inspects images in order, reading ahead in threads.

        Args:
            images: Each as `inspect` takes it; an array (N, H, W, C) is N images.
            category: Of what they show, for a detector of several categories.
            batch: Images, or windows of images in tiles, that are computed together.
            on_error: What becomes of an image that cannot be read. "raise": its error is raised once the results before
                it have been taken. "skip": it is left out, with a warning. "yield": its error takes the place of the
                result, so that there are as many as images.

        Yields:
            A `Result` for each image; with "yield", the `ImageError` of one that cannot be read.

        Raises:
            ImageError: With "raise", as said. TypeError: Something that is no image, or not several.
            DetectorError: As for `select`, with the first image. ValueError: Another `on_error`.
        """
        if on_error not in ("raise", "skip", "yield"):
            raise ValueError(f"on_error={on_error!r} is not known; give raise, skip or yield")
        named = ((str(image), image) for image in inputs(images))
        return self._handled(self.inspect_named(named, category=category, batch=batch), on_error)

    @staticmethod
    def _handled(outcomes: Iterator[Result | ImageError], on_error: str) -> Iterator[Result | ImageError]:
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
        """As `inspect_many` with "yield", of images with names; that of a file is the `path` of its result.

        An image is a path, the bytes of a file, what reads them when a thread that reads ahead asks for it, one in
        memory, or why there is none.
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

        # images in tiles wait whole, and may be large
        tiled = self.config.preparation.tile is not None
        yield from self._inspected(ahead(load, images, 1, 1) if tiled else ahead(load, images), category, batch)

    def _inspected(
        self,
        images: Iterable[tuple[str | None, PreparedImage | ImageError]],
        category: str | None,
        batch: int,
    ) -> Iterator[Result | ImageError]:
        """Images in order; windows of several are computed together, and no more are held than a batch."""
        name = self.category(category)
        waiting: deque[tuple[str | None, PreparedImage | ImageError, TileStitcher | None]] = deque()

        def stream() -> Iterator[tuple[TileStitcher, ModelInput]]:
            for path, image in images:
                if isinstance(image, ImageError):
                    waiting.append((path, image, None))
                    continue
                stitcher: TileStitcher | None = None
                for window in image.windows:
                    if stitcher is None:
                        stitcher = TileStitcher(window.layout)
                        waiting.append((path, image, stitcher))
                    yield stitcher, window

        def finished() -> Iterator[Result | ImageError]:
            while waiting:
                path, image, stitcher = waiting[0]
                if stitcher is not None and not stitcher.complete:
                    return
                waiting.popleft()
                if isinstance(image, ImageError):
                    yield image
                elif stitcher is not None:
                    yield self._concluded(stitcher, image.described, path, name)

        for group in batched(stream(), batch):
            outputs = self.compute([window for _, window in group], name)
            for i, (stitcher, window) in enumerate(group):
                layers = {layer: values[i] for layer, values in outputs.layers.items()}
                stitcher.add(float(outputs.scores[i]), {"map": outputs.maps[i], "image": window.image(), **layers})
            yield from finished()
        yield from finished()

    def _concluded(self, stitcher: TileStitcher, described: np.ndarray, path: str | None, category: str) -> Result:
        """From what was found in all windows of an image to decisions."""
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
