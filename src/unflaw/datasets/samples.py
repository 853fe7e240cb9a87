"""What a data set is made of: samples, which carry paths, not pixels, and how they are listed from folders."""

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

SHORT = 16  # digits of a SHA-256 that are enough to know an image again


class DatasetError(ValueError):
    """A data set that cannot be used. The message names the path, what was found there and what to do."""


@dataclass(frozen=True)
class Saturated:
    """One region of a defect, and how much of it must be found for it to count as found whole (saturated PRO)."""

    mask: Path  # an image of the same size, not 0 in the region
    saturation: float  # pixels of the original image, or a share of the region's area
    relative: bool  # whether it is a share


@dataclass(frozen=True)
class Sample:
    """One image and what is known of it."""

    path: Path
    label: int  # 0 good, 1 defect
    mask: Path | None = None  # an image of the same size, not 0 where the defect is; or a folder of such, one a region
    defect: str = "good"  # "good", or the kind of defect
    regions: tuple[Saturated, ...] = ()  # where the data set says how they saturate


@dataclass(frozen=True)
class Dataset:
    """The samples of one category of products."""

    name: str
    layout: str  # "folder", "table", or the name of one of unflaw.datasets.layouts.LAYOUTS such as "mvtec"
    train: tuple[Sample, ...]  # good ones only
    validation: tuple[Sample, ...]  # good ones to calibrate with; where empty, some of `train` are held out for it
    test: tuple[Sample, ...]
    problems: tuple[str, ...]  # what is wrong with the data, yet not enough to stop; a sentence each


Found = tuple[list[Sample], list[Sample], list[Sample], list[str]]  # train, validation, test, problems


def digest(samples: Iterable[Sample | Input], contents: Mapping[Input, str] | None = None) -> str:
    """SHA-256, in hex, of the names and contents of images: the same in any order, and wherever their folder lies.

    `contents`: the `sha256` of each file, where it is known already.
    """
    return _digest((sample.path if isinstance(sample, Sample) else sample for sample in samples), contents)


