"""The detector file format: what a file says of itself, without loading it. No torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open

from unflaw.errors import DetectorError

if TYPE_CHECKING:
    pass


FORMAT = 3  # newest of the metadata in a detector file; raised when an older unflaw could no longer read it


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
    images: list[str] = []


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
    from unflaw.io.onnx_metadata import read_properties

    return read_properties(path.read_bytes() if data is None else data).get("unflaw")


def _from_openvino(path: Path, data: bytes | None) -> str | None:
    from xml.etree import ElementTree  # expat expands no external entities and limits internal ones

    entry = ElementTree.fromstring(path.read_bytes() if data is None else data).find("rt_info/unflaw")
    return None if entry is None else entry.get("value")


_READERS = {"safetensors": _from_safetensors, "onnx": _from_onnx, "openvino": _from_openvino}


_CALLED = {"safetensors": ".safetensors", "onnx": ".onnx", "openvino": "OpenVINO .xml"}
