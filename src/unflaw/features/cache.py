"""Feature cache: each good image is read once and passes the backbone once; training runs on the cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil
from typing import IO, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from unflaw.errors import ImageError, TrainingError
from unflaw.features.extractor import Extractor
from unflaw.imaging.inputs import Input
from unflaw.imaging.reading import image_size, read_hashed
from unflaw.imaging.tiling import Preparation, Window, layout
from unflaw.imaging.transforms import ModelInput, PreparedImage, try_load_windows
from unflaw.io.brief import brief
from unflaw.io.files import scratch
from unflaw.io.progress import Progress, ahead, batched, silent
from unflaw.io.words import count
from unflaw.parallel.process_group import SINGLE_PROCESS, ProcessGroup

THUMBNAIL = 128  # side of the targets of the display decoder, in pixels
MINIMUM = 8  # minimum number of good training images of a category
FITTED_ON = 64  # number of images (or half a gigabyte of features) for standardisation and components


def stack(prepared: Sequence[ModelInput]) -> Tensor:
    """Stacks prepared images to (N, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.stack([p.pixels for p in prepared]))


def cells(windows: Sequence[Window], grid: tuple[int, int]) -> Tensor | None:
    """(N, rows, columns) bool: cells of windows that touch what counts of the image; None if all must."""
    if not windows or windows[0].layout.preparation.covers:
        return None
    return torch.from_numpy(np.stack([window.cells(grid) for window in windows]))


def count_windows(path: Input, preparation: Preparation) -> int:
    """Number of windows of an image; 0 if it cannot be read."""
    if preparation.tile is None:
        return 1
    try:
        return len(layout(*image_size(path), preparation))
    except ValueError:
        return 0


def allocate(shape: tuple[int, ...], budget: float) -> tuple[Tensor, IO[bytes] | None]:
    """Allocates a float16 tensor in RAM or, above `budget` bytes, in an unnamed temporary file.

    Raises:
        WriteError: There is not enough space for the file.
    """
    size = int(np.prod(shape)) * 2
    if size <= budget:
        return torch.empty(shape, dtype=torch.float16), None
    file = scratch(size, f"{size / 1e9:.1f} GB of features need space there, or in a folder that TMPDIR names")
    return torch.from_numpy(np.memmap(file, np.float16, "w+", shape=shape)), file


