"""Files that are whole or not there, and what a detector file says of itself. No torch."""

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

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # a system or a disk that knows none
_SOMEBODY = "another process"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes to a temporary name beside `path`, flushes it to disk and renames: no half file ever stands in `path`.

    A file that is replaced keeps its rights; a new one has those that the umask leaves. Where `path` is a symbolic
    link, it stays one, and the file that it points to is replaced. What a killed process leaves, `.<name>.part`, is
    hidden and goes with the next writing of the same name. A pipe or a device, such as /dev/stdout, is written as it
    is.

    Raises:
        WriteError: It cannot be written, and what stood in `path` is as it was.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        write(path)
        return
    target = target_of(path)
    with _telling(path, target), _beside(target) as temporary:
        mode = stat.S_IMODE(temporary.stat().st_mode)
        write(temporary)
        temporary.chmod(mode)  # some libraries replace the file that they were told to write by one of other rights
        _rename(temporary, target)


def write_png(path: Path, image: Image, drawn: bool = False) -> None:
    """Writes an image of Pillow, whole or not at all.

    Args:
        path: Of the file.
        image: The image.
        drawn: It shows what unflaw makes of other images: the file says so, and `outputs` knows that it is no input.
    """
    from PIL.PngImagePlugin import PngInfo

    said = PngInfo()
    if drawn:
        said.add_text("Software", "unflaw")
    write_atomically(path, lambda file: image.save(file, "PNG", pnginfo=said))


@contextmanager
def growing(path: Path, amend: Iterable[Callable[[Path], object]] = ()) -> Iterator[TextIO]:
    """Lines that can be read as they come, in `<path>.part`, which takes its name, on disk, at the end of the block.

    Where that is not reached, what was written stays under the first name, and what stood in `path` is as it was.
    Rights and links are as for `write_atomically`. Names of files that are no UTF-8 are written with backslashes. One
    at a time writes a file; where `holding` knows no locks, the first name is another one for each, and the last to end
    wins.

    Args:
        path: Of the file when it is whole.
        amend: Are called with the whole file before it takes its name.

    Raises:
        InUseError: Another process or thread writes it. WriteError: It cannot be written.
    """
    target = target_of(path)
    with _telling(path, target), holding(path) as held:
        partial = target.with_name(f"{target.name}.part" if held else f"{target.name}.{token_hex(4)}.part")
        partial.unlink(missing_ok=True)  # of an earlier time, perhaps with other rights
        with partial.open("x", encoding="utf-8", errors="backslashreplace") as file:
            _take_rights(partial, target)
            yield file
        for change in amend:
            change(partial)
        _rename(partial, target)


@contextmanager
def holding(path: Path, lock: Path | None = None) -> Iterator[bool]:
    """Keeps all others, processes and threads, from holding a file or folder meanwhile; they are told who has it.

    The operating system keeps the lock and drops it with the process, however that ends. Its file is hidden, lies in
    the folder or beside the file, says who holds it (but on Windows), and goes at the end.

    Args:
        path: Of the file, there or not, or of the folder.
        lock: A file to use for that, which stays.

    Yields:
        Whether it is held. Some network shares know no such locks: there nobody is kept out.

    Raises:
        InUseError: Another has it. WriteError: The lock's file cannot be written.
    """
    target = target_of(path)
    beside = target / ".unflaw.lock" if target.is_dir() else target.with_name(f".{_short(target.name)}.lock")
    used = lock or beside
    with ExitStack() as stack:
        try:
            stack.enter_context(_held(used, lock is None))
            held = True
        except BlockingIOError:
            advice = "wait until it has ended, or name another output"
            raise InUseError(path, OSError(f"in use by {_holder(used)}"), advice) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise WriteError(path, error) from error
            held = False
        yield held


@contextmanager
def _held(lock: Path, goes: bool) -> Iterator[None]:
    """Raises: BlockingIOError: Another has it. OSError: As `_locked`."""
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
                with suppress(OSError):  # another has it already
                    lock.unlink()
        return
    handle = _locked(lock)
    try:
        with suppress(OSError):  # on a full disk it is held without saying by whom
            os.write(handle, json.dumps(claim()).encode())
        yield
    finally:
        if goes and _is_called(handle, lock):
            with suppress(OSError):
                lock.unlink()
        os.close(handle)


def target_of(path: Path) -> Path:
    """The file that is written under this name: where it is a symbolic link, what that points to, there or not."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def make_folder(folder: Path) -> None:
    """Makes a folder where there is none. Fails before the work, not after it, where nothing can be written in it.

    Raises:
        WriteError: So it is.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise WriteError(folder, error) from error


