"""Atomic writing of files, locks between processes, and temporary files. No torch."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from secrets import token_hex
from typing import IO, TYPE_CHECKING, Any, TextIO

from safetensors import SafetensorError, safe_open

from unflaw.errors import DetectorError, InUseError, TrainingError, WriteError

if TYPE_CHECKING:
    from PIL.Image import Image

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # a system or a file system without locks
_UNKNOWN = "another process"


def write_atomically(
    path: Path, write: Callable[[Path], object], before: Callable[[Path], object] = lambda path: None
) -> None:
    """Write to a temporary name beside `path`, flush it to disk and rename it, so that `path` is never incomplete.

    A replaced file keeps its permissions. A symbolic link stays, and its target is replaced. A killed process leaves
    the hidden `.<name>.part`, which the next write removes. A pipe or a device is written directly.

    Args:
        path: File to write.
        write: Writes the temporary file.
        before: Called with `path` once that is complete, before it takes the name.

    Raises:
        WriteError: The file cannot be written; `path` is unchanged.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        write(path)
        return
    target = target_of(path)
    with _write_errors(path, target), _temporary_name(target) as temporary:
        mode = stat.S_IMODE(temporary.stat().st_mode)
        write(temporary)
        temporary.chmod(mode)  # some libraries replace the file that they write, with other permissions
        before(path)
        _rename(temporary, target)


def write_png(path: Path, image: Image, drawn: bool = False) -> None:
    """Write a Pillow image atomically; `drawn` marks it as drawn by unflaw, so that it is never taken for an input."""
    from PIL.PngImagePlugin import PngInfo

    metadata = PngInfo()
    if drawn:
        metadata.add_text("Software", "unflaw")
    write_atomically(path, lambda file: image.save(file, "PNG", pnginfo=metadata))


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically, and create missing folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write_text(text, "utf-8"))


@contextmanager
def growing(path: Path, amend: Iterable[Callable[[Path], object]] = ()) -> Iterator[TextIO]:
    """Open `<path>.part`, which can be read while it grows and is renamed to `path` at the end of the block.

    If the block fails, the lines stay under the first name and `path` is unchanged. Surrogates are written with
    backslashes. Without locks (see `holding`), each writer has its own temporary name and the last one wins.

    Args:
        path: Name of the complete file.
        amend: Functions that are called with the file before it is renamed.

    Raises:
        InUseError: Another process or thread writes the file.
        WriteError: The file cannot be written.
    """
    target = target_of(path)
    with _write_errors(path, target), holding(path) as held:
        partial = target.with_name(f"{target.name}.part" if held else f"{target.name}.{token_hex(4)}.part")
        partial.unlink(missing_ok=True)  # left by an earlier run, perhaps with other permissions
        with partial.open("x", encoding="utf-8", errors="backslashreplace") as file:
            _copy_permissions(partial, target)
            yield file
        for change in amend:
            change(partial)
        _rename(partial, target)


@contextmanager
def holding(path: Path, lock: Path | None = None) -> Iterator[bool]:
    """Lock a file or folder against other processes and threads.

    The system releases the lock when the process ends. The lock file is hidden, lies in the folder or beside the file,
    names the holder (except on Windows), and is removed at the end.

    Args:
        path: The file, which need not exist, or the folder.
        lock: Lock file to use instead; it is not removed.

    Yields:
        True if the lock is held; False on file systems without locks, such as some network shares.

    Raises:
        InUseError: Another process or thread holds the lock; the message names it.
        WriteError: The lock file cannot be written.
    """
    target = target_of(path)
    beside = target / ".unflaw.lock" if target.is_dir() else target.with_name(f".{_short_name(target.name)}.lock")
    used, held = lock or beside, True
    with ExitStack() as stack:
        try:
            stack.enter_context(_lock(used, lock is None))
        except BlockingIOError:
            advice = "wait until it has ended, or name another output"
            raise InUseError(path, OSError(f"in use by {_wait_for_holder(used)}"), advice) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise WriteError(path, error) from error
            held = False
        yield held


@contextmanager
def _lock(lock: Path, goes: bool) -> Iterator[None]:
    """Hold a lock file. Raises BlockingIOError if another holds it; OSError, see `_lock_file`."""
    if fcntl is None:
        from filelock import FileLock, Timeout

        other = FileLock(lock, timeout=0)
        try:
            other.acquire()
        except Timeout:
            raise BlockingIOError from None
        try:
            yield
        finally:
            other.release()
            if goes:
                with suppress(OSError):  # another process holds it already
                    lock.unlink()
        return
    handle = _lock_file(lock)
    try:
        with suppress(OSError):  # on a full disk the lock does not name its holder
            os.write(handle, json.dumps(claim()).encode())
        yield
    finally:
        if goes and _has_name(handle, lock):
            with suppress(OSError):
                lock.unlink()
        os.close(handle)


def target_of(path: Path) -> Path:
    """Resolve a symbolic link to the file that is written, which need not exist."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def make_folder(folder: Path) -> None:
    """Create a folder if it does not exist. Raises WriteError if it cannot be created or is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise WriteError(folder, error) from error


