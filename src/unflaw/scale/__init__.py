"""Millions of images: from folders, Parquet or shards to partitions of Parquet, with Ray; see docs/scaling.md."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from unflaw.io.progress import Progress, silent

if TYPE_CHECKING:
    from unflaw.scale.store import Store

GIVE_UP = 20  # partitions that fail before a run ends: a full disk would fail them all


@dataclass
class Totals:
    """What came of a run and of those before it that it went on with.

    Attributes:
        counts: Images that are "good", "review", "defect" or "failed".
        partitions: How many the plan has.
        finished: Of these, those that have their file now.
        before: Of these, found finished.
        errors: Why partitions have no file, by their numbers.
        notes: What is to be said of the inputs, a sentence each.
    """

    partitions: int
    before: int
    finished: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    errors: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def predict(
    model: str | Path,
    inputs: Sequence[str],
    output: str,
    *,
    category: str | None = None,
    address: str | None = None,
    workers: int | None = None,
    threads: int = 1,
    partition: int = 256,
    column: str | None = None,
    retry: bool = False,
    progress: Progress = silent,
) -> Totals:
    """Inspects many images with a pool of workers and writes `output/part-00000.parquet` and so on.

    A partition is finished when its file is there; what is finished is not done again, so that the same call goes on
    after any interruption. Columns are those of `partitions.schema`; an image that cannot be read has a row too.

    Args:
        model: A detector file. It is loaded here first, and sent to the workers.
        inputs: Folders, images, .parquet files, .tar shards, patterns of these; local or by URL.
        output: A folder or a URL that this process and all workers reach. One run at a time.
        category: Of what the images show, for a detector of several categories.
        address: Of Ray (see `on_ray.running`).
        workers: How many; by default as many as Ray has processors for.
        threads: That compute, in each.
        partition: Images of one at most. A shard is one by itself.
        column: Of a table, what holds the images (bytes or paths); of shards, their extension.
        retry: Do failed images of finished partitions anew; what they are read from may have been mended.
        progress: Is told of finished partitions.

    Raises:
        DetectorError: As `unflaw.load` and `BasePredictor.select`. StoreError: The output holds the results of another
            run, or is in use. ValueError: No such inputs, or as `on_ray.running` and `on_ray.run`. ImportError: Ray is
            not installed.
    """
    import unflaw

    for needed in ("ray", "pyarrow", "fsspec"):  # before the work
        if find_spec(needed) is None:
            raise ImportError(f"the engine ray needs {needed}; install it with: pip install 'unflaw[ray]'")
    from unflaw.scale import on_ray
    from unflaw.scale import partitions as files
    from unflaw.scale import plan as plans
    from unflaw.scale.store import Store

    if threads < 1 or partition < 1 or (workers is not None and workers < 1):
        raise ValueError("workers, threads and images of a partition are numbers from 1")
    data = plans.detector_files(Path(model))
    unflaw.load(model).select(category)
    store = Store(output)
    _apart(inputs, store)
    with store.lock():
        store.sweep()
        notes: list[str] = []
        plan = plans.prepare(
            store,
            inputs,
            plans.detector_digest(data),
            size=partition,
            category=category,
            column=column,
            retry=retry,
            notes=notes,
        )
        there = files.finished(store)
        known = files.counts(store, there)
        left = sorted(set(range(plan.partitions)) - known.keys())
        again = [number for number in there if retry and known[number]["failed"]]
        totals = Totals(plan.partitions, len(there), notes=notes)
        for number in again:
            del known[number]
        if left or again:
            progress("partitions", len(known), plan.partitions, None)
            processors = workers * threads if workers else max(os.cpu_count() or 1, threads)
            with on_ray.running(address, processors) as engine:
                options = {"threads": threads, "retry": retry}
                for done in on_ray.run(engine, store, plan, data, [*left, *again], workers, options):
                    if done.error is None:
                        known[done.partition] = done.counts
                    else:
                        totals.errors[done.partition] = done.error
                    progress("partitions", len(known), plan.partitions, None)
                    if len(totals.errors) >= GIVE_UP:
                        break
        totals.finished, totals.counts = len(known), sum(known.values(), Counter())
    return totals


def _apart(inputs: Sequence[str], store: Store) -> None:
    """Raises: ValueError: The output lies in an input, whose images would be other ones the next time."""
    from unflaw.scale.store import is_local, opened

    for given in inputs:
        fs, path = opened(given)
        same = type(fs) is type(store.fs) and (store.root + "/").startswith(path.rstrip("/") + "/")
        if same and (not is_local(fs) or not Path(path).is_file()):
            raise ValueError(f"{store.url}: lies in the input {given}; name an --output elsewhere")
