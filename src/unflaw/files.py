"""Files that are whole or not there, and what a detector file says of itself. No torch."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TextIO

from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open

from unflaw.errors import DetectorError, WriteError

if TYPE_CHECKING:
    from PIL.Image import Image

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = 3  # newest of the metadata in a detector file; raised when an older unflaw could no longer read it


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes to a temporary name beside `path`, flushes it to disk and renames: no half file ever stands in `path`.

    What a killed process leaves, `.<name>.part`, is hidden and taken over by the next writing of the same name. A pipe
    or a device, such as /dev/stdout, is written as it is.

    Raises:
        WriteError: It cannot be written, and what stood in `path` is as it was.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        write(path)
        return
    with _telling(path), _beside(path) as temporary:
        write(temporary)
        _rename(temporary, path)


def write_png(path: Path, picture: Image) -> None:
    """Writes a picture of Pillow, whole or not at all."""
    write_atomically(path, lambda file: picture.save(file, "PNG"))


@contextmanager
def growing(path: Path, amend: Iterable[Callable[[Path], object]] = ()) -> Iterator[TextIO]:
    """Lines that can be read as they come, in `<path>.part`, which takes its name, on disk, at the end of the block.

    Where that is not reached, what was written stays under the first name, and what stood in `path` is as it was. Names
    of files that are no UTF-8 are written with backslashes.

    Args:
        path: Of the file when it is whole.
        amend: Are called with the whole file before it takes its name.

    Raises:
        WriteError: It cannot be written.
    """
    partial = path.with_name(f"{path.name}.part")
    with _telling(path):
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
        for change in amend:
            change(partial)
        _rename(partial, path)


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
    temporary.chmod(0o644)
    temporary.replace(path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            with suppress(OSError):  # some network shares cannot
                os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A name for a temporary file, the same every time: so no more than one can be left of each file.

    It is locked while it is in use. Whoever comes then, and systems that know no such locks, take a random name.
    """
    temporary = path.with_name(f".{_short(path.name)}.part")
    handle = _locked(temporary)
    if handle is None:
        opened, name = tempfile.mkstemp(dir=path.parent, prefix=f"{temporary.name}.")
        os.close(opened)
        temporary = Path(name)
    try:
        yield temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        if handle is not None:
            os.close(handle)


def _locked(temporary: Path) -> int | None:
    """The empty file, open; None where another process or thread writes it, or it cannot be had."""
    if fcntl is None:
        return None
    try:
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:  # most likely no other name can be had either, and that will be said
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if temporary.stat().st_ino == os.fstat(handle).st_ino:  # else its writer has just renamed it
            os.ftruncate(handle, 0)
            return handle
    except OSError:
        pass
    os.close(handle)
    return None


def _short(name: str) -> str:
    """A name with room for an ending; of names as long as file systems allow, a digest."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= 200 else hashlib.sha256(encoded).hexdigest()


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Says of errors in writing a file which one it is, and what to do."""
    try:
        yield
    except WriteError:
        raise
    except (OSError, SafetensorError) as error:
        known = getattr(error, "filename", None)
        if known is not None and Path(known).parent.absolute() != path.parent.absolute():
            raise  # of another file, which is read meanwhile
        raise WriteError(path, error) from error


def kind_of(path: str | Path) -> Literal["safetensors", "onnx", "openvino"]:
    """What kind of detector file it is: by what it begins with, else by its suffix.

    Raises:
        DetectorError: There is no such file, it cannot be read, or it is the half of a detector that has no name of its
            own.
    """
    path = Path(path)
    if path.is_dir():
        raise DetectorError(f"{path}: is a folder; name a detector file")
    if not path.is_file():
        made = {".safetensors": "train", ".onnx": "export", ".xml": "export"}.get(path.suffix)
        how = f", or make one with `unflaw {made} … --out {path}`" if made else ""
        raise DetectorError(f"{path}: there is no such file; check the path{how}")
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise DetectorError(f"{path}: cannot be read ({error.strerror}); mend that, or copy it again") from error
    if head[8:] == b"{":
        return "safetensors"
    if head.lstrip().startswith(b"<"):
        return "openvino"
    if path.suffix == ".bin" and path.with_suffix(".xml").is_file():
        raise DetectorError(f"{path}: is the weights of {path.with_suffix('.xml').name}; name that file")
    return "onnx" if path.suffix == ".onnx" else "safetensors"


