"""The folder that a run writes to, on a disk or in an object store, by the URLs of fsspec."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from unflaw.errors import InUseError
from unflaw.io.files import claim, held_by, holding, write_atomically

OWN = "_unflaw"  # a folder in the output that readers of Parquet pass over: its name begins with an underscore
BEAT = 20.0  # seconds between signs of life in an object store
# What is put there is seen whole or not at all; elsewhere whole files come by a rename.
_PUT_WHOLE = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "memory"}


class StoreError(ValueError):
    """A folder or a URL that cannot be used. The message names it and what to do."""


def opened(url: str) -> tuple[Any, str]:
    """The file system of fsspec that a path or URL belongs to, and the path in it.

    Raises:
        ImportError: fsspec, or what it needs for this kind of URL, is not installed. StoreError: No such kind.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise ImportError("partitions need fsspec and pyarrow; install them with: pip install 'unflaw[ray]'") from error
    try:
        fs, path = url_to_fs(url)
    except ImportError as error:
        raise ImportError(f"{url}: {error}; unflaw[ray] brings what all kinds share, not what one of them needs") from (
            error
        )
    except ValueError as error:
        raise StoreError(f"{url}: is not a URL that fsspec knows ({error}); give a folder or s3://bucket/folder") from (
            error
        )
    return fs, path


def is_local(fs: Any) -> bool:
    return "file" in _protocols(fs)


def _protocols(fs: Any) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


class Store:
    """A folder of small whole files.

    Args:
        url: A local folder, or a URL such as s3://bucket/folder. It need not exist.

    Raises:
        ImportError, StoreError: As `opened`.
    """

    def __init__(self, url: str) -> None:
        self.fs, path = opened(url)
        self.url, self.root, self.local = url, path.rstrip("/"), is_local(self.fs)
        if self.local and Path(self.root).exists() and not Path(self.root).is_dir():
            raise StoreError(f"{url}: is a file; --output names a folder or a URL")

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.root if self.local else self.url,)  # another process may stand in another folder

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def names(self, folder: str = "") -> set[str]:
        """Of the files in it, or in a folder of it; none where it does not exist."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.path(folder).rstrip("/"), detail=True)
        except FileNotFoundError:
            return set()
        return {entry["name"].rstrip("/").rpartition("/")[2] for entry in found if entry["type"] == "file"}

    def read(self, name: str) -> bytes:
        """Raises: FileNotFoundError."""
        return self.fs.cat_file(self.path(name))

    def write(self, name: str, data: bytes) -> None:
        """Puts a file there in one step: no reader, and no crash, ever sees a part of it."""
        path = self.path(name)
        if self.local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(Path(path), lambda file: file.write_bytes(data))
        elif _protocols(self.fs) & _PUT_WHOLE:
            if "memory" in _protocols(self.fs):
                self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.fs.pipe_file(path, data)
        else:
            folder, _, last = path.rpartition("/")
            self.fs.makedirs(folder, exist_ok=True)
            temporary = f"{folder}/.{last}.{uuid4().hex[:8]}"
            self.fs.pipe_file(temporary, data)
            self.fs.mv(temporary, path)

    def remove(self, name: str) -> None:
        """A file, if it is there."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

    def sweep(self) -> None:
        """Removes what killed writers have left: hidden files beside those that they were to become."""
        for folder in ("", f"{OWN}/"):
            for name in self.names(folder):
                if name.startswith(".") and ("parquet" in name or "json" in name):
                    self.remove(folder + name)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One run at a time. A run that was killed leaves nothing that would stop the next.

        On a disk the operating system keeps the lock and drops it with the process. In an object store it is a file
        that its owner rewrites; where one is found, it is watched for three of these beats, whatever clocks say. Two
        that begin in the same moment may both go on there: they write the same files, and only waste work.

        Raises:
            StoreError: Another run has it, and which; or the folder cannot be written.
        """
        if self.local:
            with ExitStack() as held:
                try:
                    Path(self.path(OWN)).mkdir(parents=True, exist_ok=True)
                    held.enter_context(holding(Path(self.root), Path(self.path(f"{OWN}/lock"))))
                except InUseError as error:
                    raise self._busy(str(error.strerror)) from None
                except OSError as error:
                    raise StoreError(f"{self.url}: cannot be written ({error}); name another --output") from error
                yield
            return
        name, me, done = f"{OWN}/lock.json", claim() | {"run": uuid4().hex}, threading.Event()
        seen = self._lock(name)
        if seen is not None:
            for _ in range(6):
                time.sleep(BEAT / 2)
                if (now := self._lock(name)) not in (seen, None):
                    raise self._busy(f"in use by {held_by(now)}")
                if now is None:  # it has ended
                    break

        def live() -> None:
            beat = 0
            while not done.wait(BEAT):
                beat += 1
                with suppress(Exception):  # a beat that is lost is made up for by the next
                    self.write(name, json.dumps(me | {"beat": beat}).encode())

        self.write(name, json.dumps(me | {"beat": 0}).encode())
        thread = threading.Thread(target=live, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.remove(name)

    def _busy(self, by: str) -> StoreError:
        return StoreError(
            f"{self.url}: another run writes there ({by}); wait until it has ended, or name another --output"
        )

    def _lock(self, name: str) -> bytes | None:
        self.fs.invalidate_cache()
        try:
            return self.read(name)
        except FileNotFoundError:
            return None
