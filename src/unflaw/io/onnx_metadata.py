"""Metadata and safety checks of ONNX files, read from the wire format alone.

Exported detectors never have tensors in other files, whose paths could point anywhere, operators outside of ONNX, or
functions; such files are refused. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator

DEEPEST = 32  # nested messages; an exported detector has 6

# Nested messages that are read: {field: message}
_INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 14: "entry"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_REFUSED: dict[tuple[str, int], str] = {
    ("model", 20): "training steps",
    ("model", 25): "functions",
    ("tensor", 13): "tensors in other files",
}


def read_properties(data: bytes) -> dict[str, str]:
    """Read `metadata_props` of an ONNX model. Raises ValueError for other data, and for a model that is refused."""
    properties: dict[str, str] = {}
    graphs = 0
    for message, field, value in _walk(memoryview(data), "model", 0):
        if (message, field) in _REFUSED or ((message, field) == ("tensor", 14) and value != 0):
            what = _REFUSED.get((message, field), "tensors in other files")
            raise ValueError(f"holds {what}, which no exported detector has")
        if (message, field) == ("node", 7) and isinstance(value, memoryview) and bytes(value) not in (b"", b"ai.onnx"):
            raise ValueError(f"holds operators of {bytes(value).decode(errors='replace')}, not ONNX's own")
        if (message, field) == ("model", 14) and isinstance(value, memoryview):
            entry = {key: bytes(text).decode() for key, text in _fields(value) if isinstance(text, memoryview)}
            properties[entry.get(1, "")] = entry.get(2, "")
        graphs += (message, field) == ("model", 7)
    if not graphs:
        raise ValueError("not an ONNX model")
    return properties


def _walk(data: memoryview, message: str, depth: int) -> Iterator[tuple[str, int, int | memoryview]]:
    """Iterate over the fields of a message and of its nested messages."""
    if depth > DEEPEST:
        raise ValueError("is nested too deep")
    inside = _INSIDE.get(message, {})
    for field, value in _fields(data):
        yield message, field, value
        if field in inside and isinstance(value, memoryview):
            yield from _walk(value, inside[field], depth + 1)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Iterate over (field number, value) of a message; a value is a number or bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        wire = key & 7
        if wire not in (0, 1, 2, 5):
            raise ValueError("is damaged, or no ONNX model")
        if wire == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        size = 8 if wire == 1 else 4
        if wire == 2:
            size, place = _varint(data, place)
        if place + size > len(data):
            raise ValueError("ends too early")
        place += size
        yield key >> 3, data[place - size : place]


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise ValueError("ends too early")
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("is damaged, or no ONNX model")