@brief
@dataclass
class Cache:
    """Features and facts of good images, in random order.

    Attributes:
        features: F (N, C, g, g), float16, in RAM or memory-mapped.
        thumbnails: (N, 3, t, t) uint8.
        windows: Window of the image in each of the N rows. Windows of one image are adjacent.
        described: (N, D) float16, statistics of each image from `statistics.describe`.
        paths: Image of each row.
        skipped: `(path, reason)` of images that could not be read.
        categories: Category of each row; by default "".
        contents: SHA-256 of the file of each row, in hex; by default "", unknown.
        groups: Number of the group of each row (`calibration.groups`); by default each image is its own.
    """

    features: Tensor
    thumbnails: Tensor
    windows: list[Window]
    described: Tensor
    paths: list[Input]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    contents: list[str] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    _file: IO[bytes] | None = None

    def __post_init__(self) -> None:
        self.categories = self.categories or [""] * len(self.paths)
        self.contents = self.contents or [""] * len(self.paths)
        self.groups = self.groups or self.image_numbers.tolist()

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def image_numbers(self) -> Tensor:
        """(N,) int64: number of the image of each row, from 0."""
        return torch.tensor([window.number == 0 for window in self.windows]).cumsum(0) - 1

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.heads())

    def heads(self, rows: Sequence[int] | None = None) -> list[int]:
        """First row of each image, among some rows or all."""
        return [row for row in (range(len(self)) if rows is None else rows) if self.windows[row].number == 0]

    def mixed(self, rows: Sequence[int]) -> list[int]:
        """Sorts rows so that the first ones are of many different images."""
        numbers = self.image_numbers.tolist()

        def turn(row: int) -> tuple[int, int]:
            layout, number = self.windows[row]
            return (number - numbers[row]) % len(layout), row

        return sorted(rows, key=turn)

    def cells(self, grid: tuple[int, int], rows: Sequence[int] | None = None) -> Tensor | None:
        """`cells` of some rows, or all, for a grid of the given rows and columns."""
        shown = self.windows if rows is None else [self.windows[row] for row in rows]
        return cells(shown, grid)

    def content_of(self) -> dict[Input, str]:
        """SHA-256 of the file of each image, in hex."""
        return dict(zip(self.paths, self.contents, strict=True))

    def __getitem__(self, part: slice) -> Cache:
        """Some of the images, without copying their features."""
        return replace(
            self,
            features=self.features[part],
            thumbnails=self.thumbnails[part],
            windows=self.windows[part],
            described=self.described[part],
            paths=self.paths[part],
            categories=self.categories[part],
            contents=self.contents[part],
            groups=self.groups[part],
        )

    def rows(self) -> dict[str, list[int]]:
        """Rows of each category, ascending."""
        rows: dict[str, list[int]] = defaultdict(list)
        for row, category in enumerate(self.categories):
            rows[category].append(row)
        return rows

    def take(self, rows: Sequence[int], budget: float) -> Cache:
        """Some of the images; their features are copied only where they do not lie together.

        Args:
            rows: At least one.
            budget: Copied features above this many bytes are memory-mapped.
        """
        if list(rows) == list(range(rows[0], rows[0] + len(rows))):
            return self[rows[0] : rows[0] + len(rows)]
        features, file = allocate((len(rows), *self.features.shape[1:]), budget)
        for row, chosen in zip(features, rows, strict=True):
            row.copy_(self.features[chosen])
        index = torch.tensor(rows)
        paths, windows = [self.paths[row] for row in rows], [self.windows[row] for row in rows]
        own = features, self.thumbnails[index], windows, self.described[index], paths, self.skipped
        categories, contents = [self.categories[row] for row in rows], [self.contents[row] for row in rows]
        return Cache(*own, categories, contents, [self.groups[row] for row in rows], file)


@brief
@dataclass
class Part:
    """Some images before they are added to a cache.

    Attributes:
        paths, contents: File of each of the N windows of readable images, and its SHA-256 in hex.
        raw: Output of `Extractor.aggregate`, (N, C_raw, g, g) float32.
        thumbnails, windows, described, skipped: See `Cache`. A tiled image may continue in the next part.
    """

    paths: list[Input]
    raw: Tensor
    thumbnails: Tensor
    windows: list[Window]
    described: Tensor
    skipped: list[tuple[str, str]]
    contents: list[str]


Source = Callable[[Sequence[Input], int], Iterator[Part]]  # images, and their number per part


class Aggregator(Protocol):
    """The part of an extractor that computes raw features."""

    def aggregate(self, images: Tensor) -> Tensor: ...


