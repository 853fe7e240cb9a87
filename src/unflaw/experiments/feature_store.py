"""Raw features in files, computed once for many detectors on the same images.

They are stored as float32, so a detector fitted and measured from a file equals that of `Detector.fit`, up to the
rounding of a backbone with other batches. float16 would take half the space, but slightly different features give
another coreset.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from unflaw._version import __version__
from unflaw.calibration.crossfit import stitched_maps
from unflaw.config import Config, Weights, WeightSource
from unflaw.datasets import Dataset, fingerprint
from unflaw.datasets.samples import sha256
from unflaw.detector import Detector
from unflaw.errors import ImageError
from unflaw.experiments.disk_cache import DiskCache, DiskCacheFull
from unflaw.features.cache import THUMBNAIL, Part, Source, count_windows, read_parts
from unflaw.features.extractor import Extractor, FeatureExtractor
from unflaw.imaging.inputs import Input
from unflaw.imaging.statistics import STATISTICS
from unflaw.imaging.tiling import Preparation, Window, layout
from unflaw.imaging.transforms import try_load_windows
from unflaw.io.files import make_folder, write_atomically
from unflaw.io.progress import Progress, batched, silent
from unflaw.methods import create
from unflaw.methods.synthesis import texture_files
from unflaw.postprocessing.regions import find_regions
from unflaw.postprocessing.results import Region, Result
from unflaw.training.canvas import fit_canvas
from unflaw.training.loop import seeded

BATCH = 16  # images that pass the backbone together


class FeatureFile:
    """Memory-mapped file of raw features, with a record of the fields of `Part` for each window.

    Args:
        file: Existing file, or path to write it to.
        paths: Images. One that cannot be read has records of size 0, or none.
        extractor: Extractor of raw features.
        preparation: Preparation of the images.
        progress: Called as `progress("features", done, total, None)` while the file is written.
        limit: Maximum bytes of all files in the folder.

    Attributes:
        skipped: The reasons why images could not be read, by path.

    Raises:
        ValueError: The file is damaged. WriteError: It cannot be written. DiskCacheFull: It exceeds the limit.
    """

    def __init__(
        self,
        file: Path,
        paths: Iterable[Path],
        extractor: Extractor,
        preparation: Preparation,
        progress: Progress = silent,
        limit: float | None = None,
    ) -> None:
        self.rows: dict[Input, range] = {}
        self.preparation, count = preparation, 0
        for path in dict.fromkeys(paths):
            self.rows[path] = range(count, count := count + count_windows(path, preparation))
        raw = extractor.aggregate(torch.zeros(1, 3, *preparation.canvas[::-1])).shape[1:]
        thumbnail, described = (3, THUMBNAIL, THUMBNAIL), ("described", "<f2", len(STATISTICS))
        content = ("content", "S64")  # SHA-256 of the file, in hex
        fields = [("raw", "<f4", tuple(raw)), ("size", "<i4", 2), ("thumbnail", "u1", thumbnail), described, content]
        self.kind, self.count = np.dtype(fields), count
        try:
            self.records = self._open(file)
        except (FileNotFoundError, NotADirectoryError):  # never made, or deleted for the room
            self._make(file, DiskCache(file.parent, limit), extractor, progress)
            try:
                self.records = self._open(file)
            except FileNotFoundError as error:  # another process needed the room
                raise DiskCacheFull(f"{file}: deleted for the room") from error
        sizes = self.records["size"]
        broken = [path for path, rows in self.rows.items() if not rows or not sizes[rows.start].any()]
        self.skipped = {path: str(try_load_windows(path, preparation)) for path in broken}

    def part(self, group: Sequence[Input]) -> Part:
        """Part of a cache with some of the images."""
        good = [path for path in group if path not in self.skipped]
        found = self.records[[row for path in good for row in self.rows[path]]]
        raw, thumbnails, described = (
            torch.from_numpy(found[name].copy()) for name in ("raw", "thumbnail", "described")
        )
        windows, sizes = [], self.records["size"]
        for path in good:
            geometry = layout(*map(int, sizes[self.rows[path].start]), self.preparation)
            windows += [Window(geometry, number) for number in range(len(geometry))]
        skipped = [(str(path), self.skipped[path]) for path in group if path in self.skipped]
        paths, contents = [path for path in good for _ in self.rows[path]], [c.decode() for c in found["content"]]
        return Part(paths, raw, thumbnails, windows, described, skipped, contents)

    def parts(self, paths: Sequence[Input], batch: int) -> Iterator[Part]:
        """Yields parts of a cache, as a `Source` of `build_cache`."""
        return map(self.part, batched(paths, batch if self.preparation.tile is None else 1))

    def _open(self, file: Path) -> np.ndarray:
        try:
            records = np.load(file, mmap_mode="r")
            if (records.dtype, records.shape) != (self.kind, (self.count,)):
                raise ValueError(f"{records.shape} records of {records.dtype}")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{file}: is another feature file than expected ({error}); delete it") from error
        os.utime(file)  # marks it as recently used
        return records

    def _make(self, file: Path, cache: DiskCache, extractor: Extractor, progress: Progress) -> None:
        def write(temporary: Path) -> None:
            cache.reserve(temporary, self.kind.itemsize * self.count)
            self._write(temporary, read_parts(extractor, self.preparation)(list(self.rows), BATCH), progress)

        make_folder(file.parent)
        write_atomically(file, write)

    def _write(self, file: Path, parts: Iterable[Part], progress: Progress) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(self.kind), "fortran_order": False, "shape": (self.count,)}
        done = 0
        with file.open("rb+") as stream:  # record after record: a memory map would crash where the disk is full
            np.lib.format.write_array_header_1_0(stream, header)
            start = stream.tell()
            for part in parts:
                records = np.zeros(len(part.paths), self.kind)
                if part.paths:
                    records["raw"], records["thumbnail"] = part.raw.numpy(), part.thumbnails.numpy()
                    records["described"], records["content"] = part.described.numpy(), part.contents
                    records["size"] = [window.layout.original_size for window in part.windows]
                for record, path, window in zip(records, part.paths, part.windows, strict=True):
                    stream.seek(start + self.kind.itemsize * self.rows[path][window.number])
                    stream.write(record.tobytes())
                done += len(part.skipped) + sum(window.number == 0 for window in part.windows)
                progress("features", done, len(self.rows), None)
            stream.truncate(start + self.kind.itemsize * self.count)


class CachedDetector(Detector):
    """Detector whose images are in a feature file. Its results have no regions and no images.

    Args:
        config: Configuration of the detector.
        backbone: Backbone that the file was made with.
        file: Features of all images for fitting and inspection.
    """

    def __init__(self, config: Config, backbone: nn.Module, file: FeatureFile) -> None:
        super().__init__(config=config, weights=Weights.LATER)
        self.network.features.backbone = backbone
        self.file = file

    def inspect_named(
        self, images: Iterable[tuple[str, Any]], *, category: str | None = None, batch: int = 8
    ) -> Iterator[Result | ImageError]:
        """Inspects paths in the feature file; see `Detector.inspect_named`."""
        tiled = self.config.preparation.tile is not None
        for group in batched((Path(name) for name, _ in images), 1 if tiled else batch):
            part = self.file.part(group)
            results = iter(self._results(part, category) if part.paths else [])
            for path in group:
                reason = self.file.skipped.get(path)
                yield next(results) if reason is None else ImageError(reason)

    @torch.inference_mode()
    def _results(self, part: Part, category: str | None) -> list[Result]:
        calibration, network = self.select(category), self.network_of(category)
        nothing, results = np.empty((0, 0, 3), np.uint8), []
        for stitcher in stitched_maps(network, part.windows, lambda rows: network.features.project(part.raw[rows])):
            s, found = stitcher.result()
            box, counted = stitcher.layout.box, stitcher.layout.counted
            regions: tuple[Region, ...] = ()
            if calibration.review_uncertain:
                regions = find_regions(
                    found["map"],
                    calibration.pixel_threshold,
                    stitcher.layout,
                    minimum_area=calibration.minimum_area,
                    uncertainty=found.get("uncertainty"),
                )
            verdict = calibration.p_value(s), calibration.verdict(s, regions)
            results.append(Result(s, *verdict, found["map"], (), nothing, box, counted=counted))
        return results

    def _feature_source(self) -> Source:
        return self.file.parts


class ExperimentRunner:
    """Fits detectors on data sets; loads each backbone once and computes each feature file once.

    Args:
        folder: Folder of feature files, which experiments may share.
        weights: Backbone weights as in `Detector`; `Weights.RANDOM` are the same in every process.
        limit: Maximum bytes of all feature files in the folder; None: no limit.
    """

    def __init__(self, folder: Path, weights: WeightSource = None, limit: float | None = None) -> None:
        self.folder, self.weights, self.limit = folder, weights, limit
        self._extractors: dict[tuple[Any, ...], tuple[Extractor, str]] = {}
        self._backbones: dict[tuple[Any, ...], tuple[nn.Module, str]] = {}
        self._last: tuple[Path, FeatureFile] | None = None
        self._fingerprints: dict[Dataset, str] = {}

    def fit(self, config: Config, dataset: Dataset, *, progress: Progress = silent) -> Detector:
        """Returns a detector like `Detector(config=config).fit(dataset)`, but from a feature file; `evaluate` takes it.

        If that file alone exceeds the limit, the detector is fitted without it.

        Raises:
            TrainingError, WeightsError, ValueError: See `Detector`, `Detector.fit` and `FeatureFile`.
        """
        config, _ = fit_canvas(config, [sample.path for sample in dataset.train])
        extractor, path = self._extractor(config)[0], self.path(config, dataset)
        if self._last is None or self._last[0] != path:
            self._last = None
            paths = [sample.path for part in (dataset.train, dataset.validation, dataset.test) for sample in part]
            try:
                self._last = path, FeatureFile(path, paths, extractor, config.preparation, progress, self.limit)
            except DiskCacheFull:
                detector = Detector(config=config, weights=Weights.LATER)
                detector.network.features.backbone = extractor.backbone
                detector.weights = Weights.name_of(self.weights)
                return detector.fit(dataset, progress=progress)
        detector = CachedDetector(config, extractor.backbone, self._last[1])
        detector.weights = Weights.name_of(self.weights)
        return detector.fit(dataset, progress=progress)

    def path(self, config: Config, dataset: Dataset) -> Path:
        """Path of the feature file, which may not exist; its name is a digest of all that features depend on.

        Raises:
            WeightsError, ValueError, OSError: See `digest`.
        """
        extractor, weights = self._extractor(config)
        makes: dict[str, Any] = {
            "format": 2,
            "kind": type(extractor).__name__,
            "grid": extractor.shape,
            "weights": weights,
        }
        if isinstance(extractor, FeatureExtractor):
            makes |= config.features.model_dump(include={"backbone", "levels", "smooth"})
        makes |= {"preparation": config.preparation.model_dump(), "data": self._fingerprint(dataset)}
        return self.folder / f"{_digest(makes, __version__)[:16]}.npy"

    def digest(self, config: Config, dataset: Dataset, *more: str) -> str:
        """SHA-256 in hex of all that results depend on: configuration, data, weights, version, and `more`.

        Raises:
            WeightsError, ValueError, OSError: The configuration is invalid, or a file of the data cannot be read.
        """
        _, weights = self._extractor(config)
        if config.training.textures:
            more = (*more, *map(sha256, texture_files(config.training.textures)))
        return _digest(config.model_dump(mode="json"), self._fingerprint(dataset), weights, __version__, *more)

    def _extractor(self, config: Config) -> tuple[Extractor, str]:
        """Unfitted extractor of a method, and the digest of its weights."""
        key = config.network, config.features, config.preparation, config.scoring
        if key not in self._extractors:
            extractor, weights = create(config, Weights.LATER).features, ""
            if isinstance(extractor, FeatureExtractor):
                extractor.backbone, weights = self._backbone(config)
            self._extractors[key] = extractor, weights
        return self._extractors[key]

    def _backbone(self, config: Config) -> tuple[nn.Module, str]:
        key = config.features.backbone, config.features.levels, config.preparation.canvas
        if key not in self._backbones:
            with seeded(0):
                backbone = FeatureExtractor(config.features, self.weights, config.preparation.canvas).backbone
            digest = hashlib.sha256()
            for tensor in backbone.state_dict().values():
                digest.update(tensor.contiguous().numpy().tobytes())
            self._backbones[key] = backbone, digest.hexdigest()
        return self._backbones[key]

    def _fingerprint(self, dataset: Dataset) -> str:
        if dataset not in self._fingerprints:
            self._fingerprints[dataset] = fingerprint(dataset)
        return self._fingerprints[dataset]


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
