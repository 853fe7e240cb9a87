"""Errors of detectors, files and images. Messages name the cause and the remedy."""

import errno
import os
import re
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DetectorError(ValueError):
    """A detector file cannot be used, or a detector is not fitted."""


class TrainingError(ValueError):
    """Data or settings do not allow to train, calibrate or evaluate a detector."""


class WriteError(OSError):
    """A file cannot be written; an older file at the path is unchanged.

    Args:
        path: The file.
        error: Error of the system, or of a library that writes files.
        advice: Remedy; None: the general one of `remedy`.
    """

    def __init__(self, path: Path, error: Exception, advice: str | None = None) -> None:
        number = getattr(error, "errno", None)
        if number is None and (found := re.search(r"(?:os error|code:?) (\d+)", str(error))):
            number = int(found[1])  # errors of libraries in Rust have no errno
        reason = os.strerror(number) if number else str(error)
        super().__init__(f"{path}: cannot be written ({reason}); {advice or remedy(number)}")
        self.errno, self.strerror, self._made = number, reason, (path, error, advice)

    def __str__(self) -> str:  # that of OSError leaves out the file
        return str(self.args[0])

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:  # for other processes
        return type(self), self._made


class InUseError(WriteError):
    """Another run writes to a file or folder. The message names its process."""


def remedy(number: int | None) -> str:
    """Remedy for an error of a file system, by its number."""
    if number in FULL:
        return "make room there, or name another folder"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "change its permissions, or name another folder"
    return "check the path, or name another folder"


class ImageError(ValueError):
    """An image cannot be used. The message names the file, the fault and the remedy."""
