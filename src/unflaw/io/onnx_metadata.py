"""What an ONNX file says of itself, and whether it may be run: read by its wire format alone, so that nothing is run.

Refused is what an exported detector never has: tensors in other files, whose paths could point anywhere, operators that
are not ONNX's own, and functions. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator

DEEPEST = 32  # messages inside of each other; an exported detector has 6

# The messages that are looked into: {field: message}.
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
    """`metadata_props` of an ONNX model.

    Raises:
        ValueError: Not an ONNX model, or one that may not be run.
    """
    properties: dict[str, str] = {}
    graphs = 0
    for message, field, value in _walk(memoryview(data), "model", 0):
        if (message, field) in _REFUSED:
            raise ValueError(f"holds {_REFUSED[message, field]}, which no exported detector has")
        if (message, field) == ("tensor", 14) and value != 0:
            raise ValueError("holds tensors in other files, which no exported detector has")
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
    """Every field of a message and of those inside it."""
    if depth > DEEPEST:
        raise ValueError("is nested too deep")
    inside = _INSIDE.get(message, {})
    for field, value in _fields(data):
        yield message, field, value
        if field in inside and isinstance(value, memoryview):
            yield from _walk(value, inside[field], depth + 1)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of each field of a message: a number, or the bytes of what has a length."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        wire, value = key & 7, 0
        if wire == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        if wire == 2:
            size, place = _varint(data, place)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError("is damaged, or no ONNX model")
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
