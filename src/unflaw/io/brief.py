"""Short representations of objects with arrays or long lists. No torch."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterable
from typing import Any, TypeVar

from unflaw.io.words import count

C = TypeVar("C", bound=type)


class _Short(reprlib.Repr):
    """Show arrays and tensors by shape and dtype, floats to six digits, and sequences of objects by length."""

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
        return super().repr_tuple(value, level) if _is_plain(value) else f"<{len(value)} × {type(value[0]).__name__}>"

    def repr_list(self, value: list[Any], level: int) -> str:
        return super().repr_list(value, level) if _is_plain(value) else f"<{len(value)} × {type(value[0]).__name__}>"


def _is_plain(values: Iterable[Any]) -> bool:
    return all(isinstance(value, bool | int | float | str | None) for value in values)


_SHORT = _Short()


def brief(cls: C) -> C:
    """Give a dataclass, NamedTuple or pydantic model a short representation."""
    cls.__repr__ = cls.__str__ = _represent  # type: ignore[assignment]
    return cls


def _represent(self: Any) -> str:
    if dataclasses.is_dataclass(self):
        names: Iterable[str] = [field.name for field in dataclasses.fields(self) if field.repr]
    else:
        names = type(self).model_fields if hasattr(type(self), "model_fields") else self._fields  # pydantic, NamedTuple
    return f"{type(self).__name__}({', '.join(f'{name}={_SHORT.repr(getattr(self, name))}' for name in names)})"
