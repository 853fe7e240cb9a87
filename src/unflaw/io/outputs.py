"""Files that unflaw has written: they are no input of a later run, and one into the same folder clears them away.

The images that it draws, panels and figures, say so in the file: on this machine they are known wherever they lie and
however they are called, on a remote store by the names that they are written with. Nothing else is taken for them.
Where `unflaw watch` sorts into a folder within the watched one, a hidden file of the latter says so.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from unflaw.io.files import write_atomically
from unflaw.io.words import count

PANELS, LABELS, PARTS = "images", "labelme", "parts.jsonl"  # in a folder of results
SORTED = ".unflaw-sorted"  # in a watched folder: a line for each folder in it that images were sorted into
HEAD = 128  # bytes of a file that tell whether unflaw drew it
SLACK = 2.0  # seconds that a run goes on writing after its last line
_DRAWN = b"tEXtSoftware\0unflaw"
_NAMES = re.compile(rf"(.*/)?({PANELS}/\d{{5,}}_[^/]*|[^/\d]+)\.png", re.DOTALL)
_NUMBERED = re.compile(r"\d{5,}_.*", re.DOTALL)


def may_be_drawn(path: str) -> bool:
    """True if a path, with slashes, is such as panels and figures have when they are written.

    On a remote store each look into a file is a request, so only these are looked into.
    """
    return _NAMES.fullmatch(path) is not None


def is_drawn(head: bytes) -> bool:
    """True if a file that begins so, with `HEAD` bytes at least, is an image that unflaw drew."""
    return _DRAWN in head[:HEAD]


def drawn(path: Path) -> bool:
    """True if a file is an image that unflaw drew."""
    return path.suffix.lower() == ".png" and is_drawn(_head(path))


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(HEAD)
    except OSError:  # which is said when it is read as an image
        return b""


def sorted_into(folder: Path) -> set[Path]:
    """The folders within a folder that `unflaw watch` has sorted images into."""
    try:
        lines = (folder / SORTED).read_bytes()
    except OSError:
        return set()
    return {folder / name for name in sorted_folders(lines)}


def sorted_folders(content: bytes) -> list[str]:
    """The folders, relative to its own, that a file `SORTED` names."""
    return [os.fsdecode(line) for line in content.splitlines()]


def note_sorted(folder: Path, out: Path) -> None:
    """Notes in a watched folder that images are sorted into another one, if that lies within."""
    out, folder = out.resolve(), folder.resolve()
    known = sorted_into(folder)
    if out.is_relative_to(folder) and out not in known:
        lines = sorted(os.fsencode(path.relative_to(folder)) for path in {*known, out})
        with suppress(OSError):  # of a folder that cannot be written nothing is moved away either
            write_atomically(folder / SORTED, lambda file: file.write_bytes(b"".join(line + b"\n" for line in lines)))


class _Mark(NamedTuple):
    """By which a file is known to be another one."""

    file: int
    changed: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Mark:
        return cls(status.st_ino, status.st_mtime_ns)


class Earlier:
    """Panels, LabelMe files and `parts.jsonl` that stand in a folder of results before a new run of `unflaw predict`.

    Those that an earlier run wrote, and nobody has changed since, go once the new run has ended without writing them
    anew: they would look like its own. Others stay.

    Args:
        out: The folder.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._own: dict[Path, _Mark] = {}
        self._others: dict[Path, _Mark] = {}
        ended = self._ended()
        for folder, suffix, written in _KINDS:
            for file in sorted((out / folder).glob(f"*{suffix}")) if folder else [out / PARTS]:
                with suppress(FileNotFoundError):
                    status = file.lstat()
                    if folder and not _NUMBERED.fullmatch(file.stem):
                        continue
                    own = stat.S_ISREG(status.st_mode) and status.st_mtime <= ended and written(_head(file))
                    (self._own if own else self._others)[file] = _Mark.of(status)

    def clear(self) -> list[str]:
        """Removes what the new run has not replaced; a sentence each on what went and on what stays."""
        gone, stay = Counter[str](), Counter[str]()
        for file, mark in {**self._own, **self._others}.items():
            place = file.relative_to(self.out).parts[0]
            with suppress(FileNotFoundError):
                if _Mark.of(file.lstat()) != mark:  # written by this run
                    continue
                if file in self._own and _removed(file):
                    gone[place] += 1
                else:
                    stay[place] += 1
        for folder in (PANELS, LABELS):
            if gone[folder]:
                with suppress(OSError):  # it holds other files
                    (self.out / folder).rmdir()
        sentences = [f"{self.out}: removed what an earlier run had left: {_counted(gone)}"] if gone else []
        if stay:
            sentences.append(f"{self.out}: older files stay, which are changed or not unflaw's: {_counted(stay)}")
        return sentences

    def _ended(self) -> float:
        """When the last run there wrote for the last time, whether it came to its end or not."""
        times = [float("-inf")]
        for name in ("results.jsonl", "results.jsonl.part", "drift.json"):
            with suppress(FileNotFoundError):
                times.append((self.out / name).stat().st_mtime)
        return max(times) + SLACK


def _removed(file: Path) -> bool:
    try:
        file.unlink()
    except OSError:
        return False
    return True


def _counted(places: Counter[str]) -> str:
    return ", ".join(place if place == PARTS else f"{count(n, 'file')} in {place}" for place, n in places.items())


# folder, suffix, and whether what begins so is as unflaw wrote it: LabelMe, for one, writes in another way
_KINDS: tuple[tuple[str, str, Callable[[bytes], bool]], ...] = (
    (PANELS, ".png", is_drawn),
    (LABELS, ".json", lambda head: head.startswith(b'{"version": "5.0.0", "flags": {"good": ')),
    ("", PARTS, lambda head: head.startswith(b'{"part": ')),
)
