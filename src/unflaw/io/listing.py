"""Listing files below a folder: which names are passed over, and how links to folders are followed.

The same rule holds for data sets, `unflaw predict`, `unflaw watch` and, on the file systems of fsspec, for Ray.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from unflaw.errors import ImageError
from unflaw.io.outputs import drawn, sorted_into
from unflaw.io.words import count

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

# What Windows, macOS, Linux and NAS devices make by themselves: recycle bins, snapshots, thumbnails. In lower case.
# What begins with a dot is passed over anyway: .Trash-1000, .thumbnails, .@__thumb, ._001.png of AppleDouble.
_SYSTEM = frozenset(
    {
        *("#recycle", "#snapshot", "$recycle.bin", "@eadir", "@recently-snapshot", "@recycle", "__macosx"),
        *("desktop.ini", "ehthumbs.db", "lost+found", "network trash folder", "recycled", "recycler"),
        *("system volume information", "temporary items", "thumbnails", "thumbs.db", "~snapshot"),
    }
)


class Entry(NamedTuple):
    """A file or folder in a folder.

    Attributes:
        path: With the path of the folder that was listed before its name.
        folder: True for a folder, and for a link to one.
        link: True for a symbolic link; on Windows also for a junction.
        info: What fsspec says of it; None elsewhere.
    """

    path: str
    folder: bool
    link: bool
    info: Any = None


Scan = Callable[[str], Iterable[Entry]]
Written = Callable[[str, Sequence[Entry]], Iterable[str]]


def is_passed_over(name: str) -> bool:
    """True for the name, without its folder, of a hidden file or folder, and of one that systems make by themselves."""
    return name.startswith(".") or name.lower() in _SYSTEM


def is_image(path: str | Path) -> bool:
    """True where the suffix is that of an image."""
    return os.path.splitext(path)[1].lower() in SUFFIXES  # noqa: PTH122 - a URL is no Path


def scan(folder: str) -> Iterator[Entry]:
    """The files and folders in a folder of this machine; none where it cannot be read. Dead links are left out."""
    with suppress(PermissionError, FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if link := _is_link(entry):
                is_folder, is_file = os.path.isdir(entry.path), os.path.isfile(entry.path)  # noqa: PTH112, PTH113
            else:
                is_folder, is_file = entry.is_dir(follow_symlinks=False), entry.is_file(follow_symlinks=False)
            if is_folder or is_file:
                yield Entry(entry.path, is_folder, link)


def _is_link(entry: os.DirEntry[str]) -> bool:
    """True for symbolic links and, on Windows, for junctions."""
    return entry.is_symlink() or (
        os.name == "nt" and bool(getattr(entry.stat(follow_symlinks=False), "st_reparse_tag", 0))
    )


def _written(folder: str, entries: Sequence[Entry]) -> Iterable[str]:
    """Folders within a folder of this machine that `unflaw watch` has sorted images into."""
    return map(str, sorted_into(Path(folder)))


def walk(
    root: str,
    scan: Scan = scan,
    identify: Callable[[str], str] = os.path.realpath,
    passed_over: list[Entry] | None = None,
    skip: Callable[[str], bool] = is_passed_over,
    written: Written = _written,
) -> Iterator[Entry]:
    """The files below a folder, at any depth, in the order of their paths; those behind links to folders come last.

    Links to folders are followed. Each folder is listed once, however many links lead to it, and by its own path where
    it lies below the root itself; so loops end.

    Args:
        root: The folder, which may have any name, and may be a link.
        scan: Lists one folder.
        identify: Gives the path at which the root, or what a link leads to, really lies.
        passed_over: Gets the entries whose names are passed over.
        skip: True for these names.
        written: Gives the paths below a folder, of which it gets the entries, that earlier runs of unflaw have written;
            they are left out.
    """
    outputs: set[str] = set()

    def entries(folder: str, place: str) -> Iterator[tuple[Entry, str]]:
        found = sorted(scan(folder), key=attrgetter("path"))
        outputs.update(written(folder, found))
        for entry in found:
            if entry.path in outputs:
                continue
            name = os.path.basename(entry.path)  # noqa: PTH119
            if not skip(name):
                yield entry, os.path.join(place, name)  # noqa: PTH118
            elif passed_over is not None:
                passed_over.append(entry)

    seen: set[str] = set()
    links = [root]
    while links:
        link = heapq.heappop(links)
        waiting = [iter([(Entry(link, True, False), identify(link))])]
        while waiting:  # not recursive: folders may be nested more deeply than Python's stack
            entry, place = next(waiting[-1], (None, ""))
            if entry is None:
                waiting.pop()
            elif not entry.folder:
                yield entry
            elif entry.link:
                heapq.heappush(links, entry.path)
            elif place not in seen:
                seen.add(place)
                waiting.append(entries(entry.path, place))


def visible_files(folder: str | Path, passed_over: list[Entry] | None = None) -> list[Path]:
    """All files under a folder, sorted, but for those that `is_passed_over` says are hidden or the system's.

    Links to folders are followed, see `walk`.

    Args:
        folder: The folder.
        passed_over: Gets the files and folders that are passed over.

    Raises:
        ImageError: There is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageError(f"{folder}: there is no such folder; check the path")
    found = [Path(entry.path) for entry in walk(os.fspath(folder), passed_over=passed_over)]
    return sorted(found, key=lambda f: f.as_posix())


def list_images(folder: str | Path, passed_over: list[Entry] | None = None) -> list[Path]:
    """The `visible_files` under a folder whose suffix is that of an image, but for images that unflaw itself drew."""
    return [f for f in visible_files(folder, passed_over) if is_image(f) and not drawn(f)]


def counted(
    passed_over: Iterable[Entry],
    scan: Scan = scan,
    identify: Callable[[str], str] = os.path.realpath,
    counts: Callable[[str], bool] = is_image,
) -> dict[str, int]:
    """Counts the images in folders that were passed over, and in each folder with hidden images.

    Args:
        passed_over: As `walk` gives them.
        scan, identify: As for `walk`.
        counts: True for the paths of files that are counted.

    Returns:
        By the path of the folder, only those with images.
    """
    numbers: dict[str, int] = {}
    for entry in {entry.path: entry for entry in passed_over}.values():
        inside = walk(entry.path, scan, identify, skip=lambda _: False) if entry.folder else [entry]
        if number := sum(counts(file.path) for file in inside):
            place = entry.path if entry.folder else os.path.dirname(entry.path)  # noqa: PTH120
            numbers[place] = numbers.get(place, 0) + number
    return numbers


def note(numbers: Mapping[str, int], noun: str = "image") -> list[str]:
    """A sentence on what was passed over, or none where that is nothing.

    Args:
        numbers: How many, by the name of the folder.
        noun: Of what is counted.
    """
    if not numbers:
        return []
    places = ", ".join(f"{place} ({number})" for place, number in sorted(numbers.items())[:3])
    end = ", …" if len(numbers) > 3 else "."
    total = count(sum(numbers.values()), noun)
    return [f"Hidden files and folders of the system are passed over, {total} in all: {places}{end}"]
