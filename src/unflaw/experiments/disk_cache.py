"""A folder of large files that can be made again, kept below a size by deleting those not used for longest."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

ABANDONED = 3600  # seconds after which a temporary file that nobody writes to is of a process that was killed


class DiskCacheFull(Exception):
    """There is no room for a file of this size, whatever is deleted."""


class DiskCache:
    """The folder; processes that share it keep to the limit together, if all have the same.

    Args:
        folder: Made where there is none. Nothing else may lie in it.
        limit: Bytes; None: as many as there are.
    """

    def __init__(self, folder: Path, limit: float | None = None) -> None:
        self.folder, self.limit = folder, limit

    def reserve(self, temporary: Path, size: int) -> None:
        """Makes a temporary file in the folder as large as it will be, and deletes what is oldest to have the room.

        What another process has open it can still read on POSIX systems; where not, it is not deleted.

        Raises:
            DiskCacheFull: It would not fit.
        """
        if self.limit is None:
            return
        if size > self.limit:
            raise DiskCacheFull(f"{self.folder}: {size / 1e9:.2f} GB do not fit in {self.limit / 1e9:.2f} GB")
        from filelock import FileLock

        lock = self.folder / ".lock"
        with FileLock(lock):
            found = []
            for path in self.folder.iterdir():
                with suppress(FileNotFoundError):  # renamed meanwhile, which takes no lock
                    found += [(path, path.stat())] if path not in (temporary, lock) else []
            room = self.limit - sum(stat.st_size for _, stat in found) - size
            now = time.time()
            for path, stat in sorted(found, key=lambda each: each[1].st_mtime):
                if room >= 0:
                    break
                if path.name.startswith(".") and now - stat.st_mtime < ABANDONED:
                    continue  # is being written
                try:
                    path.unlink(missing_ok=True)
                except PermissionError:
                    continue
                room += stat.st_size
            if room < 0:
                raise DiskCacheFull(
                    f"{self.folder}: others are writing to it, and there is no room for {size / 1e9:.2f} GB"
                )
            os.truncate(temporary, size)
