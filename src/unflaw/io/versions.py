"""Earlier versions of a detector file, so that a calibration, commissioning or teaching can be undone. No torch."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

from unflaw.errors import DetectorError, WriteError
from unflaw.io.detector_file import read_metadata
from unflaw.io.files import target_of

KEPT = 5  # versions beside the present one


def versions_of(path: Path) -> list[Path]:
    """Earlier versions of a file, the latest first."""
    target = target_of(path)
    return sorted(_folder(target).glob(f"[0-9]*{target.suffix}"), reverse=True)


def keep_version(path: Path) -> None:
    """Keeps the present file, if there is one, as a version; the oldest of more than `KEPT` are removed.

    Its name is the time when it was written, so that a run that is killed here and starts over keeps it once.

    Raises:
        OSError: It cannot be kept.
    """
    target = target_of(path)
    if not target.exists():
        return
    when = datetime.fromtimestamp(target.stat().st_mtime, timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")
    kept, number = _folder(target) / f"{when}{target.suffix}", 1
    while kept.exists() and not kept.samefile(target):  # a file system with coarse times
        kept, number = _folder(target) / f"{when}.{number}{target.suffix}", number + 1
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        try:
            os.link(target, kept)  # `write_atomically` gives the name to a new file, and this one stays
        except OSError:  # a file system without links
            shutil.copy2(target, kept)
    for old in versions_of(target)[KEPT:]:
        with suppress(OSError):
            old.unlink()


def undo(path: Path) -> tuple[Path, Path]:
    """Puts the latest earlier version in the place of a file, which is kept beside the versions until the next undo.

    Returns:
        Where the version was, and where the file is now.

    Raises:
        DetectorError: There is no such file or no earlier version, or that is damaged or of another training.
        WriteError: It cannot be moved.
    """
    target, earlier = target_of(path), versions_of(path)
    present = read_metadata(path).get("record", {})
    while earlier and earlier[0].samefile(target):  # kept by a run that was killed before it wrote
        earlier.pop(0).unlink()
    if not earlier:
        raise DetectorError(f"{path}: has no earlier version; {_folder(target)} keeps those that commands replace")
    before = read_metadata(earlier[0]).get("record", {})  # raises if it is damaged
    if any(present.get(fact) != before.get(fact) for fact in ("trained", "seconds", "digest")):
        raise DetectorError(
            f"{path}: its earlier version {earlier[0]} is of another training, and this file would be lost; move it by "
            "hand if it is wanted"
        )
    undone = _folder(target) / f"undone{target.suffix}"
    try:
        undone.unlink(missing_ok=True)
        try:
            os.link(target, undone)
        except OSError:  # a file system without links
            shutil.copy2(target, undone)
        earlier[0].replace(target)
    except OSError as error:
        raise WriteError(path, error) from error
    return earlier[0], undone


def _folder(target: Path) -> Path:
    return target.with_name(f"{target.name}.versions")
