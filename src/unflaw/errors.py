"""What can go wrong with detectors and files; messages say why and what to do. `images.ImageError` is of images."""

import errno
import os
import re
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DetectorError(ValueError):
    """A detector file that cannot be used, or a detector that is not fitted."""


class TrainingError(ValueError):
    """Data or settings that cannot give, calibrate or measure a detector."""


class WriteError(OSError):
    """A file that cannot be written; what stood there before is as it was.

    Args:
        path: The file.
        error: What the system, or a library that writes files, says.
        advice: What to do about it; None: what helps with most files.
    """

    def __init__(self, path: Path, error: Exception, advice: str | None = None) -> None:
        number = getattr(error, "errno", None)
        if number is None and (found := re.search(r"(?:os error|code:?) (\d+)", str(error))):
            number = int(found[1])  # libraries in Rust say it in words
        reason = os.strerror(number) if number else str(error)
        super().__init__(f"{path}: cannot be written ({reason}); {advice or remedy(number)}")
        self.errno, self.strerror, self._made = number, reason, (path, error, advice)

    def __str__(self) -> str:  # OSError would leave out the file
        return str(self.args[0])

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:  # for other processes
        return type(self), self._made


class InUseError(WriteError):
    """A file or folder that another run writes to. The message says which process that is."""


def remedy(number: int | None) -> str:
    """What to do about an error of a file system, by its number."""
    if number in FULL:
        return "make room there, or name another folder"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "change its permissions, or name another folder"
    return "check the path, or name another folder"


class ImageError(ValueError):
    """An image that cannot be used. The message names the file, what is wrong with it and what to do."""
