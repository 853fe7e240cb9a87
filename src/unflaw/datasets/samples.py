"""Samples of a data set, which hold paths, not pixels, and listing of its folders."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from unflaw.errors import ImageError
from unflaw.imaging.inputs import InMemory, Input
from unflaw.imaging.reading import read_hashed
from unflaw.io.listing import Entry, counted, is_image, is_passed_over, list_images, note, visible_files

SHORT = 16  # digits of a SHA-256 that identify an image


class DatasetError(ValueError):
    """Error for an unusable data set; the message names the path, the fault and the remedy."""


@dataclass(frozen=True)
class Saturated:
    """One region of a defect, and the area of it that counts as complete detection (saturated PRO)."""

    mask: Path  # an image of the same size, nonzero in the region
    saturation: float  # pixels of the original image, or share of the region's area
    relative: bool  # True if `saturation` is a share


@dataclass(frozen=True)
class Sample:
    """One image with its label and mask."""

    path: Path
    label: int  # 0 good, 1 defect
    mask: Path | None = None  # an image of the same size, nonzero at the defect; or a folder of one per region
    defect: str = "good"  # "good", or the kind of defect
    regions: tuple[Saturated, ...] = ()  # if the data set defines saturations
    group: str = ""  # what belongs together, such as images of one part or batch; "": not named


@dataclass(frozen=True)
class Dataset:
    """The samples of one category of products."""

    name: str
    layout: str  # "folder", "table", or the name of one of unflaw.datasets.layouts.LAYOUTS such as "mvtec"
    train: tuple[Sample, ...]  # good images only
    validation: tuple[Sample, ...]  # good images for calibration; if empty, a part of `train` is held out
    test: tuple[Sample, ...]
    problems: tuple[str, ...]  # sentences on faults that do not prevent use


Splits = tuple[list[Sample], list[Sample], list[Sample]]  # train, validation, test


def digest(samples: Iterable[Sample | Input], contents: Mapping[Input, str] | None = None) -> str:
    """SHA-256, in hex, of the names and contents of images, independent of their order and of their folder.

    `contents`: the `sha256` of each file, if known already.
    """
    return _digest((sample.path if isinstance(sample, Sample) else sample for sample in samples), contents)


def fingerprint(dataset: Dataset) -> str:
    """SHA-256, in hex, of everything that results depend on: contents of images and masks, labels and order.

    Raises OSError if a file cannot be read.
    """
    parts = (("train", dataset.train), ("validation", dataset.validation), ("test", dataset.test))
    lines = []
    for name, samples in parts:
        for sample in samples:
            regions = "".join(f" {r.mask.name} {r.saturation} {r.relative}" for r in sample.regions)
            mask = ""
            if sample.mask:
                mask = _digest(list_images(sample.mask)) if sample.mask.is_dir() else sha256(sample.mask)
            lines.append(f"{name} {sample.label} {sha256(sample.path)} {mask}{regions}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def sha256(path: Input) -> str:
    """SHA-256, in hex, of a file, or of the pixels of an array.

    Raises:
        OSError: The file cannot be read; with its name.
        ImageError: The array is not an image.
    """
    if isinstance(path, InMemory):
        return read_hashed(path)[1]
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:  # the name is missing where opening succeeds and reading does not
        raise OSError(error.errno, error.strerror, str(path)) from error


def sha256_if_readable(path: Input) -> str:
    """Like `sha256`; "" if the file cannot be read, which is reported when it is read as an image."""
    try:
        return sha256(path)
    except (OSError, ImageError):
        return ""


def content_keys(paths: Iterable[Input]) -> dict[Input, str]:
    """A key of each image, equal for files that are the same byte for byte; "" for a file that cannot be read.

    Files are opened only where others have the same size, and read whole only where their ends are the same too.
    """
    keys: dict[Input, str] = {}
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in paths:
        if isinstance(path, InMemory):
            keys[path] = sha256_if_readable(path)
            continue
        try:
            by_size[path.stat().st_size].append(path)
        except OSError:
            keys[path] = ""
    for size, alike in by_size.items():
        by_ends: dict[bytes, list[Path]] = defaultdict(list)
        for path in alike:
            by_ends[b"" if len(alike) == 1 else _ends(path, size)].append(path)
        for number, same in enumerate(by_ends.values()):
            keys |= {path: f"{size} {number}" if len(same) == 1 else sha256_if_readable(path) for path in same}
    return keys


def _ends(path: Path, size: int) -> bytes:
    """The first and last 64 KB of a file; its name where it cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(2**16)
            file.seek(max(0, size - 2**16))
            return head + file.read(2**16)
    except OSError:
        return str(path).encode("utf-8", "surrogateescape")


def distinct(paths: Sequence[Input], contents: Mapping[Input, str]) -> tuple[list[Input], list[tuple[Input, Input]]]:
    """Split files by content into the first of each, in order, and pairs of a duplicate and that first file.

    `contents`: the `sha256` of each file; unreadable files, with "", are all kept.
    """
    first: dict[str, Input] = {}
    for path in paths:
        first.setdefault(contents[path] or str(path), path)
    own = {path: first[contents[path] or str(path)] for path in paths}
    return list(first.values()), [(path, other) for path, other in own.items() if path != other]