def scratch(size: int, advice: str) -> IO[bytes]:
    """Open an unnamed temporary file with space for `size` bytes; it disappears with its process.

    Raises WriteError, with `advice`, if the disk for temporary files has too little space.
    """
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    try:
        if hasattr(os, "posix_fallocate"):  # otherwise a full disk would kill a process that writes to a memory map
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            file.close()
            raise WriteError(Path(tempfile.gettempdir()), error, advice) from error
    return file


def _rename(temporary: Path, path: Path) -> None:
    """Flush a file to disk, rename it, and flush the renaming."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    _copy_permissions(temporary, path)
    temporary.replace(path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            with suppress(OSError):  # not supported by some network shares
                os.fsync(folder)
        finally:
            os.close(folder)


def _copy_permissions(temporary: Path, path: Path) -> None:
    """Copy permissions and, if allowed, group and owner of an existing file to the one that will replace it."""
    with suppress(FileNotFoundError):
        known, own = path.stat(), temporary.stat()
        if (own.st_uid, own.st_gid) != (known.st_uid, known.st_gid):
            for ids in ((-1, known.st_gid), (known.st_uid, -1)):
                with suppress(PermissionError):
                    os.chown(temporary, *ids)
        temporary.chmod(stat.S_IMODE(known.st_mode))


@contextmanager
def _temporary_name(path: Path) -> Iterator[Path]:
    """Create a temporary file with a fixed name, so that at most one can be left behind per file.

    If it is locked by another writer, or locks are not supported, the name is random.
    """
    temporary, handle = path.with_name(f".{_short_name(path.name)}.part"), None
    try:
        handle = _lock_file(temporary)
    except OSError:
        temporary = temporary.with_name(f"{temporary.name}.{token_hex(4)}")
        temporary.touch(exist_ok=False)
    try:
        _copy_permissions(temporary, path)
        yield temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        if handle is not None:
            os.close(handle)


def _lock_file(file: Path) -> int:
    """Create a file, or replace one that was left behind, and lock it until its handle is closed.

    Raises BlockingIOError if another process or thread holds the lock, and OSError if locks are not supported.
    """
    if fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    while True:
        try:
            handle, made = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            try:
                handle, made = _open_existing(file), False
            except FileNotFoundError:  # it has just been removed
                continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _has_name(handle, file):
                if made:
                    return handle
                file.unlink()  # left by a killed process, perhaps with other permissions
        except OSError as error:
            if made and error.errno in _NO_LOCKS:
                file.unlink(missing_ok=True)
            os.close(handle)
            raise
        os.close(handle)


def claim() -> dict[str, Any]:
    """Content of a lock file: number and host of this process, and the time."""
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    return {"process": os.getpid(), "host": platform.node(), "since": since}


def held_by(claimed: bytes) -> str:
    """Describe the holder of a lock from the content of its file, which may still be empty."""
    try:
        holder = json.loads(claimed)
        return f"process {holder['process']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return _UNKNOWN


def _wait_for_holder(lock: Path) -> str:
    for _ in range(20):
        with suppress(OSError):
            if (holder := held_by(lock.read_bytes())) != _UNKNOWN:
                return holder
        time.sleep(0.01)  # the file has just been created
    return _UNKNOWN


def _open_existing(file: Path) -> int:
    try:
        return os.open(file, os.O_RDWR | os.O_NOFOLLOW)
    except PermissionError:  # another user's file: not all network shares can lock it
        return os.open(file, os.O_RDONLY | os.O_NOFOLLOW)


def _has_name(handle: int, file: Path) -> bool:
    """Return True if an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _short_name(name: str) -> str:
    """Leave space for a suffix: names as long as file systems allow are replaced by a digest."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= 200 else hashlib.sha256(encoded).hexdigest()


@contextmanager
def _write_errors(path: Path, target: Path) -> Iterator[None]:
    """Turn errors in writing a file into a WriteError with the name that the user gave."""
    try:
        yield
    except WriteError:
        raise
    except (OSError, SafetensorError) as error:
        known = getattr(error, "filename", None)
        if known is not None and Path(known).parent.absolute() != target.parent.absolute():
            raise  # about another file that the block reads
        raise WriteError(path, error) from error


def check_name(path: Path) -> None:
    """Check the file name of a trained detector. Raises DetectorError if the suffix is not `.safetensors`."""
    if path.suffix != ".safetensors":
        raise DetectorError(f"{path}: a trained detector is a .safetensors file; name it {path.stem}.safetensors")


def steps_of(checkpoint: Path) -> tuple[int, str] | None:
    """Number of training steps in a checkpoint, as a number and for messages; None without a checkpoint.

    Raises TrainingError if the checkpoint is damaged.
    """
    if not checkpoint.is_file():
        return None
    try:
        with safe_open(checkpoint, "np") as file:
            metadata = file.metadata() or {}
        step = int(metadata["step"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise damaged_checkpoint(checkpoint, error) from error
    return step, f"step {step} of {metadata['steps']}" if "steps" in metadata else f"step {step}"


def damaged_checkpoint(path: Path, error: Exception) -> TrainingError:
    """Error for a checkpoint that cannot be read."""
    return TrainingError(f"{path}: the checkpoint is damaged ({error}); delete it and train again")
