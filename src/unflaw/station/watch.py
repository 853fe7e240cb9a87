"""Watching a folder: each image that arrives is inspected once and filed by verdict."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from unflaw.errors import ImageError
from unflaw.io.files import write_atomically
from unflaw.io.listing import Entry, counted, is_image, note, visible_files
from unflaw.io.outputs import is_drawn, note_sorted
from unflaw.io.words import count
from unflaw.station.detectors import Served
from unflaw.station.log import Log, legible, sha256

Mark = tuple[int, int]  # bytes and time of change, ns
_NAMED = 5  # maximum number of files named in one line
_VIDEOS = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".webm", ".wmv"})


@dataclass(frozen=True)
class _Inspected:
    """Outcome for an image, before it is filed."""

    digest: str
    verdict: str  # or "error"
    fault: str = ""  # reason why it could not be read
    before: str = ""  # time and detector of an earlier inspection


@dataclass
class _File:
    """State of a file at the last look."""

    mark: Mark
    since: float  # monotonic seconds; unchanged from then on
    done: bool = False
    inspected: _Inspected | None = None


class Watcher:
    """Inspect the images that arrive in a folder, and file them by verdict.

    Path and content identify an image in the log, and it is filed after it is logged. So neither a restart, a crash nor
    a second watcher leads to a second inspection.

    Args:
        folder: Folder where images arrive, also in subfolders.
        out: Folder for `good`, `defect`, `review` and `error`, with the same subfolders; may lie in `folder`.
        copy: Copy the images instead of moving them.
        category: Category of the images, for a detector with several.
        settle: Time in seconds for which size and time of a file must not change before it is read.
        patience: Time in seconds after which a file that cannot be read is filed as an error.
        sample: Share of images drawn at random for review, in [0, 1].
        max_pixels: As in `imaging.reading.read`.
        report: Called with each line of output: first what is watched, then images and skipped files, last the sums.

    Raises:
        DetectorError: As `BasePredictor.category`. ImageError: There is no such folder. ValueError: `out` is or holds
            the folder, or cannot be created.
    """

    def __init__(
        self,
        served: Served,
        log: Log,
        folder: Path,
        out: Path,
        *,
        copy: bool = False,
        category: str | None = None,
        settle: float = 2.0,
        patience: float = 60.0,
        sample: float = 0.0,
        max_pixels: int = 200_000_000,
        report: Callable[[str], object] = print,
    ) -> None:
        visible_files(folder)
        if folder.resolve().is_relative_to(out.resolve()):
            raise ValueError(
                f"--out {out} is or holds the watched folder, so nothing in it would be inspected; "
                "name a folder beside or within it"
            )
        self._category = served.detector.category(category)
        try:
            for name in ("good", "defect", "review", "error"):
                (out / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"--out {out}: cannot hold the sorted images ({error.filename}: {error.strerror}); "
                "name a folder that can be written"
            ) from error
        note_sorted(folder, out)
        self._served, self._log, self._report = served, log, report
        self._folder, self._out = folder.absolute(), out.absolute()
        self._resolved_out = out.resolve()
        self._copy, self._settle, self._patience = copy, settle, patience
        self._sample, self._max_pixels = sample, max_pixels
        self._files: dict[Path, _File] = {}
        self._faults: dict[Path, str] = {}  # reported faults of files, and of the folder
        self._counts: Counter[str] = Counter()  # images by verdict, "error", "before"; files "passed" over
        self._reported_folders: set[str] = set()  # skipped folders

    def run(self, stop: threading.Event, *, every: float = 1.0, once: bool = False) -> None:
        """Look at the folder every `every` seconds until `stop` is set, or, with `once`, until no image waits.

        Work in progress is finished.

        Raises:
            OSError: With `once`, the folder is away, or files cannot be filed or logged after `patience`.
        """
        category = f", category {self._category}" if self._category else ""
        self._report(
            f"{self._folder}: watched every {every:g} s{' until no image waits' * once}, with "
            f"{self._served.path}{category}; images are {'copied' if self._copy else 'moved'} to good, defect, review "
            f"and error in {self._out}"
        )
        try:
            while not stop.is_set():
                waiting = self.look(stop)
                if once and self._finished(waiting):
                    break
                stop.wait(every)
        finally:
            self._report_unread([path for path, file in self._files.items() if not (file.done or is_image(path))])
            self._report(self._summary())

    def _finished(self, waiting: int) -> bool:
        """Return True if no image waits; OSError if all that wait have faults for longer than `patience`."""
        if not waiting and self._folder in self._faults:
            raise OSError(f"{self._faults[self._folder]}; the same command goes on")
        latest = time.monotonic() - self._settle - self._patience
        faulty = [path for path, file in self._files.items() if not file.done and path in self._faults]
        stuck = [path for path in faulty if self._files[path].since <= latest]
        if waiting and len(stuck) == waiting:
            several = f"{count(waiting, 'image')} wait, this is the first, and they stay where they are"
            stay = several if waiting > 1 else "it stays where it is"
            raise OSError(f"{stuck[0]}: {self._faults[stuck[0]]}; {stay}: mend that, the same command goes on")
        return not waiting

    def look(self, stop: threading.Event | None = None) -> int:
        """Inspect and file the complete images; return the number of images that still wait."""
        files: dict[Path, _File] = {}
        unread, copied, waiting = list[Path](), list[Path](), 0
        for path, mark in self._marked():
            file, readable = self._files.get(path), is_image(path)
            # a file that is not read is reported once, however often it changes
            if file is None or (file.mark != mark and (readable or not file.done)):
                file = _File(mark, time.monotonic())
            files[path] = file
            stopped = stop is not None and stop.is_set()
            if not file.done and not stopped and time.monotonic() - file.since >= self._settle:
                if not readable:
                    unread.append(path)
                file.done = not readable or self._process(path, file, copied)
            waiting += readable and not file.done
        if self._folder in self._faults:  # keep the state of the files until the folder is back
            return 0
        self._files = files
        self._report_unread(unread)
        if copied:
            were = "was" if len(copied) == 1 else "were"
            self._report(f"{self._folder}: {self._list(copied)} {were} inspected before, with copies in {self._out}")
        self._faults = {path: fault for path, fault in self._faults.items() if path in files or path == self._folder}
        return waiting

    def _marked(self) -> Iterator[tuple[Path, Mark]]:
        """Yield the files of the folder, except those filed in it, with their marks. Report skipped folders once."""
        skipped: list[Entry] = []
        try:
            files = visible_files(self._folder, skipped)
            self._faults.pop(self._folder, None)
        except (ImageError, OSError) as error:  # a network share that is away for a while
            self._report_fault(self._folder, str(error))
            return
        new = counted(entry for entry in skipped if entry.path not in self._reported_folders)
        new = {place: number for place, number in new.items() if place not in self._reported_folders}
        self._reported_folders |= new.keys()
        for text in note(new):
            self._report(f"note: {text}")
        for path in files:
            if not path.resolve().is_relative_to(self._resolved_out):
                with suppress(FileNotFoundError):
                    yield path, _mark(path)

    def _process(self, path: Path, file: _File, copied: list[Path]) -> bool:
        """Inspect and file one image; return False if it must be looked at again.

        Args:
            copied: The image is appended if it was inspected and copied before, so that there is nothing to do.
        """
        try:
            data = path.read_bytes()
            if (own := is_drawn(data)) or _mark(path) != file.mark:
                return own  # panels of an earlier `unflaw predict` stay
            digest = sha256(data)
            if file.inspected is None or file.inspected.digest != digest:
                file.inspected = self._inspect(path, data, digest, file)
            if file.inspected is None:
                return False
            target, there = self._target(path, file.inspected)
            if _mark(path) != file.mark:  # a new image under the same name
                return False
            if not there:
                self._file(path, file.mark, data, target)
            if not self._copy:
                path.unlink(missing_ok=True)
            self._report_filed(path, file.inspected, target, there, copied)
            return True
        except (OSError, SQLAlchemyError) as error:
            if isinstance(error, FileNotFoundError) and not os.path.lexists(path):
                return True
            self._report_fault(path, str(getattr(error, "orig", None) or error))
            return False

    def _inspect(self, path: Path, data: bytes, digest: str, file: _File) -> _Inspected | None:
        """Inspect an image unless it is in the log; return None if it must be looked at again."""
        source = legible(str(path))
        if (logged := self._log.of_source(source, digest)) is not None:
            self._counts["before"] += 1
            before = f"{logged.time:%Y-%m-%d %H:%M} UTC by {logged.detector}"
            return _Inspected(digest, logged.verdict, before=before)
        name = path.relative_to(self._folder).as_posix()
        try:
            entry, _ = self._served.inspect(
                data,
                name=name,
                category=self._category,
                max_pixels=self._max_pixels,
                source=source,
                sample=self._sample,
            )
        except ImageError as error:
            if time.monotonic() - file.since < self._patience:  # it may still be being written
                return None
            self._counts["error"] += 1
            return _Inspected(digest, "error", fault=str(error).removeprefix(f"{name}: "))
        if self._log.add(entry, data) is None:  # another watcher was faster
            return None
        self._counts[entry.verdict] += 1
        self._report(f"{name}: {entry.verdict}, score {entry.score:.4g}, p {entry.p_value:.3g}")
        return _Inspected(digest, entry.verdict)

    def _target(self, path: Path, inspected: _Inspected) -> tuple[Path, bool]:
        """Return the path for an image, and True if its content is there already."""
        plain = self._out / inspected.verdict / path.relative_to(self._folder)
        plain.parent.mkdir(parents=True, exist_ok=True)
        longest = _longest_name(plain.parent)
        for added in ("", f"-{inspected.digest[:16]}", f"-{inspected.digest}"):
            stem, suffix = plain.stem, added + plain.suffix
            if not added and len(os.fsencode(plain.name)) > longest:
                continue
            while stem and len(os.fsencode(stem + suffix)) > longest:
                stem = stem[:-1]
            target = plain.with_name(stem + suffix)
            if not os.path.lexists(target):
                return target, False
            # a link may lead to the image itself
            if target.is_file() and not target.is_symlink() and sha256(target.read_bytes()) == inspected.digest:
                return target, True
        raise FileExistsError(errno.EEXIST, "all possible names are taken in the target folder; rename it", str(target))

    def _file(self, path: Path, mark: Mark, data: bytes, target: Path) -> None:
        """Move an image, or copy it where it cannot be renamed; repeating it has the same outcome."""
        # a link is not moved: a relative one would be broken in another folder
        if not (self._copy or path.is_symlink()):
            try:
                path.rename(target)
                return
            except OSError as error:
                if error.errno != errno.EXDEV:  # another file system
                    raise
        write_atomically(target, lambda file: file.write_bytes(data))
        os.utime(target, ns=(mark[1], mark[1]))

    def _report_filed(self, path: Path, inspected: _Inspected, target: Path, there: bool, copied: list[Path]) -> None:
        """Report the target of an image, unless it was inspected just now and keeps its name."""
        name = path.relative_to(self._folder).as_posix()
        where = f"{'copied' if self._copy else 'moved'} to {target}"
        if inspected.fault:
            self._report_fault(path, f"{inspected.fault}; {where}")
        elif inspected.before and there and self._copy:
            copied.append(path)
        elif inspected.before:
            where = f"removed here, since it is in {target} already" if there else where
            self._report(f"{name}: {inspected.verdict}, inspected before, {inspected.before}; {where}")
        elif target.name != path.name:
            self._report(f"{name}: {where}, since it cannot keep its name there")

    def _report_unread(self, paths: Sequence[Path]) -> None:
        """Report files that are not images of a supported kind, one line for each kind."""
        self._counts["passed"] += len(paths)
        for suffix, group in groupby(sorted(paths, key=_suffix), _suffix):
            found = list(group)
            stay = "is passed over and stays" if len(found) == 1 else "are passed over and stay"
            kind = f"{suffix} files" if suffix else "files without a suffix"
            what = "the frames to inspect" if suffix in _VIDEOS else "images"
            self._report(
                f"note: {self._folder}: {self._list(found)} {stay} there, since {kind} are not read; save {what} as "
                "PNG, JPEG, BMP, TIFF, WebP or GIF"
            )

    def _list(self, paths: Sequence[Path]) -> str:
        names = [path.relative_to(self._folder).as_posix() for path in paths]
        if len(names) > _NAMED:
            names[_NAMED:] = [count(len(names) - _NAMED, "other")]
        return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]

    def _summary(self) -> str:
        good, defect, review = (self._counts[verdict] for verdict in ("good", "defect", "review"))
        waiting = sum(is_image(path) and not file.done for path, file in self._files.items())
        parts = [
            f"{count(good + defect + review, 'image')} inspected ({good} good, {defect} defect, {review} for review)",
            f"{count(self._counts['before'], 'image')} inspected before",
            f"{count(self._counts['error'], 'file')} unreadable",
            f"{count(self._counts['passed'], 'file')} passed over",
            *([f"{count(waiting, 'image')} still waiting"] if waiting else []),
        ]
        return f"{self._folder}: {', '.join(parts)}"

    def _report_fault(self, path: Path, fault: str) -> None:
        if self._faults.get(path) != fault:
            self._faults[path] = fault
            self._report(f"note: {path}: {fault}")


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _longest_name(folder: Path) -> int:
    """Return the maximum length of a name in a folder, bytes."""
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, ValueError, OSError):  # Windows, and some network shares
        return 255


def _mark(path: Path) -> Mark:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
