"""Records of finished runs, and the log from which an interrupted experiment goes on."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, field_validator

from unflaw.errors import InUseError
from unflaw.evaluation.results import METRICS
from unflaw.io.files import holding, write_atomically

KEPT = (*METRICS, "n_images", "n_good", "false_alarms", "missed", "threshold")


class Finished(BaseModel):
    """A line of a log. Names that are no UTF-8 have escapes.

    Attributes:
        digest: Digest of everything that decides the result.
    """

    digest: str

    @field_validator("*", mode="before")
    @classmethod
    def _legible(cls, value: Any) -> Any:
        def text(part: Any) -> Any:
            return part.encode("utf-8", "backslashreplace").decode() if isinstance(part, str) else part

        return {text(k): text(v) for k, v in value.items()} if isinstance(value, dict) else text(value)


class Latency(BaseModel):
    """Wall seconds per image, from file to result, warm."""

    median: float
    p95: float


class Record(Finished):
    """A finished run, a line of `runs.jsonl`.

    Attributes:
        digest: Digest of configuration, data, weights and version.
        data, method, variant, backbone, size, seed: Cell of the grid, and seed. A method on pixels has the backbone "".
        overrides: Settings that the variant changes.
        weights: Name of the backbone's weight file, or "default" or "random".
        settings: Settings that were changed for the whole grid.
        metrics: KEPT; None where undefined.
        skipped: Images that could not be read, and why.
        seconds: "training", from files to saved detector (of a peer: from prepared images on), and "metrics".
        memory: Largest resident size of the training process in bytes, libraries included; None where unknown.
        file: Size of the detector file in bytes.
        latency: By batch, "1" and "32".
        machine: Processor architecture and threads.
        unflaw, torch: Versions.
        shared: Its features were shared with other runs: "training" is without them, memory and latency are unknown.
    """

    data: str
    method: str
    variant: str = "full"
    overrides: str = ""
    backbone: str
    size: int | str | None = None
    seed: int
    weights: str
    settings: str = ""
    metrics: dict[str, int | float | None]
    skipped: dict[str, str]
    seconds: dict[str, float]
    memory: int | None = None
    file: int | None = None
    latency: dict[str, Latency] = {}
    machine: str
    unflaw: str
    torch: str
    shared: bool = False


def images_file(out: Path, digest: str) -> Path:
    """The file that keeps scores and counts of every test image of a run, for confidence intervals."""
    return out / "images" / f"{digest[:16]}.npz"


R = TypeVar("R", bound=Finished)


class Log(Generic[R]):
    """A file of finished runs, which is made where there is none. A last line that has no end is dropped.

    In a `with` block the file is held: no other process adds to it. `records` are read anew at the beginning.

    Args:
        path: The file, a JSON object per line.
        kind: Model of a line.

    Attributes:
        records: By digest, the newest last.

    Raises:
        InUseError: Another process adds to it. ValueError: The file holds other lines, or cannot be read or written.
    """

    def __init__(self, path: Path, kind: type[R]) -> None:
        self.path, self.kind, self._held = path, kind, ExitStack()
        self.records: dict[str, R] = {}
        with self:  # reads it
            pass

    def __enter__(self) -> Log[R]:
        with ExitStack() as opening:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                opening.enter_context(holding(self.path))
                self._read()
            except InUseError:
                raise
            except OSError as error:
                remedy = "name another folder for the results"
                raise ValueError(f"{self.path}: cannot be used ({error}); {remedy}") from error
            self._held = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _read(self) -> None:
        self.records.clear()
        *lines, rest = self.path.read_text("utf-8", "replace").split("\n") if self.path.exists() else [""]
        for number, line in enumerate(lines, 1):
            try:
                self._add(self.kind.model_validate_json(line))
            except ValueError as error:
                remedy = "delete the line, and its run is done again"
                raise ValueError(f"{self.path}, line {number}: is not a finished run; {remedy}") from error
        if rest or not self.path.exists():
            write_atomically(self.path, lambda file: file.write_text("".join(f"{line}\n" for line in lines), "utf-8"))

    def _add(self, record: R) -> None:
        self.records.pop(record.digest, None)
        self.records[record.digest] = record

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
            remedy = "make room, the same command goes on"
            raise ValueError(f"{self.path}: cannot be written ({error}); {remedy}") from error
        self._add(record)
