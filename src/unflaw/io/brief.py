"""Short representations of objects that hold arrays or long lists. No torch."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterable
from typing import Any, TypeVar

from unflaw.io.words import count

C = TypeVar("C", bound=type)
_PLAIN = (bool, int, float, str, type(None))


class _Short(reprlib.Repr):
    """Arrays and tensors by shape and type, numbers to six digits, the first four of many, and how many of objects."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxtuple, self.maxlist, self.maxdict, self.maxstring, self.maxother = 2, 4, 4, 8, 120, 200

    def repr_ndarray(self, value: Any, level: int) -> str:
        return f"<{'×'.join(map(str, value.shape)) or 'scalar'} {str(value.dtype).removeprefix('torch.')}>"

    repr_Tensor = repr_ndarray

    def repr_float(self, value: float, level: int) -> str:
        return f"{value:.6g}"

    def repr_bytes(self, value: bytes, level: int) -> str:
        return f"<{count(len(value), 'byte')}>"

    def repr_tuple(self, value: tuple[Any, ...], level: int) -> str:
        return super().repr_tuple(value, level) if _plain(value) else f"<{len(value)} × {type(value[0]).__name__}>"

    def repr_list(self, value: list[Any], level: int) -> str:
        return super().repr_list(value, level) if _plain(value) else f"<{len(value)} × {type(value[0]).__name__}>"


_SHORT = _Short()


def brief(cls: C) -> C:
    """Gives a dataclass, NamedTuple or pydantic model a short representation, without `field(repr=False)`."""
    for name in ("__repr__", "__str__"):
        setattr(cls, name, _represented)
    return cls


def _represented(self: Any) -> str:
    return f"{type(self).__name__}({', '.join(f'{name}={_SHORT.repr(value)}' for name, value in _fields(self))})"


def _fields(self: Any) -> Iterable[tuple[str, Any]]:
    if dataclasses.is_dataclass(self):
        return ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self) if field.repr)
    names = type(self).model_fields if hasattr(type(self), "model_fields") else self._fields  # pydantic, or NamedTuple
    return ((name, getattr(self, name)) for name in names)


def _plain(values: Iterable[Any]) -> bool:
    return all(isinstance(value, _PLAIN) for value in values)