def scratch(size: int, advice: str) -> IO[bytes]:
    """A file without a name, which goes when its process does, however that ends, with room for `size` bytes.

    Raises:
        WriteError: There is no such room where the system keeps temporary files; `advice` says what to do.
    """
    file = tempfile.TemporaryFile()  # noqa: SIM115 - whoever asks for it closes it
    try:
        if hasattr(os, "posix_fallocate"):  # else a full disk would end a process that writes into a memory map
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        file.close()
        if error.errno != errno.EOPNOTSUPP:
            raise WriteError(Path(tempfile.gettempdir()), error, advice) from error
        return scratch(0, advice)
    return file


def _rename(temporary: Path, path: Path) -> None:
    """Flushes a file to disk and gives it its name; that, too, is on disk when this returns."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    _take_rights(temporary, path)
    temporary.replace(path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            with suppress(OSError):  # some network shares cannot
                os.fsync(folder)
        finally:
            os.close(folder)


def _take_rights(temporary: Path, path: Path) -> None:
    """Gives a file the rights and, as far as it is allowed, group and owner of the one that it will replace, if any."""
    with suppress(FileNotFoundError):
        known, own = path.stat(), temporary.stat()
        if (own.st_uid, own.st_gid) != (known.st_uid, known.st_gid):
            for ids in ((-1, known.st_gid), (known.st_uid, -1)):
                with suppress(PermissionError):
                    os.chown(temporary, *ids)
        temporary.chmod(stat.S_IMODE(known.st_mode))


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A name for a temporary file, the same every time: so no more than one can be left of each file.

    It is locked while it is in use. Whoever comes then, and systems that know no such locks, take a random name.
    """
    temporary, handle = path.with_name(f".{_short(path.name)}.part"), None
    try:
        handle = _locked(temporary)
    except OSError:
        temporary = temporary.with_name(f"{temporary.name}.{token_hex(4)}")
        temporary.touch(exist_ok=False)
    try:
        _take_rights(temporary, path)
        yield temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        if handle is not None:
            os.close(handle)


def _locked(file: Path) -> int:
    """Makes a file and locks it, until its handle is closed or the process has ended. What was left of it goes first.

    Raises:
        BlockingIOError: Another process or thread has it. OSError: It cannot be made, or locks are not known here.
    """
    if fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    while True:
        try:
            handle, made = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            try:
                handle, made = _opened(file), False
            except FileNotFoundError:  # it has just gone
                continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_called(handle, file):
                if made:
                    return handle
                file.unlink()  # left by a process that was killed, perhaps with other rights
        except OSError as error:
            if made and error.errno in _NO_LOCKS:
                file.unlink(missing_ok=True)
            os.close(handle)
            raise
        os.close(handle)


def claim() -> dict[str, Any]:
    """The content of a lock file: number and host of this process, and the time."""
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    return {"process": os.getpid(), "host": platform.node(), "since": since}


def held_by(claimed: bytes) -> str:
    """The holder of a lock, from the content of its file: a `claim`, or nothing yet."""
    try:
        holder = json.loads(claimed)
        return f"process {holder['process']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return _SOMEBODY


def _holder(lock: Path) -> str:
    said = _SOMEBODY
    for _ in range(20):
        with suppress(OSError):
            said = held_by(lock.read_bytes())
        if said != _SOMEBODY:
            break
        time.sleep(0.01)  # it has just been made
    return said


def _opened(file: Path) -> int:
    try:
        return os.open(file, os.O_RDWR | os.O_NOFOLLOW)
    except PermissionError:  # of another user: it can be locked on a disk, but not on all network shares
        return os.open(file, os.O_RDONLY | os.O_NOFOLLOW)


def _is_called(handle: int, file: Path) -> bool:
    """True if an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _short(name: str) -> str:
    """A name with room for an ending; of names as long as file systems allow, a digest."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= 200 else hashlib.sha256(encoded).hexdigest()


@contextmanager
def _telling(path: Path, target: Path) -> Iterator[None]:
    """Says of errors in writing a file which one it is, by the name it was given, and what to do."""
    try:
        yield
    except WriteError:
        raise
    except (OSError, SafetensorError) as error:
        known = getattr(error, "filename", None)
        if known is not None and Path(known).parent.absolute() != target.parent.absolute():
            raise  # of another file, which is read meanwhile
        raise WriteError(path, error) from error


def check_name(path: Path) -> None:
    """Refuses to write a trained detector under a name by which it would be taken for something else.

    Raises:
        DetectorError: The suffix is not `.safetensors`.
    """
    if path.suffix != ".safetensors":
        raise DetectorError(f"{path}: a trained detector is a .safetensors file; name it {path.stem}.safetensors")


def steps_of(checkpoint: Path) -> tuple[int, str] | None:
    """The number of training steps in a checkpoint, and the same for messages; None where there is no checkpoint.

    Raises:
        TrainingError: It is damaged.
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
    return TrainingError(f"{path}: the checkpoint is damaged ({error}); delete it and train again")


def write_text(path: Path, text: str) -> None:
    """Writes a file, whole or not at all; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write_text(text, "utf-8"))
