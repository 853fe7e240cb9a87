"""A detector for each category in a folder, trained in parallel by processes of this machine or a Ray cluster.

Each worker loads the backbone once. Features of a category are computed once and stored in a folder that all workers
share, up to a total size (`feature_store.ExperimentRunner`); training with another method, seed or setting uses them
again. A finished detector has a line in `fleet.jsonl` with a digest of everything it depends on, and is not trained
again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from unflaw.config import Config, WeightSource
from unflaw.datasets import Dataset, DatasetError, load_dataset
from unflaw.datasets.layouts import layout_of
from unflaw.datasets.samples import images, sha256, sha256_if_readable, subfolders
from unflaw.experiments.processes import ChildProcess, TaskError
from unflaw.experiments.records import Finished, Log
from unflaw.experiments.tables import comma_separated, markdown_table, pandas, short
from unflaw.io.files import write_text
from unflaw.io.progress import Progress, silent

if TYPE_CHECKING:
    from unflaw.experiments.feature_store import ExperimentRunner

METRICS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "aupro_30": "AUPRO"}
COUNTS = ("n_good", "false_alarms", "n_images", "missed")


@dataclass(frozen=True)
class Task:
    """A detector to train.

    Attributes:
        category: Name of its folder.
        file: Path to write it to.
        finished: Digest of the existing detector; None: there is none.
    """

    category: str
    dataset: Dataset
    config: Config
    file: Path
    finished: str | None


class Record(Finished):
    """A finished detector, a line of `fleet.jsonl`.

    Attributes:
        digest: Digest of category, configuration, data, weights and version.
        category: Name of its folder.
        file, size, content: Detector file: path relative to the folder of the fleet, bytes, and SHA-256.
        good_images, held_out: Number of good images, and of those among them that were held out.
        guarantee: Description of the false-alarm rate.
        metrics: METRICS and COUNTS on its test images; empty where there are none, None where undefined.
        skipped: Reason for each image that could not be read.
        seconds: Features, training, calibration and evaluation together.
    """

    category: str
    file: str
    size: int
    good_images: int
    held_out: int
    guarantee: str
    metrics: dict[str, int | float | None]
    skipped: dict[str, str]
    seconds: float
    content: str = ""


@dataclass(frozen=True)
class WorkerConfig:
    """Settings of a worker: folder and bytes of the features, weights of the backbone, and its threads."""

    cache: Path
    limit: float | None
    weights: WeightSource
    threads: int


class TrainingWorker(Protocol):
    """Trains one detector after another."""

    def train(self, task: Task) -> Record | None:
        """Returns the record; None if the detector `task.finished` is up to date. Raises TaskError."""

    def close(self) -> None:
        """Ends the worker."""


def members(root: Path) -> tuple[dict[str, Dataset], dict[str, str]]:
    """Loads the data sets in a folder of categories, in any layout of `load_dataset`, or folders of good images.

    Returns:
        Data sets by folder name, and the reasons why other folders cannot be used.

    Raises:
        DatasetError: There is no category, or the folder is a data set itself.
    """
    if not root.is_dir():
        raise DatasetError(f"{root}: there is no such folder; name the one that holds a folder for each category")
    if layout_of(root) or any(path.parent == root for path in images(root)):
        raise DatasetError(f"{root}: is one data set; `unflaw train` makes its detector, or name the folder above it")
    found, failed = {}, {}
    for folder in subfolders(root):
        if not (layout_of(folder) or images(folder)):
            continue  # such as licences or notes
        try:
            found[folder.name] = load_dataset(folder)
            if not found[folder.name].train:
                raise DatasetError(f"{folder}: there are no good images to train on")
        except DatasetError as error:
            found.pop(folder.name, None)
            failed[folder.name] = str(error)
    if not (found or failed):
        raise DatasetError(f"{root}: there are no folders of images in it; each category needs one")
    return found, failed


def train_fleet(
    data: dict[str, Dataset],
    config: Config,
    out: Path,
    workers: Sequence[TrainingWorker],
    progress: Progress,
    failed: dict[str, str] | None = None,
) -> tuple[list[Record], dict[str, str]]:
    """Trains `out/<category>.safetensors` where it is not up to date, and writes `fleet.md`, `.csv` and `.json`.

    Args:
        data: Data sets by category.
        config: Configuration of all detectors.
        out: Output folder.
        workers: Workers, each of which trains one detector at a time.
        progress: Called as `progress("detectors", done, total, None)`.
        failed: Reasons of categories that are known to fail.

    Returns:
        Records of all finished detectors, sorted by name, and the reasons of failed categories.

    Raises:
        ValueError: `out` cannot be used. InUseError: Another run writes to it.
    """
    pandas()  # fails before the work if it is missing
    failed = dict(failed or {})
    with Log(out / "fleet.jsonl", Record) as log:
        lines = {line.category: line for line in log.records.values() if line.category in data}
        newest = {name: line for name, line in lines.items() if sha256_if_readable(out / line.file) == line.content}
        current: dict[str, Record] = {}
        free: SimpleQueue[TrainingWorker] = SimpleQueue()
        for worker in workers:
            free.put(worker)

        def train(name: str) -> Record | None:
            worker, known = free.get(), newest.get(name)
            task = Task(name, data[name], config, out / f"{name}.safetensors", known.digest if known else None)
            try:
                return worker.train(task) or known
            finally:
                free.put(worker)

        pool = ThreadPoolExecutor(len(workers))
        try:
            # large ones first, so that workers finish at about the same time
            order = sorted(data, key=lambda name: -len(data[name].train))
            waiting = {pool.submit(train, name): name for name in order}
            progress("detectors", 0, len(order), None)
            for done, future in enumerate(as_completed(waiting), 1):
                name = waiting[future]
                try:
                    record = future.result()
                    assert record is not None
                    current[name] = record
                    if record is not newest.get(name):
                        log.append(record)
                except TaskError as error:
                    failed[name] = str(error)
                progress("detectors", done, len(order), None)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        records = [current[name] for name in sorted(current)]
        found = rows(records, failed)
        write_text(out / "fleet.md", summary(records, failed))
        write_text(out / "fleet.csv", comma_separated(pandas().DataFrame(found, dtype=object)))
        write_text(out / "fleet.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        return records, failed


class Worker:
    """Worker in this process. It loads the backbone with the first detector and uses it for all."""

    def __init__(self, worker_config: WorkerConfig) -> None:
        self.worker_config = worker_config
        self.runner: ExperimentRunner | None = None

    def train(self, task: Task, progress: Progress = silent) -> Record | None:
        try:
            return self._train(task, progress)
        except Exception as error:  # any failure is reported, and the other detectors are trained
            raise TaskError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        pass

    def _train(self, task: Task, progress: Progress) -> Record | None:
        import torch

        from unflaw.evaluation.evaluate import evaluate
        from unflaw.experiments.feature_store import ExperimentRunner

        if self.runner is None:
            given = self.worker_config
            torch.set_num_threads(given.threads)
            self.runner = ExperimentRunner(given.cache, given.weights, given.limit)
        started, dataset = time.perf_counter(), task.dataset
        digest = self.runner.digest(task.config, dataset, task.category)
        if digest == task.finished:
            return None
        detector = self.runner.fit(task.config, dataset, progress=progress)
        metrics, skipped = {}, dict(detector.record_["skipped"])
        if dataset.test:
            found = evaluate(detector, dataset, shown=0, progress=progress)
            metrics = {name: found.metrics.get(name) for name in (*METRICS, *COUNTS)}
            skipped |= dict(found.skipped)
        task.file.parent.mkdir(parents=True, exist_ok=True)
        detector.save(task.file)  # last, so that an interruption before leaves the file of the old record
        return Record(
            digest=digest,
            category=task.category,
            file=task.file.name,
            size=task.file.stat().st_size,
            good_images=detector.record_["good_images"],
            held_out=detector.record_["held_out"],
            guarantee=detector.select().describe(),
            metrics=metrics,
            skipped=skipped,
            seconds=round(time.perf_counter() - started, 2),
            content=sha256(task.file),
        )


class ProcessWorker:
    """Worker in a process of this machine, which is replaced if it dies, such as out of memory."""

    def __init__(self, worker_config: WorkerConfig) -> None:
        self.child = ChildProcess(Worker(worker_config).train, ", fewer --workers need less")

    def train(self, task: Task) -> Record | None:
        record: Record | None = self.child(task)
        return record

    def close(self) -> None:
        self.child.close()


class RayWorker:
    """Worker in an actor of a Ray cluster, whose machines must share the paths of data, features and detectors."""

    def __init__(self, worker_config: WorkerConfig) -> None:
        import ray

        self.worker_config, self.kind = worker_config, ray.remote(num_cpus=worker_config.threads)(Worker)
        self.actor: Any = None

    def train(self, task: Task) -> Record | None:
        import ray

        self.actor = self.actor or self.kind.remote(self.worker_config)
        try:
            record: Record | None = ray.get(self.actor.train.remote(task))
            return record
        except ray.exceptions.RayTaskError as error:
            raise TaskError(str(error.cause)) from None
        except ray.exceptions.RayError as error:
            self.actor = None
            raise TaskError(f"its worker was lost ({type(error).__name__})") from None

    def close(self) -> None:
        import ray

        if self.actor is not None:
            ray.kill(self.actor)


@contextmanager
def training_workers(
    worker_config: WorkerConfig, count: int, engine: str = "processes", address: str | None = None
) -> Iterator[list[TrainingWorker]]:
    """Yields workers and closes them after the block.

    Args:
        worker_config: Settings of all workers.
        count: Number of workers.
        engine: "processes" of this machine, or "ray".
        address: Address of a running Ray cluster; None: one is started on this machine for the block.

    Raises:
        ImportError: Ray is not installed. ValueError: No cluster answers at that address, or it is too small.
    """
    with ExitStack() as stack:
        if engine == "ray":
            if find_spec("ray") is None:
                raise ImportError("the engine ray needs ray; install it with: pip install 'unflaw[ray]'")
            from unflaw.scale.on_ray import running

            ray = stack.enter_context(running(address, count * worker_config.threads))
            there = int(ray.cluster_resources().get("CPU", 0))
            if count * worker_config.threads > there:  # otherwise an actor would wait for processors forever
                raise ValueError(
                    f"--workers {count} with --threads {worker_config.threads} are more than the {there} processors "
                    "that Ray has; ask for less, or give Ray more"
                )
        kind: type[RayWorker | ProcessWorker] = RayWorker if engine == "ray" else ProcessWorker
        workers: list[TrainingWorker] = [kind(worker_config) for _ in range(count)]
        for worker in workers:
            stack.callback(worker.close)
        yield workers


def shares(count: int | None, threads: int | None, most: int) -> tuple[int, int]:
    """Number of workers, at most `most`, and threads of each; by default all processors are used."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = max(1, min(count or processors // (threads or 1), most))
    return count, threads or max(1, processors // count)


def rows(records: Sequence[Record], failed: dict[str, str]) -> list[dict[str, Any]]:
    """A row for each category, failed ones last."""
    done = [
        {"category": record.category, "good": record.good_images, "calibrating": record.held_out}
        | {name: record.metrics.get(name) for name in (*METRICS, *COUNTS)}
        | {"seconds": record.seconds, "bytes": record.size, "guarantee": record.guarantee, "error": None}
        for record in records
    ]
    empty = dict.fromkeys(done[0] if done else ("category", "error"))
    return done + [empty | {"category": name, "error": reason} for name, reason in sorted(failed.items())]


def summary(records: Sequence[Record], failed: dict[str, str]) -> str:
    """The fleet as a table in Markdown."""
    lines = []
    for record in records:
        found, line = record.metrics, {"category": record.category, "good images": str(record.good_images)}
        line |= {head: short(value) for name, head in METRICS.items() if (value := found.get(name)) is not None}
        if found:
            line["false alarms"] = f"{found['false_alarms']} of {found['n_good']}"
            line["missed"] = f"{found['missed']} of {(found['n_images'] or 0) - (found['n_good'] or 0)}"
        line |= {"seconds": f"{record.seconds:.1f}", "MB": f"{record.size / 1e6:.1f}", "guarantee": record.guarantee}
        lines.append(line)
    lines += [
        {"category": name, "guarantee": " ".join(f"failed: {reason}".split())}
        for name, reason in sorted(failed.items())
    ]
    heads = ["category", "good images", *METRICS.values(), "false alarms", "missed", "seconds", "MB", "guarantee"]
    return markdown_table(pandas().DataFrame(lines, columns=heads, dtype=object).fillna("–"))