def read_parts(extractor: Aggregator, preparation: Preparation) -> Source:
    """Source that reads images from files and passes them through the backbone."""

    tiled = preparation.tile is not None

    def load(path: Input) -> tuple[Input, str, PreparedImage | ImageError]:
        try:
            source, content = read_hashed(path)
        except ImageError as error:
            return path, "", error
        return path, content, try_load_windows(source, preparation, str(path))

    def stream(paths: Sequence[Input]) -> Iterator[tuple[Input, str, ModelInput | ImageError, Tensor]]:
        loaded = ahead(load, paths, 1, 1) if tiled else ahead(load, paths)  # tiled images are large
        for path, content, image in loaded:
            if isinstance(image, ImageError):
                yield path, content, image, torch.empty(0)
            else:
                described = torch.from_numpy(image.described)
                yield from ((path, content, window, described) for window in image.windows)

    def parts(paths: Sequence[Input], batch: int) -> Iterator[Part]:
        for loaded in batched(stream(paths), batch):
            skipped = [(str(path), str(found)) for path, _, found, _ in loaded if isinstance(found, ImageError)]
            good = [(*facts, found, stats) for *facts, found, stats in loaded if isinstance(found, ModelInput)]
            if not good:
                nothing = torch.empty(0)
                yield Part([], nothing, nothing, [], nothing, skipped, [])
                continue
            read, contents, shown, described = map(list, zip(*good, strict=True))
            images = stack(shown)
            thumbnails = (F.interpolate(images, (THUMBNAIL, THUMBNAIL), mode="area") * 255).round().byte()
            raw, windows = extractor.aggregate(images), [window.window for window in shown]
            yield Part(read, raw, thumbnails, windows, torch.stack(described), skipped, contents)

    return parts


def take_turns(source: Source, group: ProcessGroup, whole: bool) -> Source:
    """Source whose parts the processes of a group compute in turn and exchange, so that each gets all of them.

    Args:
        source: Source of one process.
        group: Process group; every process must request the same images.
        whole: Images may have several windows, which stay in one part. Batches of the backbone then differ from those
            of one process, and so may rounding.
    """

    def parts(paths: Sequence[Input], batch: int) -> Iterator[Part]:
        turns = list(batched(paths, batch))
        own = turns[group.rank :: group.size]
        made = (
            (list(source(turn, batch)) for turn in own)
            if whole
            else ([part] for part in source([path for turn in own for path in turn], batch))
        )
        for _ in range(0, len(turns), group.size):
            for found in group.all_gather(next(made, [])):
                yield from found

    return parts


