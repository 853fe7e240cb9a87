"""Recognition and removal of files that earlier runs of unflaw have written.

Images drawn by unflaw carry a mark in the file and are never inputs; on a remote store, only files with the names of
such images are checked for it. Folders into which `unflaw watch` sorts are listed in a hidden file of the watched one.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from unflaw.io.files import write_atomically
from unflaw.io.words import count

PANELS, LABELS, PARTS = "images", "labelme", "parts.jsonl"  # names in a folder of results
SORTED = ".unflaw-sorted"  # in a watched folder: one line per subfolder that images were sorted into
HEAD = 128  # bytes of a file that contain the mark of a drawn image
SLACK = 2.0  # seconds that a run may write after its last line
_DRAWN = b"tEXtSoftware\0unflaw"
_NAMES = re.compile(rf"(.*/)?({PANELS}/\d{{5,}}_[^/]*|[^/\d]+)\.png", re.DOTALL)
_NUMBERED = re.compile(r"\d{5,}_.*", re.DOTALL)


def may_be_drawn(path: str) -> bool:
    """Return True if a path, with slashes, has the name of a panel or figure.

    On a remote store each check of a file is a request, so only these are checked.
    """
    return _NAMES.fullmatch(path) is not None


def is_drawn(head: bytes) -> bool:
    """Return True if the first `HEAD` bytes of a file mark an image drawn by unflaw."""
    return _DRAWN in head[:HEAD]


def drawn(path: Path) -> bool:
    """Return True if a file is an image drawn by unflaw."""
    return path.suffix.lower() == ".png" and is_drawn(_head(path))


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(HEAD)
    except OSError:  # reported when the image is read
        return b""


def sorted_into(folder: Path) -> set[Path]:
    """Subfolders into which `unflaw watch` has sorted images."""
    try:
        lines = (folder / SORTED).read_bytes()
    except OSError:
        return set()
    return {folder / name for name in sorted_folders(lines)}


def sorted_folders(content: bytes) -> list[str]:
    """Folders named in a file `SORTED`, relative to its own."""
    return [os.fsdecode(line) for line in content.splitlines()]


def note_sorted(folder: Path, out: Path) -> None:
    """Record in a watched folder that images are sorted into a folder inside it."""
    out, folder = out.resolve(), folder.resolve()
    known = sorted_into(folder)
    if out.is_relative_to(folder) and out not in known:
        lines = sorted(os.fsencode(path.relative_to(folder)) for path in {*known, out})
        with suppress(OSError):  # nothing can be moved out of a read-only folder
            write_atomically(folder / SORTED, lambda file: file.write_bytes(b"".join(line + b"\n" for line in lines)))


def _identity(status: os.stat_result) -> tuple[int, int]:
    """Inode and modification time, which change when a file is replaced or rewritten."""
    return status.st_ino, status.st_mtime_ns


class Earlier:
    """Panels, LabelMe files and `parts.jsonl` in a folder of results before a new run of `unflaw predict`.

    Files of an earlier run that are unchanged since and that the new run does not replace are removed after it. Other
    files stay.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._files: dict[Path, tuple[bool, tuple[int, int]]] = {}  # True for unchanged files of unflaw, and identity
        ended = self._ended()
        for folder, suffix, written in _KINDS:
            for file in sorted((out / folder).glob(f"*{suffix}")) if folder else [out / PARTS]:
                with suppress(FileNotFoundError):
                    status = file.lstat()
                    if not folder or _NUMBERED.fullmatch(file.stem):
                        own = stat.S_ISREG(status.st_mode) and status.st_mtime <= ended and written(_head(file))
                        self._files[file] = own, _identity(status)

    def clear(self) -> list[str]:
        """Remove files that the new run has not replaced; return sentences on removed and remaining files."""
        gone, stay = Counter[str](), Counter[str]()
        for file, (own, identity) in self._files.items():
            place = file.relative_to(self.out).parts[0]
            with suppress(FileNotFoundError):
                if _identity(file.lstat()) == identity:  # else replaced by this run
                    (gone if own and _try_unlink(file) else stay)[place] += 1
        for folder in (PANELS, LABELS):
            if gone[folder]:
                with suppress(OSError):  # it contains other files
                    (self.out / folder).rmdir()
        sentences = [f"{self.out}: removed files of an earlier run: {_format_counts(gone)}"] if gone else []
        if stay:
            sentences.append(
                f"{self.out}: kept older files that are changed or not from unflaw: {_format_counts(stay)}"
            )
        return sentences

    def _ended(self) -> float:
        """Time of the last write of the previous run, complete or not."""
        times = [float("-inf")]
        for name in ("results.jsonl", "results.jsonl.part", "drift.json"):
            with suppress(FileNotFoundError):
                times.append((self.out / name).stat().st_mtime)
        return max(times) + SLACK


def _try_unlink(file: Path) -> bool:
    try:
        file.unlink()
    except OSError:
        return False
    return True


def _format_counts(places: Counter[str]) -> str:
    return ", ".join(place if place == PARTS else f"{count(n, 'file')} in {place}" for place, n in places.items())


# folder, suffix, and a test of the first bytes for files of unflaw: LabelMe, for example, writes them differently
_KINDS: tuple[tuple[str, str, Callable[[bytes], bool]], ...] = (
    (PANELS, ".png", is_drawn),
    (LABELS, ".json", lambda head: head.startswith(b'{"version": "5.0.0", "flags": {"good": ')),
    ("", PARTS, lambda head: head.startswith(b'{"part": ')),
)
