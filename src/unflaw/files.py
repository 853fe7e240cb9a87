"""Files that are whole or not there, and what a detector file says of itself. No torch."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from unflaw.errors import DetectorError

FORMAT = 3  # newest of the metadata in a detector file; raised when an older unflaw could no longer read it


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes to a temporary name beside `path`, flushes it to disk and renames: no half file ever stands in `path`."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Configuration, calibration and training record of a detector file, without loading its tensors.

    Raises:
        DetectorError: See `Detector.load`.
    """
    if not Path(path).is_file():
        raise DetectorError(f"{path}: there is no such file; `unflaw train … --out {path}` makes one")
    try:
        with safe_open(path, "np") as file:
            metadata = json.loads((file.metadata() or {}).get("unflaw", "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise DetectorError(f"{path}: not a readable .safetensors file ({error}); copy or train it again") from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get("format"), int):
        raise DetectorError(f"{path}: a .safetensors file, but not a detector of unflaw")
    if metadata["format"] > FORMAT:
        raise DetectorError(f"{path}: made by a newer unflaw; update with pip install --upgrade unflaw")
    return metadata
