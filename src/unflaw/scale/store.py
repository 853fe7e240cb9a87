"""Output folder of a run, on a disk or in an object store, addressed by fsspec URLs."""

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

OWN = "_unflaw"  # subfolder that Parquet readers skip, because its name begins with an underscore
BEAT = 20.0  # seconds between two heartbeats of a lock in an object store
# Protocols whose uploads appear as a whole or not at all; on others, files are uploaded and then renamed.
_ATOMIC_UPLOAD = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "memory"}


class StoreError(ValueError):
    """A folder or URL that cannot be used. The message names it and says what to do."""


def open_filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a path or URL, and the path in it.

    Raises:
        ImportError: The package that fsspec needs for this protocol is not installed. StoreError: Unknown protocol.
    """
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except ImportError as error:
        text = f"{url}: {error}; unflaw[ray] brings what all protocols share, not what one of them needs"
        raise ImportError(text) from error
    except ValueError as error:
        text = f"{url}: is not a URL that fsspec knows ({error}); give a folder or s3://bucket/folder"
        raise StoreError(text) from error


def is_local(fs: Any) -> bool:
    return "file" in _protocols(fs)


def _protocols(fs: Any) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


class Store:
    """A folder of small files, each written as a whole.

    Args:
        url: A local folder, or a URL such as s3://bucket/folder. It need not exist.

    Raises:
        ImportError, StoreError: See `open_filesystem`.
    """

    def __init__(self, url: str) -> None:
        self.fs, path = open_filesystem(url)
        self.url, self.root, self.local = url, path.rstrip("/"), is_local(self.fs)
        if self.local and Path(self.root).exists() and not Path(self.root).is_dir():
            raise StoreError(f"{url}: is a file; --output names a folder or a URL")

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.root if self.local else self.url,)  # workers may have another current folder

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def names(self, folder: str = "") -> set[str]:
        """Names of the files in the store or in a folder of it; empty if the folder does not exist."""
        self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(self.path(folder).rstrip("/"), detail=True)
        except FileNotFoundError:
            return set()
        return {entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "file"}

    def read(self, name: str) -> bytes:
        """Raises: FileNotFoundError."""
        return self.fs.cat_file(self.path(name))

    def write(self, name: str, data: bytes) -> None:
        """Write or replace a file in one step: neither a reader nor a crash ever sees a part of it."""
        path = self.path(name)
        if self.local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(Path(path), lambda file: file.write_bytes(data))
        elif _protocols(self.fs) & _ATOMIC_UPLOAD:
            self.fs.pipe_file(path, data)
        else:
            folder, _, last = path.rpartition("/")
            self.fs.makedirs(folder, exist_ok=True)
            temporary = f"{folder}/.{last}.{uuid4().hex[:8]}"
            self.fs.pipe_file(temporary, data)
            self.fs.mv(temporary, path)

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

    def sweep(self) -> None:
        """Remove temporary files that killed writers have left."""
        for folder in ("", f"{OWN}/"):
            for name in self.names(folder):
                if name.startswith(".") and ("parquet" in name or "json" in name):
                    self.remove(folder + name)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the store for one run. A killed run does not block the next one.

        On a disk, the operating system releases the lock with the process. In an object store, the lock is a file that
        its owner rewrites every `BEAT` seconds. A lock file that does not change for three beats is taken over; the
        clocks of machines are not compared. Two runs that begin there at the same moment may both go on: they write
        the same files and only waste work.

        Raises:
            StoreError: Another run holds the lock, or the folder cannot be written.
        """
        with ExitStack() as stack:
            if self.local:
                try:
                    Path(self.path(OWN)).mkdir(parents=True, exist_ok=True)
                    stack.enter_context(holding(Path(self.root), Path(self.path(f"{OWN}/lock"))))
                except InUseError as error:
                    raise self._in_use(str(error.strerror)) from None
                except OSError as error:
                    raise StoreError(f"{self.url}: cannot be written ({error}); name another --output") from error
            else:
                stack.enter_context(self._heartbeat())
            yield

    @contextmanager
    def _heartbeat(self) -> Iterator[None]:
        name, owner, ended = f"{OWN}/lock.json", claim(), threading.Event()
        before = self._read_lock(name)
        for _ in range(0 if before is None else 6):
            time.sleep(BEAT / 2)
            now = self._read_lock(name)
            if now is None:
                break
            if now != before:
                raise self._in_use(f"in use by {held_by(now)}")

        def beat() -> None:
            self.write(name, json.dumps(owner | {"beat": uuid4().hex}).encode())

        def keep_beating() -> None:
            while not ended.wait(BEAT):
                with suppress(Exception):  # the next beat makes up for a lost one
                    beat()

        beat()
        thread = threading.Thread(target=keep_beating, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.remove(name)

    def _read_lock(self, name: str) -> bytes | None:
        self.fs.invalidate_cache()
        try:
            return self.read(name)
        except FileNotFoundError:
            return None

    def _in_use(self, by: str) -> StoreError:
        advice = "wait until it has ended, or name another --output"
        return StoreError(f"{self.url}: another run writes there ({by}); {advice}")