def build_cache(
    extractor: Extractor,
    paths: Sequence[Input],
    preparation: Preparation,
    budget: float,
    *,
    seed: int = 0,
    fit: bool = True,
    held_out: float = 0.0,
    categories: Mapping[Input, str] | None = None,
    batch: int = 16,
    source: Source | None = None,
    progress: Progress = silent,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Cache:
    """Reads each image once, in random order, fits the extractor to the first ones and embeds all.

    Args:
        extractor: Fitted to the first 64 images (or 512 MB of features), without the share `held_out`.
        paths: Images.
        preparation: Preparation of the images.
        budget: Features above this number of bytes are memory-mapped.
        seed: Seed of the order.
        fit: False: the extractor is fitted already, and the images only calibrate.
        held_out: Share of the images of a category, the last ones, that calibrate; the extractor is not fitted to them.
        categories: Category of each image; images of all categories are mixed in proportion. None: a single category.
        batch: Number of images per pass of the backbone.
        source: Source of raw features; None: the images.
        progress: Called as `progress("features", done, total, None)`.
        group: Processes that share the work. Each gets the whole cache; those of one machine share the budget.

    Raises:
        TrainingError: A category has fewer than 8 readable images or only identical ones or, without `fit`, no image.
    """
    category, budget = categories or {}, budget / group.local_size
    source = source or read_parts(extractor, preparation)
    if group.size > 1:
        source = take_turns(source, group, whole=preparation.tile is not None)
    order = _shuffled(paths, category, seed)
    features: Tensor | None = None
    file = None
    filled = done = 0  # rows and images
    first: list[Tensor] = []  # raw features of the first images, until there are enough to fit
    kept: list[Input] = []
    names: list[str] = []  # their categories
    contents: list[str] = []
    windows: list[Window] = []
    thumbnails: list[Tensor] = []
    described: list[Tensor] = []
    skipped: list[tuple[str, str]] = []

    def keep(raw: Tensor) -> None:
        nonlocal features, file, filled
        projected = extractor.project(raw)
        if features is None or filled + len(raw) > len(features):
            # how many windows the images have in all is known at the end: as many as the first ones, at first
            heads = [len(window.layout) for window in windows if window.number == 0]
            rows = max(ceil(sum(heads) / len(heads) * len(paths)), len(windows))
            if features is not None:
                rows = max(rows, len(features) * 9 // 8)  # so that it is not copied for every part
            larger, larger_file = allocate((rows, *projected.shape[1:]), budget)
            if features is not None:
                larger[:filled] = features[:filled]
            features, file = larger, larger_file
        features[filled : filled + len(raw)] = projected
        filled += len(raw)

    def fit_first() -> None:
        nonlocal first
        if fit:
            raw = torch.cat(first)
            extractor.fit(raw[_trained_on(windows, names, held_out)] if held_out else raw)
        for part in first:
            keep(part)
        first = []

    for part in source(order, batch):
        skipped += part.skipped
        kept += part.paths
        contents += part.contents
        names += [category.get(path, "") for path in part.paths]
        windows += part.windows
        done += sum(window.number == 0 for window in part.windows)
        progress("features", done + len(skipped), len(paths), None)
        if not part.paths:
            continue
        thumbnails.append(part.thumbnails)
        described.append(part.described)
        if features is None:
            first.append(part.raw)
            if done >= FITTED_ON or sum(raw.nbytes for raw in first) >= 2**29:
                fit_first()
        else:
            keep(part.raw)
    named = {str(path): own for path, own in category.items()}
    images = torch.cat(thumbnails) if thumbnails else torch.empty(0)
    for name in dict.fromkeys(category.get(path, "") for path in order) or [""]:
        of = f"{name}: " if name else ""
        found = sum(own == name and window.number == 0 for own, window in zip(names, windows, strict=True))
        if found < (MINIMUM if fit else 1):
            broken = [reason for path, reason in skipped if named.get(path, "") == name]
            reasons = f"; {len(broken)} could not be read, first: {broken[0]}" if broken else ""
            least = f"at least {MINIMUM} needed by this method, or for several categories; nearest_neighbor takes fewer"
            purpose = f"learn from: {least}" if fit else "calibrate with"
            few = f"{count(found, 'good image')} {'is' if found == 1 else 'are'}"
            raise TrainingError(f"{of}{few} too few to {purpose}{reasons}")
        rows = [row for row, each in enumerate(names) if each == name]
        own = images[rows]
        several = sum(category.get(path, "") == name for path in paths) > 1
        if fit and several and bool((own == own[:1]).all()):
            raise TrainingError(f"{of}all good images are identical; give images of different parts")
    if first:
        fit_first()
    assert features is not None
    whole = features[:filled], images, windows, torch.cat(described), kept
    return Cache(*whole, sorted(skipped), names, contents, [], file)


def _shuffled(paths: Sequence[Input], category: Mapping[Input, str], seed: int) -> list[Input]:
    """Random order in which every prefix contains about the same share of each category."""
    groups: dict[str, list[Input]] = defaultdict(list)
    for path in paths:
        groups[category.get(path, "")].append(path)
    rng = Generator().manual_seed(seed)
    placed = []
    for number, group in enumerate(groups.values()):
        order = torch.randperm(len(group), generator=rng).tolist()
        placed += [(place / len(group), number, group[i]) for place, i in enumerate(order)]
    return [path for *_, path in sorted(placed)]


def _trained_on(windows: Sequence[Window], categories: Sequence[str], held_out: float) -> list[int]:
    """Rows among the first of a cache that do not calibrate, however many images of their category follow."""
    rows: list[int] = []
    for name in dict.fromkeys(categories):
        found = [row for row, category in enumerate(categories) if category == name]
        number = np.cumsum([windows[row].number == 0 for row in found])  # of the image, from 1
        trained = max(2, int((1 - held_out) * max(number[-1], MINIMUM)) - 1)
        rows += [row for row, image in zip(found, number.tolist(), strict=True) if image <= trained]
    return sorted(rows)
