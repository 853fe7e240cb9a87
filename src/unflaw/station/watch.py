"""Watching a folder: images are inspected as a camera drops them, once each, and filed by verdict."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
_NAMED = 5  # files that a line of several names; the others are counted
_VIDEOS = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".webm", ".wmv"})


@dataclass(frozen=True)
class _Found:
    """What is known of an image before it is filed."""

    digest: str
    verdict: str  # or "error"
    fault: str = ""  # why it could not be read
    before: str = ""  # when and by which detector, if it was inspected before


@dataclass
class _Seen:
    """A file as it was last seen."""

    mark: Mark
    since: float  # monotonic seconds; unchanged from then on
    done: bool = False
    found: _Found | None = None


class Watcher:
    """A folder that is looked at again and again.

    An image is inspected once: the log knows it by path and content. It is filed after it is logged, and that is done
    again after a crash, to the same end. So neither a restart nor a second watcher inspects it twice.

    Args:
        folder: Where images arrive, also in folders within.
        out: Gets `good`, `defect`, `review` and `error`, with the folders within; may lie in `folder`, not hold it.
        copy: Leaves the images where they are.
        category: Of what they show, for a detector of several.
        settle: Seconds for which size and time of a file must not change before it is read.
        patience: Seconds after which a file that still cannot be read will not be finished any more: an error.
        sample: Share of images that are drawn at random for review.
        max_pixels: As for `images.read`.
        report: Gets a line for what is watched, for each image and each file passed over, and for the sum of it.

    Raises:
        DetectorError: As `BasePredictor.category`. ImageError: There is no such folder. ValueError: `out` is or holds
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
                f"--out {out}: cannot hold the sorted images ({error.filename}: {error.strerror}); "
                "name a folder that can be written"
            ) from error
        note_sorted(folder, out)
        self._served, self._log, self._report = served, log, report
        self._folder, self._out = folder.absolute(), out.absolute()
        self._filed = out.resolve()  # by whatever way it is named, what lies there has been inspected
        self._copy, self._settle, self._patience = copy, settle, patience
        self._sample, self._max_pixels = sample, max_pixels
        self._seen: dict[Path, _Seen] = {}
        self._faults: dict[Path, str] = {}
        self._counts: Counter[str] = Counter()  # images by verdict, "error", "before"; files "passed" over
        self._passed_over: set[str] = set()  # folders of which that was said

    def run(self, stop: threading.Event, *, every: float = 1.0, once: bool = False) -> None:
        """Looks until told to stop, or, with `once`, until no image is waited for. What has begun is finished.

        It reports first what is watched, and last what was done.

        Raises:
            OSError: With `once`, where the folder is away, or files still cannot be filed or logged after `patience`.
        """
        category = f", category {self._category}" if self._category else ""
        self._report(
            f"{self._folder}: watched every {every:g} s{' until no image is waited for' * once}, with "
            f"{self._served.path}{category}; images are {'copied' if self._copy else 'moved'} to good, defect, review "
            f"and error in {self._out}"
        )
        try:
            self._run(stop, every, once)
        finally:
            self._pass_over([path for path, seen in self._seen.items() if not (seen.done or is_image(path))])
            self._report(self._summary())

    def _run(self, stop: threading.Event, every: float, once: bool) -> None:
        while not stop.is_set():
            waiting = self.look(stop)
            if once and not waiting:
                if self._folder in self._faults:
                    raise OSError(f"{self._faults[self._folder]}; the same command goes on")
                return
            faulty = (path for path, seen in self._seen.items() if not seen.done and path in self._faults)
            stuck = [path for path in faulty if self._age(path) >= self._patience]
            if once and len(stuck) == waiting:
                several = f"{count(waiting, 'image')} wait, this one first, and they stay where they are"
                stay = several if waiting > 1 else "it stays where it is"
                raise OSError(f"{stuck[0]}: {self._faults[stuck[0]]}; {stay}: mend that, the same command goes on")
            stop.wait(every)

    def _age(self, path: Path) -> float:
        """Seconds that a file has been waited for since it is complete."""
        return time.monotonic() - self._seen[path].since - self._settle

    def look(self, stop: threading.Event | None = None) -> int:
        """Inspects and files what is complete; returns how many images are still waited for."""
        seen: dict[Path, _Seen] = {}
        passed, copied, waiting = list[Path](), list[Path](), 0
        for path, mark in self._marked():
            known, readable = self._seen.get(path), is_image(path)
            # a file that is passed over is named once, however often it changes
            if known is None or (known.mark != mark and (readable or not known.done)):
                known = _Seen(mark, time.monotonic())
            seen[path] = known
            stopped = stop is not None and stop.is_set()
            if not known.done and not stopped and time.monotonic() - known.since >= self._settle:
                if not readable:
                    passed.append(path)
                known.done = not readable or self._take(path, known, copied)
            waiting += readable and not known.done
        if self._folder in self._faults:  # what was seen in it is remembered until it is back
            return 0
        self._seen = seen
        self._pass_over(passed)
        if copied:
            were = "was" if len(copied) == 1 else "were"
            self._report(f"{self._folder}: {self._named(copied)} {were} inspected before, with copies in {self._out}")
        self._faults = {path: fault for path, fault in self._faults.items() if path in seen or path == self._folder}
        return waiting

    def _marked(self) -> Iterator[tuple[Path, Mark]]:
        try:
            passed_over: list[Entry] = []
            files = visible_files(self._folder, passed_over)
            self._faults.pop(self._folder, None)
        except (ImageError, OSError) as error:  # a share that is away for a while
            self._complain(self._folder, str(error))
            return
        self._say_passed_over(passed_over)
        for path in files:
            if not path.resolve().is_relative_to(self._filed):
                try:
                    yield path, _mark(path)
                except FileNotFoundError:
                    continue

    def _say_passed_over(self, passed_over: list[Entry]) -> None:
        """Once for each folder, which is not looked into again."""
        numbers = counted(entry for entry in passed_over if entry.path not in self._passed_over)
        new = {place: number for place, number in numbers.items() if place not in self._passed_over}
        self._passed_over |= new.keys()
        for text in note(new):
            self._report(f"note: {text}")

    def _take(self, path: Path, known: _Seen, copied: list[Path]) -> bool:
        """Inspects and files one image; False if it must be looked at again.

        Args:
            copied: Gets the image if it was inspected and copied before, so that nothing is done.
        """
        try:
            data = path.read_bytes()
            if (own := is_drawn(data)) or _mark(path) != known.mark:
                return own  # what an earlier `unflaw predict` has left here stays
            digest = sha256(data)
            if known.found is None or known.found.digest != digest:  # else only filing is left to do
                known.found = self._find(path, data, digest, known)
            if known.found is None:
                return False
            target, there = self._target(path, known.found)
            if not self._file(path, known.mark, data, None if there else target):
                return False
            self._tell(path, known.found, target, there, copied)
            return True
        except (OSError, SQLAlchemyError) as error:
            if isinstance(error, FileNotFoundError) and not os.path.lexists(path):
                return True
            self._complain(path, str(getattr(error, "orig", None) or error))
            return False

    def _find(self, path: Path, data: bytes, digest: str, known: _Seen) -> _Found | None:
        """Inspects an image unless the log knows it; None if it must be looked at again."""
        source = legible(str(path))
        if (logged := self._log.of_source(source, digest)) is not None:
            self._counts["before"] += 1
            return _Found(digest, logged.verdict, before=f"{logged.time:%Y-%m-%d %H:%M} UTC by {logged.detector}")
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
            self._counts["error"] += 1
            return _Found(digest, "error", fault=str(error).removeprefix(f"{name}: "))
        if self._log.add(entry, data) is None:  # another watcher was faster
            return None
        self._counts[entry.verdict] += 1
        self._report(f"{name}: {entry.verdict}, score {entry.score:.4g}, p {entry.p_value:.3g}")
        return _Found(digest, entry.verdict)

    def _target(self, path: Path, found: _Found) -> tuple[Path, bool]:
        """Where an image is filed, and whether its content is there already."""
        plain = self._out / found.verdict / path.relative_to(self._folder)
        plain.parent.mkdir(parents=True, exist_ok=True)
        longest = _longest_name(plain.parent)
        for added in ("", f"-{found.digest[:16]}", f"-{found.digest}"):
            stem, suffix = plain.stem, added + plain.suffix
            if not added and len(os.fsencode(plain.name)) > longest:
                continue
            while stem and len(os.fsencode(stem + suffix)) > longest:
                stem = stem[:-1]
            target = plain.with_name(stem + suffix)
            if not os.path.lexists(target):
                return target, False
            # a link there may lead to the image itself
            if target.is_file() and not target.is_symlink() and sha256(target.read_bytes()) == found.digest:
                return target, True
        raise FileExistsError(errno.EEXIST, "the names that it could have there are taken; rename it", str(target))

    def _file(self, path: Path, mark: Mark, data: bytes, target: Path | None) -> bool:
        """Moves or copies an image; done once or twice, the outcome is the same. None: it is there already."""
        if _mark(path) != mark:  # a new image under the old name: its turn comes
            return False
        # a link may be relative, so that it would lead nowhere from another folder
        if target is not None and (self._copy or path.is_symlink() or not _renamed(path, target)):
            write_atomically(target, lambda file: file.write_bytes(data))
            os.utime(target, ns=(mark[1], mark[1]))
        if not self._copy:
            path.unlink(missing_ok=True)
        return True

    def _tell(self, path: Path, found: _Found, target: Path, there: bool, copied: list[Path]) -> None:
        """Reports where an image went, but for one that has just been inspected and keeps its name."""
        name = path.relative_to(self._folder).as_posix()
        where = f"{'copied' if self._copy else 'moved'} to {target}"
        if found.fault:
            self._complain(path, f"{found.fault}; {where}")
        elif found.before and there and self._copy:
            copied.append(path)
        elif found.before:
            where = f"removed here, since it is in {target} already" if there else where
            self._report(f"{name}: {found.verdict}, inspected before, {found.before}; {where}")
        elif target.name != path.name:
            self._report(f"{name}: {where}, since it cannot keep its name there")

    def _pass_over(self, paths: Sequence[Path]) -> None:
        """Names files that are not images of a kind that is read, a line for each kind."""
        self._counts["passed"] += len(paths)
        for suffix, group in groupby(sorted(paths, key=_suffix), _suffix):
            found = list(group)
            stay = "is passed over and stays" if len(found) == 1 else "are passed over and stay"
            kind = f"{suffix} files" if suffix else "files without a suffix"
            what = "the frames to inspect" if suffix in _VIDEOS else "images"
            self._report(
                f"note: {self._folder}: {self._named(found)} {stay} there, since {kind} are not read; save {what} as "
                "PNG, JPEG, BMP, TIFF, WebP or GIF"
            )

    def _named(self, paths: Sequence[Path]) -> str:
        names = [path.relative_to(self._folder).as_posix() for path in paths]
        if len(names) > _NAMED:
            names[_NAMED:] = [count(len(names) - _NAMED, "other")]
        return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]

    def _summary(self) -> str:
        good, defect, review = (self._counts[verdict] for verdict in ("good", "defect", "review"))
        waiting = sum(is_image(path) and not seen.done for path, seen in self._seen.items())
        parts = [
            f"{count(good + defect + review, 'image')} inspected ({good} good, {defect} defect, {review} for review)",
            f"{count(self._counts['before'], 'image')} inspected before",
            f"{count(self._counts['error'], 'file')} unreadable",
            f"{count(self._counts['passed'], 'file')} passed over",
            *([f"{count(waiting, 'image')} still waiting"] if waiting else []),
        ]
        return f"{self._folder}: {', '.join(parts)}"

    def _complain(self, path: Path, fault: str) -> None:
        if self._faults.get(path) != fault:
            self._faults[path] = fault
            self._report(f"note: {path}: {fault}")


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _longest_name(folder: Path) -> int:
    """Bytes that a name in a folder may have."""
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, ValueError, OSError):  # Windows, and some network shares
        return 255


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
