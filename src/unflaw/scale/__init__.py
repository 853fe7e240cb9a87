"""Inspection of millions of images with Ray: folders, Parquet or tar shards in, Parquet out; see docs/scaling.md."""

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

MAX_ERRORS = 20  # failed partitions after which a run ends: a full disk would fail them all


@dataclass
class Totals:
    """Outcome of a run, including the earlier runs that it resumed.

    Attributes:
        partitions: Number of partitions in the plan.
        before: Number of partitions that were finished before.
        finished: Number of partitions that are finished now.
        counts: Number of images that are "good", "review", "defect" or "failed".
        errors: Reason for each unfinished partition, by number.
        notes: Sentences about the inputs.
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
    """Inspect images with a pool of workers and write `output/part-00000.parquet` and so on.

    Finished partitions are not processed again, so the same call resumes the run after any interruption. The columns
    are those of `partitions.schema`; images that cannot be read have rows too.

    Args:
        model: Detector file. It is loaded here first and then sent to the workers.
        inputs: Folders, images, .parquet files, .tar shards, patterns of these; local paths or URLs.
        output: Folder or URL that this process and all workers reach. One run at a time writes to it.
        category: Category of the images, for a detector of several categories.
        address: Address of Ray, see `on_ray.running`.
        workers: Number of workers; None: as many as the processors of Ray allow.
        threads: Computing threads of each worker.
        partition: Maximum number of images in a partition. A shard is always one partition.
        column: Table column that holds the images (bytes or paths), or their extension in shards.
        retry: Inspect failed images of finished partitions again, such as repaired ones.
        progress: Called as partitions finish.

    Raises:
        DetectorError: See `unflaw.load` and `BasePredictor.select`. StoreError: The output is in use or holds results
            of another run. ValueError: There are no such inputs; see also `on_ray.running` and `on_ray.run`.
            ImportError: Ray is not installed.
    """
    import unflaw

    for needed in ("ray", "pyarrow", "fsspec"):
        if find_spec(needed) is None:
            raise ImportError(f"the engine ray needs {needed}; install it with: pip install 'unflaw[ray]'")
    from unflaw.scale import on_ray, partitions, plan
    from unflaw.scale.store import Store

    if threads < 1 or partition < 1 or (workers is not None and workers < 1):
        raise ValueError("workers, threads and images of a partition are numbers from 1")
    files = plan.detector_files(Path(model))
    unflaw.load(model).select(category)
    store = Store(output)
    _check_apart(inputs, store)
    with store.lock():
        store.sweep()
        notes: list[str] = []
        planned = plan.prepare(
            store,
            inputs,
            plan.detector_digest(files),
            size=partition,
            category=category,
            column=column,
            retry=retry,
            notes=notes,
        )
        known = partitions.finished(store)
        totals = Totals(planned.partitions, len(known), notes=notes)
        again = [number for number, counts in known.items() if retry and counts["failed"]]
        work = [*(number for number in range(planned.partitions) if number not in known), *again]
        for number in again:
            del known[number]
        if work:
            progress("partitions", len(known), planned.partitions, None)
            processors = workers * threads if workers else max(os.cpu_count() or 1, threads)
            with on_ray.running(address, processors) as ray:
                results = on_ray.run(ray, store, planned, files, work, workers=workers, threads=threads, retry=retry)
                for result in results:
                    if result.error is None:
                        known[result.partition] = result.counts
                    else:
                        totals.errors[result.partition] = result.error
                    progress("partitions", len(known), planned.partitions, None)
                    if len(totals.errors) >= MAX_ERRORS:
                        break
        totals.finished, totals.counts = len(known), sum(known.values(), Counter())
    return totals


def _check_apart(inputs: Sequence[str], store: Store) -> None:
    """Raises: ValueError: The output lies in an input, so results would change what a resumed run lists."""
    from unflaw.scale.store import is_local, open_filesystem

    for given in inputs:
        fs, path = open_filesystem(given)
        same = type(fs) is type(store.fs) and (store.root + "/").startswith(path.rstrip("/") + "/")
        if same and (not is_local(fs) or not Path(path).is_file()):
            raise ValueError(f"{store.url}: lies in the input {given}; name an --output elsewhere")
