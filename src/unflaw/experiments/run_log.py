"""The log of finished runs, from which an interrupted experiment goes on."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, field_validator

from unflaw.errors import InUseError
from unflaw.io.files import holding, write_atomically


class Finished(BaseModel):
    """What every finished run has: the digest of all that decides its figures. Names that are no UTF-8 have escapes."""

    digest: str

    @field_validator("*", mode="before")
    @classmethod
    def _legible(cls, value: Any) -> Any:
        def text(part: Any) -> Any:
            return part.encode("utf-8", "backslashreplace").decode() if isinstance(part, str) else part

        return {text(k): text(v) for k, v in value.items()} if isinstance(value, dict) else text(value)


R = TypeVar("R", bound=Finished)


class Log(Generic[R]):
    """Finished runs in a file, which is made where there is none. A last line that has no end is dropped.

    In a `with` block the file is held: nobody else adds to it. `records` are read anew at the beginning of the block.

    Args:
        path: The file, a JSON object per line.
        kind: Model of a line.

    Attributes:
        records: By digest, the newest last.

    Raises:
        InUseError: Another run adds to it. ValueError: The file holds other lines, or cannot be read or written.
    """

    def __init__(self, path: Path, kind: type[R]) -> None:
        self.path, self.kind, self._held = path, kind, ExitStack()
        self.records: dict[str, R] = {}
        with self:  # reads it
            pass

    def __enter__(self) -> Log[R]:
        with ExitStack() as opening:
            self._open(opening)
            self._held = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _open(self, opening: ExitStack) -> None:
        path = self.path
        self.records.clear()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            opening.enter_context(holding(path))
            *lines, rest = path.read_text("utf-8", "replace").split("\n") if path.exists() else [""]
            for number, line in enumerate(lines, 1):
                try:
                    record = self.kind.model_validate_json(line)
                except ValueError as error:
                    remedy = "delete the line, and its run is done again"
                    raise ValueError(f"{path}, line {number}: is not a finished run; {remedy}") from error
                self.records.pop(record.digest, None)
                self.records[record.digest] = record
            if rest or not path.exists():
                write_atomically(path, lambda file: file.write_text("".join(f"{line}\n" for line in lines), "utf-8"))
        except InUseError:
            raise
        except OSError as error:
            raise ValueError(f"{path}: cannot be used ({error}); name another folder for the results") from error

    def append(self, record: R) -> None:
        """Writes a line, down to the disk.

        Raises:
            ValueError: It cannot be written.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(record.model_dump_json() + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ValueError(
                f"{self.path}: cannot be written ({error}); make room, the same command goes on"
            ) from error
        self.records.pop(record.digest, None)
        self.records[record.digest] = record
