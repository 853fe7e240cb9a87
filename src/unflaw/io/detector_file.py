"""Metadata of detector files, trained or exported, read without loading the model. No torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open

from unflaw.errors import DetectorError

FORMAT = 3  # version of the metadata; raised when an older unflaw can no longer read them
Kind = Literal["safetensors", "onnx", "openvino"]
_NAMES = {"safetensors": ".safetensors", "onnx": ".onnx", "openvino": "OpenVINO .xml"}


def kind_of(path: str | Path) -> Kind:
    """Detect the format of a detector file from its first bytes, else from its suffix.

    Raises DetectorError if there is no such file, or it cannot be read or holds the weights of an OpenVINO file.
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
    """Return the path of the weights of a detector exported to OpenVINO. Raises DetectorError if they are missing."""
    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise DetectorError(f"{weights}: is missing; it belongs to {path.name} and must lie beside it")
    return weights


def read_weights(path: Path, digest: str | None) -> bytes:
    """Read the weights of a detector exported to OpenVINO. Raises DetectorError if they are missing or do not fit.

    Two files cannot be replaced in one step. After a crash between the steps, the first file is still the old one, and
    the old weights lie beside the new ones (`before`).

    Args:
        path: The first file.
        digest: SHA-256 of the weights, in hex, from the first file.
    """
    weights = weights_of(path)
    for file in (weights, before(weights)):
        if file.is_file() and hashlib.sha256(data := file.read_bytes()).hexdigest() == digest:
            return data
    raise DetectorError(f"{weights}: is not the file that belongs to {path.name}; export it again")


def before(weights: Path) -> Path:
    """Path of the old weights until a new export is complete."""
    return weights.with_name(f"{weights.name}.before")


def read_metadata(path: str | Path, data: bytes | None = None) -> dict[str, Any]:
    """Read configuration, calibration and training record of a detector file, without loading the model.

    `data`: content of the file, if already read. Raises DetectorError, see `Detector.load` and `ExportedDetector`.
    """
    kind = kind_of(path)
    try:
        metadata = json.loads(_embedded_json(kind, Path(path), data) or "null")
    except (SafetensorError, OSError, ValueError, SyntaxError, RecursionError) as error:
        raise DetectorError(
            f"{path}: not a readable {_NAMES[kind]} file ({error}); copy it again, or make it anew"
        ) from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get("format"), int):
        raise DetectorError(f"{path}: a {_NAMES[kind]} file, but not a detector of unflaw")
    if metadata["format"] > FORMAT:
        raise DetectorError(f"{path}: made by a newer unflaw; update with pip install --upgrade unflaw")
    try:
        _Metadata.model_validate(metadata)
    except ValidationError as error:
        raise DetectorError(f"{path}: its metadata is damaged ({first_fault(error)}); make it anew") from error
    return metadata


def first_fault(error: Exception) -> str:
    """Describe an error of metadata in one line; of several faults, the first."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}"
    return str(error).splitlines()[0]


class _CalibrationRecord(BaseModel):
    category: str = ""
    kept: int
    images: list[str] = []


class _Record(BaseModel):
    seen: list[str] = []
    calibrations: list[_CalibrationRecord] = []


_Side = Annotated[int, Field(ge=1, le=4096)]


class _Exported(BaseModel):
    to: str
    precision: str
    grid: _Side | tuple[_Side, _Side]  # rows and columns; one number stands for both
    weights: str = ""


class _Metadata(BaseModel):
    """Metadata that are used, except configuration and calibrations, which have models of their own."""

    config: dict[str, Any]
    record: _Record = _Record()
    exported: _Exported | None = None


def _embedded_json(kind: Kind, path: Path, data: bytes | None) -> str | None:
    if kind == "safetensors":
        with safe_open(path, "np") as file:
            return (file.metadata() or {}).get("unflaw")
    data = path.read_bytes() if data is None else data
    if kind == "onnx":
        from unflaw.io.onnx_metadata import read_properties

        return read_properties(data).get("unflaw")
    from xml.etree import ElementTree  # expat expands no external entities and limits internal ones

    entry = ElementTree.fromstring(data).find("rt_info/unflaw")
    return None if entry is None else entry.get("value")
