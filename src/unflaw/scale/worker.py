"""What one worker does: a partition from its items to its file. It knows nothing of what runs it.

Every partition has one file with a name of its own, and the same partition always gives the same rows: however often
workers die and begin again, or two do the same, every image is there once.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import unflaw
from unflaw.errors import ImageError
from unflaw.imaging.inputs import Readable
from unflaw.inference.base import BasePredictor
from unflaw.postprocessing.results import Result
from unflaw.scale import partitions
from unflaw.scale.partitions import text
from unflaw.scale.plan import Plan, detector_digest, items_of
from unflaw.scale.sources import Found, Item, images
from unflaw.scale.store import OWN, Store

DEATHS = 2  # of workers over one image: then it is recorded as failed
BEGINNINGS = 5  # of a partition without getting to its first image: then it is given up


class Done(NamedTuple):
    """What came of a partition: how many images are of which verdict or failed, or why there is no file of it."""

    partition: int
    counts: Counter[str]
    error: str | None = None


def load(files: dict[str, bytes], threads: int) -> BasePredictor:
    """A detector from what is in its files, for machines that do not share a disk with them."""
    with tempfile.TemporaryDirectory(prefix="unflaw-", ignore_cleanup_errors=True) as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        model = Path(folder) / next(iter(files))
        if model.suffix == ".safetensors":
            import torch

            torch.set_num_threads(threads)
        return unflaw.load(model, threads=threads)


class Worker:
    """Does partitions of a plan, one at a time.

    Args:
        store: Where the plan is and results go.
        plan: What is there.
        files: Of `plan.detector_files`.
        threads: That compute; two more read ahead.
        retry: Of a partition that is there, do failed images anew.
    """

    def __init__(self, store: Store, plan: Plan, files: dict[str, bytes], *, threads: int = 1, retry: bool = False):
        self.store, self.plan, self.retry, self.detector = store, plan, retry, load(files, threads)
        self.digest = detector_digest(files)

    def do(self, partition: int) -> Done:
        """Does a partition, or finds it done. Whatever goes wrong with it is returned: others may fare better."""
        try:
            return self._do(partition)
        except Exception as error:
            return Done(partition, Counter(), f"{type(error).__name__}: {error}")

    def _do(self, partition: int) -> Done:
        try:
            before = partitions.read(self.store, partition)
        except FileNotFoundError:
            before = []
        else:
            failed = sum(row["status"] == "failed" for row in before)
            if not (self.retry and failed):
                self.store.remove(notes_of(partition))  # of a worker that died just after it was done
                return Done(partition, partitions.counted(before))
        notes = Notes(self.store, partition)
        kept = {(row["source"], row["number"]): row for row in before if row["status"] == "ok"}
        items = items_of(self.store, partition)
        try:
            rows = None if notes.careful else list(self._at_once(self._left(items, kept)))
        except Exception:  # of which image it is, is not known
            rows = None
        if rows is None:
            rows = list(self._carefully(self._left(items, kept), notes))
        order = {text(item.name): i for i, item in enumerate(items)}
        rows = sorted([*kept.values(), *rows], key=lambda row: (order[row["source"]], row["number"]))
        partitions.write(self.store, partition, rows, self.digest)
        notes.forget()
        return Done(partition, partitions.counted(rows))

    def _left(self, items: list[Item], kept: Collection[tuple[str, int]]) -> Iterator[Found]:
        for item in items:
            for found in images(item, self.plan.column):
                if (text(found.source), found.number) not in kept:
                    yield found

    def _at_once(self, wanted: Iterator[Found]) -> Iterator[partitions.Row]:
        """All images in batches, reading ahead."""
        waiting: list[Found] = []

        def named() -> Iterator[tuple[str, bytes | Readable | ImageError]]:
            for found in wanted:
                waiting.append(found._replace(data=b""))
                yield found.name, found.data

        for outcome in self.detector.inspect_named(named(), category=self.plan.category):
            yield self._row(waiting.pop(0), outcome)

    def _carefully(self, wanted: Iterator[Found], notes: Notes) -> Iterator[partitions.Row]:
        """One image after the other, each noted first: who kills a worker is known, and passed over in the end."""
        for i, found in enumerate(wanted):
            if notes.deaths(i) >= DEATHS:
                reason = "the worker that inspected it died, more than once; look at the image"
                yield self._row(found, ImageError(f"{found.name}: {reason}"))
                continue
            notes.begin(i)
            try:
                outcome = next(self.detector.inspect_named([(found.name, found.data)], category=self.plan.category))
            except Exception as error:
                reason = f"could not be inspected ({type(error).__name__}: {error}); look at the image"
                outcome = ImageError(f"{found.name}: {reason}")
            yield self._row(found, outcome)
        notes.begin(None)

    def _row(self, found: Found, outcome: Result | ImageError) -> partitions.Row:
        return partitions.row_of(found, outcome, self.digest)


def notes_of(partition: int) -> str:
    """The file of `Notes`."""
    return f"{OWN}/doing-{partition:05d}.json"


class Notes:
    """What is known of earlier attempts at a partition that came to no end, in a file of the store."""

    def __init__(self, store: Store, partition: int) -> None:
        self._me = {"host": socket.gethostname(), "pid": os.getpid()}
        self._store, self._name = store, notes_of(partition)
        try:
            noted = json.loads(store.read(self._name))
        except (FileNotFoundError, ValueError):
            noted = None
        self.careful = noted is not None
        self._noted: dict[str, int] = {} if noted is None else noted["deaths"]
        if noted is not None and noted["doing"] is not None:
            self._count(noted["doing"])
        elif noted is not None:
            self._count(-1)
        if self.deaths(-1) >= BEGINNINGS:
            self.forget()
            raise RuntimeError(f"its worker died {BEGINNINGS} times before the first image; is there memory enough?")
        self.begin(None)

    def _count(self, image: int) -> None:
        self._noted[str(image)] = self.deaths(image) + 1

    def deaths(self, image: int) -> int:
        return self._noted.get(str(image), 0)

    def begin(self, doing: int | None) -> None:
        self._store.write(self._name, json.dumps(self._me | {"doing": doing, "deaths": self._noted}).encode())

    def forget(self) -> None:
        self._store.remove(self._name)