def check_name(path: Path) -> None:
    """Refuses to write a trained detector under a name by which it would be taken for something else.

    Raises:
        DetectorError: The suffix is not `.safetensors`.
    """
    if path.suffix != ".safetensors":
        raise DetectorError(f"{path}: a trained detector is a .safetensors file; name it {path.stem}.safetensors")


def weights_of(path: Path) -> Path:
    """The second file of a detector exported to OpenVINO.

    Raises:
        DetectorError: It is missing.
    """
    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise DetectorError(f"{weights}: is missing; it belongs to {path.name} and must lie beside it")
    return weights


def read_weights(path: Path, digest: str | None) -> bytes:
    """What is in the second file of a detector exported to OpenVINO.

    Two files cannot be replaced in one step. Where a crash came between the steps, the first still is the old one, and
    the old weights lie beside the new ones (`before`): so the pair is the old one until the first file is replaced.

    Args:
        path: The first file.
        digest: SHA-256 of the second, in hex, as the first says.

    Raises:
        DetectorError: It is missing, or not the one that belongs to it.
    """
    weights = weights_of(path)
    for file in (weights, before(weights)):
        if file.is_file() and hashlib.sha256(data := file.read_bytes()).hexdigest() == digest:
            return data
    raise DetectorError(f"{weights}: is not the file that belongs to {path.name}; export it again")


def before(weights: Path) -> Path:
    """Where the old weights are kept until a new export is whole."""
    return weights.with_name(f"{weights.name}.before")


def read_metadata(path: str | Path, data: bytes | None = None) -> dict[str, Any]:
    """Configuration, calibration and training record of a detector file, trained or exported, without loading it.

    Args:
        path: Of the file.
        data: What is in it, where that is known already.

    Raises:
        DetectorError: See `Detector.load` and `ExportedDetector`.
    """
    kind = kind_of(path)
    try:
        metadata = json.loads(_READERS[kind](Path(path), data) or "null")
    except (SafetensorError, OSError, ValueError, SyntaxError, RecursionError) as error:
        raise DetectorError(
            f"{path}: not a readable {_CALLED[kind]} file ({error}); copy it again, or make it anew"
        ) from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get("format"), int):
        raise DetectorError(f"{path}: a {_CALLED[kind]} file, but not a detector of unflaw")
    if metadata["format"] > FORMAT:
        raise DetectorError(f"{path}: made by a newer unflaw; update with pip install --upgrade unflaw")
    try:
        _Metadata.model_validate(metadata)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DetectorError(f"{path}: its metadata is damaged ({where}: {first['msg']}); make it anew") from error
    return metadata


class _Calibrated(BaseModel):
    category: str = ""
    kept: int
    pictures: list[str] = []


class _Record(BaseModel):
    seen: list[str] = []
    calibrations: list[_Calibrated] = []


class _Exported(BaseModel):
    to: str
    precision: str
    grid: int = Field(ge=1, le=4096)
    weights: str = ""


class _Metadata(BaseModel):
    """What is used of metadata beside the configuration and calibrations, which have models of their own."""

    config: dict[str, Any]
    record: _Record = _Record()
    exported: _Exported | None = None


def _from_safetensors(path: Path, data: bytes | None) -> str | None:
    with safe_open(path, "np") as file:
        return (file.metadata() or {}).get("unflaw")


def _from_onnx(path: Path, data: bytes | None) -> str | None:
    from unflaw.runtime.onnx_file import read_properties

    return read_properties(path.read_bytes() if data is None else data).get("unflaw")


def _from_openvino(path: Path, data: bytes | None) -> str | None:
    from xml.etree import ElementTree  # expat expands no external entities and limits internal ones

    entry = ElementTree.fromstring(path.read_bytes() if data is None else data).find("rt_info/unflaw")
    return None if entry is None else entry.get("value")


_READERS = {"safetensors": _from_safetensors, "onnx": _from_onnx, "openvino": _from_openvino}
_CALLED = {"safetensors": ".safetensors", "onnx": ".onnx", "openvino": "OpenVINO .xml"}
