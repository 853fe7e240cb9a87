"""Listing of files below a folder: ignored names, and links to folders.

Data sets, `unflaw predict`, `unflaw watch` and, on fsspec file systems, Ray follow the same rules.
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

# Files and folders that Windows, macOS, Linux and NAS devices create: recycle bins, snapshots, thumbnails. In lower
# case. Names that begin with a dot are ignored anyway: .Trash-1000, .thumbnails, .@__thumb, ._001.png of AppleDouble.
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
        path: Path of the listed folder, joined with the name.
        folder: True for a folder, and for a link to one.
        link: True for a symbolic link; on Windows also for a junction.
        info: Entry of fsspec; None on the local file system.
    """

    path: str
    folder: bool
    link: bool
    info: Any = None


Scan = Callable[[str], Iterable[Entry]]
Written = Callable[[str, Sequence[Entry]], Iterable[str]]


def is_passed_over(name: str) -> bool:
    """Return True for the name, without folder, of a hidden file or folder or of one that systems create."""
    return name.startswith(".") or name.lower() in _SYSTEM


def is_image(path: str | Path) -> bool:
    """Return True if the suffix is that of an image."""
    return os.path.splitext(path)[1].lower() in SUFFIXES  # noqa: PTH122 - a URL is no Path


def scan(folder: str) -> Iterator[Entry]:
    """Iterate over a local folder, without dead links; empty if it cannot be read."""
    with suppress(PermissionError, FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False) if os.name == "nt" else None
            link = entry.is_symlink() or bool(getattr(status, "st_reparse_tag", 0))  # a junction
            # os.path returns False for links in a loop, where DirEntry raises
            is_folder = os.path.isdir(entry.path) if link else entry.is_dir(follow_symlinks=False)  # noqa: PTH112
            is_file = os.path.isfile(entry.path) if link else entry.is_file(follow_symlinks=False)  # noqa: PTH113
            if is_folder or is_file:
                yield Entry(entry.path, is_folder, link)


def walk(
    root: str,
    scan: Scan = scan,
    identify: Callable[[str], str] = os.path.realpath,
    passed_over: list[Entry] | None = None,
    skip: Callable[[str], bool] = is_passed_over,
    written: Written = lambda folder, _: map(str, sorted_into(Path(folder))),
) -> Iterator[Entry]:
    """Iterate over the files below a folder in the order of their paths; those behind links to folders come last.

    Each folder is listed once, however many links lead to it, and by its own path if it lies below the root; so loops
    of links end.

    Args:
        root: The folder, which may have any name, and may be a link.
        scan: Function that lists one folder.
        identify: Function that resolves the root and links to real paths.
        passed_over: List to which ignored entries are appended.
        skip: Function that returns True for ignored names.
        written: Function of a folder and its entries that returns paths below it which earlier runs of unflaw have
            written; they are left out.
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
    """List all files under a folder, sorted, except ignored ones; see `walk`.

    Raises ImageError if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageError(f"{folder}: there is no such folder; check the path")
    found = [Path(entry.path) for entry in walk(os.fspath(folder), passed_over=passed_over)]
    return sorted(found, key=lambda f: f.as_posix())


def list_images(folder: str | Path, passed_over: list[Entry] | None = None) -> list[Path]:
    """List the `visible_files` under a folder that are images, except those that unflaw itself drew."""
    return [f for f in visible_files(folder, passed_over) if is_image(f) and not drawn(f)]


def counted(
    passed_over: Iterable[Entry],
    scan: Scan = scan,
    identify: Callable[[str], str] = os.path.realpath,
    counts: Callable[[str], bool] = is_image,
) -> dict[str, int]:
    """Count the images, or the files for which `counts` is true, among ignored entries, by the path of their folder."""
    numbers: dict[str, int] = {}
    for entry in {entry.path: entry for entry in passed_over}.values():
        inside = walk(entry.path, scan, identify, skip=lambda _: False) if entry.folder else [entry]
        if number := sum(counts(file.path) for file in inside):
            place = entry.path if entry.folder else os.path.dirname(entry.path)  # noqa: PTH120
            numbers[place] = numbers.get(place, 0) + number
    return numbers


def note(numbers: Mapping[str, int], noun: str = "image") -> list[str]:
    """Describe ignored files in a sentence, from their numbers by folder; empty if there are none."""
    if not numbers:
        return []
    places = ", ".join(f"{place} ({number})" for place, number in sorted(numbers.items())[:3])
    end = ", …" if len(numbers) > 3 else "."
    total = count(sum(numbers.values()), noun)
    return [f"Hidden files and folders of the system are passed over, {total} in all: {places}{end}"]