def fingerprint(dataset: Dataset) -> str:
    """SHA-256, in hex, of all that figures of a data set depend on: contents of images and masks, labels and order.

    Raises:
        OSError: A file that may not be read.
    """
    parts = (("train", dataset.train), ("validation", dataset.validation), ("test", dataset.test))
    lines = []
    for name, samples in parts:
        for sample in samples:
            regions = "".join(f" {r.mask.name} {r.saturation} {r.relative}" for r in sample.regions)
            mask = _content(sample.mask) if sample.mask else ""
            lines.append(f"{name} {sample.label} {sha256(sample.path)} {mask}{regions}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def sha256(path: Input) -> str:
    """SHA-256, in hex, of a file, or of the pixels of an array.

    Raises:
        OSError: The file cannot be read; with its name. ImageError: The array is no image.
    """
    if isinstance(path, InMemory):
        return read_hashed(path)[1]
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:  # the name is missing where opening succeeds and reading does not
        raise OSError(error.errno, error.strerror, str(path)) from error


def sha256_if_readable(path: Input) -> str:
    """As `sha256`; "" where the file cannot be read, which is said where it is needed as an image."""
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
    """The first file of each content, in order; and the others, each with that first one.

    `contents`: the `sha256` of each file, "" where it cannot be read: such files are all kept.
    """
    first: dict[str, Input] = {}
    for path in paths:
        first.setdefault(contents[path] or str(path), path)
    own = {path: first[contents[path] or str(path)] for path in paths}
    return list(first.values()), [(path, other) for path, other in own.items() if path != other]


class Tree:
    """The folders and files of one data set, found whatever the case of their names.

    Of names that differ by case only, one is taken: that which is spelled as asked for, else the first.

    Args:
        root: The folder of the data set.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._names: dict[Path, dict[str, list[str]]] = {}
        self._passed_over: list[Entry] = []
        self._taken: dict[Path, list[str]] = {}  # folders, and what else they could have been

    def names(self, folder: Path) -> dict[str, list[str]]:
        """The names in a folder by what they are in lower case; none where it cannot be read."""
        if folder not in self._names:
            found = self._names[folder] = {}
            with suppress(OSError):
                for name in sorted(entry.name for entry in folder.iterdir()):
                    found.setdefault(name.casefold(), []).append(name)
        return self._names[folder]

    def path(self, path: str, folder: Path | None = None, file: bool = False) -> Path:
        """A folder below the root or another folder, such as "train/good", as it is spelled on the disk.

        Where there is none, the path that was asked for. `file`: the last name is that of a file.
        """
        found = folder or self.root
        parts = path.split("/")
        for number, part in enumerate(parts, 1):
            is_there = Path.is_file if file and number == len(parts) else Path.is_dir
            names = [name for name in self.names(found).get(part.casefold(), []) if is_there(found / name)]
            chosen = part if part in names or not names else names[0]
            self._taken[found / chosen] = [name for name in names if name != chosen]
            found /= chosen
        return found

    def images(self, folder: Path) -> list[Path]:
        """All images under a folder, sorted; none where there is no such folder."""
        return list_images(folder, self._passed_over) if folder.is_dir() else []

    def unused(self, folders: Iterable[Path], used: Iterable[Path]) -> list[str]:
        """A sentence on the files in these folders that are not used, or none."""
        known = set(used)
        there = [path for folder in folders if folder.is_dir() for path in visible_files(folder, self._passed_over)]
        files = [relative(path, self.root) for path in there if path not in known]
        return [f"Files that were not used: {some(files)}."] if files else []

    def unread(self, folders: Iterable[Path]) -> list[str]:
        """A sentence on files in folders of masks that are of a kind that is not read, or none."""
        there = [path for folder in folders if folder.is_dir() for path in visible_files(folder, self._passed_over)]
        files = [relative(path, self.root) for path in there if not is_image(path)]
        return [f"Files among the masks that are no images: {some(files)}. Save masks as PNG."] if files else []

    def unfitting(self, masks: Iterable[Path], samples: Sequence[Sample], name: Callable[[Sample], str]) -> list[str]:
        """A sentence on masks that fit no image, or none.

        Args:
            masks: All files that should be masks.
            samples: The images to test on.
            name: How the mask of an image would have to be called.
        """
        used = {sample.mask for sample in samples}
        left = [path for path in masks if path not in used and used.isdisjoint(path.parents)]
        if not left:
            return []
        text = f"Mask files that fit no image: {some([relative(path, self.root) for path in left])}."
        if lacking := [sample for sample in samples if sample.label and not sample.mask]:
            first = left[0].stem.casefold()
            near = max(lacking, key=lambda s: (s.path.stem.casefold() in first) * len(s.path.stem))
            text += f" The mask of {relative(near.path, self.root)} would be {name(near)}."
        if not any(sample.mask for sample in samples if sample.label):
            text += " So no image has a mask, and there are no pixel metrics."
        return [text]

    def notes(self) -> list[str]:
        """A sentence on folders that differ by case only, and one on what was passed over, where there are any."""
        same = [
            f"{relative(path, self.root)} is read, and not {' or '.join(names)}"
            for path, names in self._taken.items()
            if names
        ]
        doubles = [f"Folders whose names differ by case only: {'; '.join(same)}."] if same else []
        numbers = counted(self._passed_over)
        return doubles + note({relative(Path(path), self.root): n for path, n in numbers.items()})


def images(folder: Path) -> list[Path]:
    """All images under a folder, sorted; none where there is no such folder."""
    return Tree(folder).images(folder)


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, and links to folders, sorted, but for those passed over; none where there is none."""
    visible = folder.iterdir() if folder.is_dir() else ()
    return sorted(entry for entry in visible if entry.is_dir() and not is_passed_over(entry.name))


def stem(path: Path, folder: Path) -> str:
    """The path from the folder on, without suffix."""
    return path.relative_to(folder).with_suffix("").as_posix()


def relative(path: Path, root: Path) -> str:
    """The path from the root on, as messages name it."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def some(names: Sequence[str], limit: int = 3) -> str:
    """The first names and how many there are."""
    return f"{', '.join(names[:limit])}{', …' if len(names) > limit else ''} ({len(names)} in all)"


def _content(mask: Path) -> str:
    return _digest(list_images(mask)) if mask.is_dir() else sha256(mask)


def _digest(files: Iterable[Input], contents: Mapping[Input, str] | None = None) -> str:
    paths = list(files)
    folders = [path.absolute().parent for path in paths if isinstance(path, Path)]
    root = os.path.commonpath(folders) if folders else ""
    names = [path.absolute().relative_to(root).as_posix() if isinstance(path, Path) else path.name for path in paths]
    known = [sha256(path) if contents is None else contents[path] for path in paths]
    lines = sorted(f"{name}\0{content}\n" for name, content in zip(names, known, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
