"""Watching a folder: pictures are inspected as a camera drops them, once each, and filed by verdict."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from unflaw.files import write_atomically
from unflaw.images import SUFFIXES, ImageError, visible_files
from unflaw.station.detectors import Served
from unflaw.station.log import Log, legible, sha256

Mark = tuple[int, int]  # bytes and time of change, ns


@dataclass
class _Seen:
    """A file as it was last seen."""

    mark: Mark
    since: float  # monotonic seconds; unchanged from then on
    done: bool = False


class Watcher:
    """A folder that is looked at again and again.

    A picture is inspected once: the log knows it by path and content. It is filed after it is logged, and that is done
    again after a crash, to the same end. So neither a restart nor a second watcher inspects it twice.

    Args:
        folder: Where pictures arrive, also in folders within.
        out: Gets `good`, `defect`, `review` and `error`, with the folders within; may lie in `folder`, not hold it.
        copy: Leaves the pictures where they are.
        category: Of what they show, for a detector of several.
        settle: Seconds for which size and time of a file must not change before it is read.
        patience: Seconds after which a file that still cannot be read will not be finished any more: an error.
        sample: Share of pictures that are drawn at random for review.
        max_pixels: As for `images.read`.
        report: Is told what happens, a line each.

    Raises:
        DetectorError: As `Inspector.category`. ImageError: There is no such folder. ValueError: `out` is or holds
            the folder, or cannot be made.
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
                f"--out {out}: cannot hold the sorted pictures ({error.filename}: {error.strerror}); "
                "name a folder that can be written"
            ) from error
        self._served, self._log, self._report = served, log, report
        self._folder, self._out = folder.absolute(), out.absolute()
        self._filed = out.resolve()  # by whatever way it is named, what lies there has been inspected
        self._copy, self._settle, self._patience = copy, settle, patience
        self._sample, self._max_pixels = sample, max_pixels
        self._seen: dict[Path, _Seen] = {}
        self._faults: dict[Path, str] = {}

    def run(self, stop: threading.Event, *, every: float = 1.0, once: bool = False) -> None:
        """Looks until told to stop, or, with `once`, until no file is waited for. What has begun is finished.

        Raises:
            OSError: With `once`, where the folder is away, or files still cannot be filed or logged after `patience`.
        """
        while not stop.is_set():
            waiting = self.look(stop)
            if once and not waiting:
                if self._folder in self._faults:
                    raise OSError(f"{self._faults[self._folder]}; the same command goes on")
                return
            faulty = (path for path, seen in self._seen.items() if not seen.done and path in self._faults)
            stuck = [path for path in faulty if self._age(path) >= self._patience]
            if once and len(stuck) == waiting:
                raise OSError(
                    f"{stuck[0]}: {self._faults[stuck[0]]}; of {waiting} pictures that wait this is the first, and "
                    "they stay where they are: mend that, the same command goes on"
                )
            stop.wait(every)

    def _age(self, path: Path) -> float:
        """Seconds that a file has been waited for since it is complete."""
        return time.monotonic() - self._seen[path].since - self._settle

    def look(self, stop: threading.Event | None = None) -> int:
        """Inspects and files what is complete; returns how many files are still waited for."""
        seen, waiting = {}, 0
        for path, mark in self._marked():
            known = self._seen.get(path)
            if known is None or known.mark != mark:
                known = _Seen(mark, time.monotonic())
            seen[path] = known
            stopped = stop is not None and stop.is_set()
            if not known.done and not stopped and time.monotonic() - known.since >= self._settle:
                known.done = self._take(path, known)
            waiting += not known.done
        self._seen = seen
        self._faults = {path: fault for path, fault in self._faults.items() if path in seen or path == self._folder}
        return waiting

    def _marked(self) -> Iterator[tuple[Path, Mark]]:
        try:
            files = visible_files(self._folder)
            self._faults.pop(self._folder, None)
        except (ImageError, OSError) as error:  # a share that is away for a while
            self._complain(self._folder, str(error))
            return
        for path in files:
            if path.suffix.lower() in SUFFIXES and not path.resolve().is_relative_to(self._filed):
                try:
                    yield path, _mark(path)
                except FileNotFoundError:
                    continue

    def _take(self, path: Path, known: _Seen) -> bool:
        """Inspects and files one picture; False if it must be looked at again."""
        try:
            data = path.read_bytes()
            if _mark(path) != known.mark or (verdict := self._verdict(path, data, known)) is None:
                return False
            return self._file(path, known.mark, data, verdict)
        except FileNotFoundError:
            return True
        except (OSError, SQLAlchemyError) as error:
            self._complain(path, str(getattr(error, "orig", None) or error))
            return False

    def _verdict(self, path: Path, data: bytes, known: _Seen) -> str | None:
        source, digest = legible(str(path)), sha256(data)
        if (logged := self._log.of_source(source, digest)) is not None:
            return logged.verdict
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
            if time.monotonic() - known.since < self._patience:  # perhaps it is still being written
                return None
            self._complain(path, str(error))
            return "error"
        if self._log.add(entry, data) is None:  # another watcher was faster
            return None
        self._report(f"{name}: {entry.verdict}, score {entry.score:.4g}, p {entry.p_value:.3g}")
        return entry.verdict

    def _file(self, path: Path, mark: Mark, data: bytes, verdict: str) -> bool:
        """Moves or copies a picture; done once or twice, the outcome is the same."""
        target, digest = self._out / verdict / path.relative_to(self._folder), sha256(data)
        if target.exists() and sha256(target.read_bytes()) != digest:  # another picture of this name came before
            target = target.with_name(f"{target.stem}-{digest[:16]}{target.suffix}")
        there = target.exists()
        target.parent.mkdir(parents=True, exist_ok=True)
        if _mark(path) != mark:  # a new picture under the old name: its turn comes
            return False
        if not there and (self._copy or not _renamed(path, target)):
            write_atomically(target, lambda file: file.write_bytes(data))
            os.utime(target, ns=(mark[1], mark[1]))
        if not self._copy:
            path.unlink(missing_ok=True)
        return True

    def _complain(self, path: Path, fault: str) -> None:
        if self._faults.get(path) != fault:
            self._faults[path] = fault
            self._report(f"note: {path}: {fault}")


def _mark(path: Path) -> Mark:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _renamed(path: Path, target: Path) -> bool:
    """Moves within one file system; False where they lie in two."""
    try:
        path.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return False
    return True