class Tree:
    """Case-insensitive lookup of folders and files of a data set.

    Of names that differ only by case, the exact match is used, else the first. `problems` collects sentences on faults.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.problems = root, list[str]()
        self._names: dict[Path, dict[str, list[str]]] = {}
        self._passed_over: list[Entry] = []
        self._alternatives: dict[Path, list[str]] = {}  # paths, and other names that differ only by case

    def names(self, folder: Path) -> dict[str, list[str]]:
        """Names in a folder by their lower case; empty if it cannot be read."""
        if folder not in self._names:
            found = self._names[folder] = {}
            with suppress(OSError):
                for name in sorted(entry.name for entry in folder.iterdir()):
                    found.setdefault(name.casefold(), []).append(name)
        return self._names[folder]

    def path(self, path: str, folder: Path | None = None, file: bool = False) -> Path:
        """Resolve a path below the root or another folder, such as "train/good", to its spelling on disk.

        A path that does not exist is returned as given. `file`: the last name is that of a file.
        """
        found = folder or self.root
        parts = path.split("/")
        for number, part in enumerate(parts, 1):
            is_there = Path.is_file if file and number == len(parts) else Path.is_dir
            names = [name for name in self.names(found).get(part.casefold(), []) if is_there(found / name)]
            chosen = part if part in names or not names else names[0]
            self._alternatives[found / chosen] = [name for name in names if name != chosen]
            found /= chosen
        return found

    def images(self, folder: Path) -> list[Path]:
        """List all images under a folder, sorted; empty if it does not exist."""
        return list_images(folder, self._passed_over) if folder.is_dir() else []

    def report(self, fault: str, files: Iterable[Path | str], rest: str = ".") -> None:
        """Add a problem with the names of some files, if there are any."""
        names = [relative(file, self.root) if isinstance(file, Path) else file for file in files]
        if names:
            self.problems.append(f"{fault}: {some(names)}{rest}")

    def report_unused(self, folders: Iterable[Path], used: Iterable[Sample | Path]) -> None:
        """Report the files in folders that are not used."""
        known = {file.path if isinstance(file, Sample) else file for file in used}
        self.report("Files that were not used", [path for path in self._files(folders) if path not in known])

    def report_masks(
        self, folders: Iterable[Path], masks: Iterable[Path], samples: Sequence[Sample], name: Callable[[Sample], str]
    ) -> None:
        """Report masks that belong to no sample, and files in the folders of masks that are not images.

        `name`: function that returns the expected name of the mask of a sample.
        """
        used = {sample.mask for sample in samples}
        if left := [path for path in masks if path not in used and used.isdisjoint(path.parents)]:
            rest = "."
            if lacking := [sample for sample in samples if sample.label and not sample.mask]:
                first = left[0].stem.casefold()
                near = max(lacking, key=lambda s: (s.path.stem.casefold() in first) * len(s.path.stem))
                rest += f" The mask of {relative(near.path, self.root)} would be {name(near)}."
            if not any(sample.mask for sample in samples if sample.label):
                rest += " So no image has a mask, and there are no pixel metrics."
            self.report("Mask files that fit no image", left, rest)
        others = [path for path in self._files(folders) if not is_image(path)]
        self.report("Files among the masks that are no images", others, ". Save masks as PNG.")

    def _files(self, folders: Iterable[Path]) -> list[Path]:
        return [path for folder in folders if folder.is_dir() for path in visible_files(folder, self._passed_over)]

    def notes(self) -> list[str]:
        """Report folders that differ only by case, and ignored files."""
        same = [
            f"{relative(path, self.root)} is read, and not {' or '.join(names)}"
            for path, names in self._alternatives.items()
            if names
        ]
        doubles = [f"Folders whose names differ by case only: {'; '.join(same)}."] if same else []
        numbers = counted(self._passed_over)
        return doubles + note({relative(Path(path), self.root): n for path, n in numbers.items()})


def images(folder: Path) -> list[Path]:
    """List all images under a folder, sorted; empty if it does not exist."""
    return Tree(folder).images(folder)


def subfolders(folder: Path) -> list[Path]:
    """List the folders, and links to folders, in a folder, sorted, except ignored ones."""
    visible = folder.iterdir() if folder.is_dir() else ()
    return sorted(entry for entry in visible if entry.is_dir() and not is_passed_over(entry.name))


def stem(path: Path, folder: Path) -> str:
    """Path relative to a folder, without suffix."""
    return path.relative_to(folder).with_suffix("").as_posix()


def relative(path: Path, root: Path) -> str:
    """Path relative to the root, for messages."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def some(names: Sequence[str], limit: int = 3) -> str:
    """Format the first names and the number of all."""
    return f"{', '.join(names[:limit])}{', …' if len(names) > limit else ''} ({len(names)} in all)"


def _digest(files: Iterable[Input], contents: Mapping[Input, str] | None = None) -> str:
    paths = list(files)
    folders = [path.absolute().parent for path in paths if isinstance(path, Path)]
    root = os.path.commonpath(folders) if folders else ""
    names = [path.absolute().relative_to(root).as_posix() if isinstance(path, Path) else path.name for path in paths]
    known = [sha256(path) if contents is None else contents[path] for path in paths]
    lines = sorted(f"{name}\0{content}\n" for name, content in zip(names, known, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
