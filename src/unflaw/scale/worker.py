"""Worker that processes a partition, from its items to its file, independently of the engine that runs it.

A partition always gives the same rows and has one file. So every image has one row, however often workers die and
start again, or two process the same partition.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import unflaw
from unflaw.errors import ImageError
from unflaw.imaging.inputs import Readable
from unflaw.inference.base import BasePredictor
from unflaw.scale import partitions
from unflaw.scale.partitions import text
from unflaw.scale.plan import Plan, items_of
from unflaw.scale.sources import SourceImage, images
from unflaw.scale.store import OWN, Store

MAX_DEATHS = 2  # worker deaths at one image, after which it is recorded as failed
MAX_STARTS = 5  # worker deaths before the first image, after which the partition is given up


class PartitionResult(NamedTuple):
    """Counts of a finished partition by verdict, or the error that left it unfinished."""

    partition: int
    counts: Counter[str]
    error: str | None = None


def load(files: dict[str, bytes], threads: int) -> BasePredictor:
    """Load a detector from the contents of its files, since workers may share no disk with the driver."""
    with tempfile.TemporaryDirectory(prefix="unflaw-", ignore_cleanup_errors=True) as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        model = Path(folder) / next(iter(files))
        if model.suffix == ".safetensors":
            import torch

            torch.set_num_threads(threads)
        return unflaw.load(model, threads=threads)


class Worker:
    """Processes partitions of a plan, one at a time.

    Args:
        store: Store of the plan and the results.
        plan: Plan of the run.
        files: `plan.detector_files`.
        threads: Threads for computing; two more read ahead.
        retry: Inspect failed images of finished partitions again.
    """

    def __init__(self, store: Store, plan: Plan, files: dict[str, bytes], *, threads: int = 1, retry: bool = False):
        self.store, self.plan, self.retry, self.detector = store, plan, retry, load(files, threads)

    def process(self, partition: int) -> PartitionResult:
        """Process a partition unless it is finished. An error is returned, not raised: other partitions may succeed."""
        try:
            return PartitionResult(partition, self._process(partition))
        except Exception as error:
            return PartitionResult(partition, Counter(), f"{type(error).__name__}: {error}")

    def _process(self, partition: int) -> Counter[str]:
        log = AttemptLog(self.store, partition)
        try:
            before = partitions.read(self.store, partition)
        except FileNotFoundError:
            before = []
        else:
            if not self.retry or all(row["status"] == "ok" for row in before):
                log.remove()  # of a worker that died just after it had finished
                return partitions.count_verdicts(before)
        kept = {(row["source"], row["number"]): row for row in before if row["status"] == "ok"}
        interrupted = log.start()
        items = items_of(self.store, partition)

        def remaining() -> Iterator[SourceImage]:
            for item in items:
                for image in images(item, self.plan.column):
                    if (text(image.source), image.number) not in kept:
                        yield image

        rows = None
        if not interrupted:
            with suppress(Exception):  # it is not known which image caused it
                rows = list(self._in_batches(remaining()))
        if rows is None:
            rows = list(self._one_by_one(remaining(), log))
        order = {text(item.name): i for i, item in enumerate(items)}
        rows = sorted([*kept.values(), *rows], key=lambda row: (order[row["source"]], row["number"]))
        partitions.write(self.store, partition, rows, self.plan.detector)
        log.remove()
        return partitions.count_verdicts(rows)

    def _in_batches(self, remaining: Iterable[SourceImage]) -> Iterator[partitions.Row]:
        waiting: list[SourceImage] = []

        def named() -> Iterator[tuple[str, bytes | Readable | ImageError]]:
            for image in remaining:
                waiting.append(image._replace(data=b""))
                yield image.name, image.data

        for outcome in self.detector.inspect_named(named(), category=self.plan.category):
            yield partitions.make_row(waiting.pop(0), outcome, self.plan.detector)

    def _one_by_one(self, remaining: Iterable[SourceImage], log: AttemptLog) -> Iterator[partitions.Row]:
        """Inspect images singly and log each beforehand, so that one that kills workers is known and then skipped."""
        for i, image in enumerate(remaining):
            if log.deaths(i) >= MAX_DEATHS:
                reason = "the worker that inspected it died, more than once; look at the image"
                yield partitions.make_row(image, ImageError(f"{image.name}: {reason}"), self.plan.detector)
                continue
            log.write(i)
            try:
                outcome = next(self.detector.inspect_named([(image.name, image.data)], category=self.plan.category))
            except Exception as error:
                reason = f"could not be inspected ({type(error).__name__}: {error}); look at the image"
                outcome = ImageError(f"{image.name}: {reason}")
            yield partitions.make_row(image, outcome, self.plan.detector)
        log.write(None)


class AttemptLog:
    """Log of interrupted attempts at a partition, in a file of the store: the image in work, and deaths by image."""

    def __init__(self, store: Store, partition: int) -> None:
        self._store, self._name = store, f"{OWN}/doing-{partition:05d}.json"
        self._deaths: dict[str, int] = {}

    def start(self) -> bool:
        """Begin an attempt; return True if an earlier one was interrupted, whose worker then counts as dead.

        Raises:
            RuntimeError: Too many workers died before the first image.
        """
        try:
            earlier: dict[str, Any] | None = json.loads(self._store.read(self._name))
        except (FileNotFoundError, ValueError):
            earlier = None
        if earlier is not None:
            self._deaths = earlier["deaths"]
            at = -1 if earlier["doing"] is None else earlier["doing"]
            self._deaths[str(at)] = self.deaths(at) + 1
        if self.deaths(-1) >= MAX_STARTS:
            self.remove()
            raise RuntimeError(f"its worker died {MAX_STARTS} times before the first image; is there memory enough?")
        self.write(None)
        return earlier is not None

    def deaths(self, image: int) -> int:
        """Number of workers that died at an image of the partition; of -1, outside of any."""
        return self._deaths.get(str(image), 0)

    def write(self, doing: int | None) -> None:
        """Log the number of the image that is inspected next; None for no single image."""
        owner = {"host": socket.gethostname(), "pid": os.getpid()}
        self._store.write(self._name, json.dumps(owner | {"doing": doing, "deaths": self._deaths}).encode())

    def remove(self) -> None:
        self._store.remove(self._name)
