"""Experiments: the runs of a grid, each in a process of its own, into a log and tables.

A run does what `unflaw train` and `unflaw evaluate` do, from files: so its time and memory are those that a user has,
and one that fails ends no other. A finished run is a line of `runs.jsonl`, under a digest of everything that decides
its figures, and a file in `images/` for confidence intervals. It is never done again.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unflaw.config import Weights
from unflaw.experiments.grid import Run
from unflaw.experiments.processes import ChildProcess, TaskError
from unflaw.experiments.records import KEPT, Latency, Log, Record, images_file
from unflaw.io.files import write_text
from unflaw.io.words import count

if TYPE_CHECKING:
    from unflaw.detector import Detector
    from unflaw.io.progress import Progress

BATCH = 32


def run_experiment(runs: Sequence[Run], out: Path, progress: Progress) -> tuple[list[Record], dict[str, str]]:
    """Does the runs that are not in `out/runs.jsonl` yet; the tables in `out` are written anew after each.

    Args:
        runs: From `plan`.
        out: Folder for the results.
        progress: Called as `progress("runs", done, total, None)`, where the total counts the runs that were left to do,
            and with the stages of each run.

    Returns:
        The records of all finished runs, and the errors of those that failed, by name of the run.

    Raises:
        ValueError: `out` cannot be used. InUseError: Another experiment writes to it. ImportError: pandas or Jinja2 is
            not installed.
    """
    failed: dict[str, str] = {}
    with Log(out / "runs.jsonl", Record) as log:
        write_tables(out, runs, log.records)
        left = [run for run in runs if run.digest not in log.records]
        for done, run in enumerate(left):
            progress("runs", done, len(left), None)
            if run.digest in log.records:  # another variant has the same settings
                continue
            try:
                log.append(_in_own_process(run, out, progress))
            except TaskError as error:
                failed[run.name] = str(error)
            write_tables(out, runs, log.records)
        progress("runs", len(left), len(left), None)
        return [log.records[run.digest] for run in runs if run.digest in log.records], failed


def write_tables(out: Path, runs: Sequence[Run], records: Mapping[str, Record]) -> None:
    """Writes `table.md`, `table.csv`, `table.json`, `table.tex` and `table.html`, each whole or as it was before.

    Args:
        out: Folder of the experiment.
        runs: All runs of the plan, finished or not.
        records: Records of the finished ones, by digest.

    Raises:
        OSError: `out` cannot be written. ImportError: pandas or Jinja2 is not installed.
    """
    from unflaw.experiments import tables
    from unflaw.experiments.page import page

    samples, about = tables.bootstrap(runs, records, out), tables.describe(runs, records)
    table, pairs = tables.summarize(tables.by_run(runs, records), samples), tables.differences(samples)
    parts, preamble = tables.sections(table, pairs), tables.preamble(about)
    content = about | {"rows": tables.nested(table), "differences": pairs}
    files = {
        "html": page(parts, preamble),
        "tex": tables.latex(table),
        "json": json.dumps(content, indent=2, ensure_ascii=False) + "\n",
        "csv": tables.comma_separated(table.reset_index()),
        "md": tables.markdown(parts, preamble),
    }
    for suffix, text in files.items():
        write_text(out / f"table.{suffix}", text)


def _in_own_process(run: Run, out: Path, progress: Progress) -> Record:
    with closing(ChildProcess(measure)) as child:
        record: Record = child(run, out, progress=progress)
        return record


def measure(run: Run, out: Path, progress: Progress) -> Record:
    """Trains, saves, evaluates and times a detector; writes `out/images/<digest>.npz`.

    Raises:
        TrainingError, WeightsError, ValueError, OSError: As `Detector.fit`, `evaluate` and `PerImage.save`.
    """
    found = _measure_peer(run, progress) if run.peer else _measure_ours(run, progress)
    evaluation = found.pop("evaluation")
    evaluation.images.save(images_file(out, run.digest))
    return Record(
        digest=run.digest,
        data=run.dataset.name,
        method=run.method,
        variant=run.variant.name,
        overrides=run.variant.overrides,
        backbone=run.backbone,
        size=run.size,
        seed=run.seed,
        weights=Weights.name_of(run.weights, short=True),
        settings=run.settings,
        metrics={name: evaluation.metrics.get(name) for name in KEPT},
        **found,
    )


def _measure_ours(run: Run, progress: Progress) -> dict[str, Any]:
    from unflaw.detector import Detector
    from unflaw.evaluation.evaluate import evaluate
    from unflaw.experiments.feature_store import ExperimentRunner

    started = time.perf_counter()
    if run.features:
        detector = ExperimentRunner(run.features, run.weights).fit(run.config, run.dataset, progress=progress)
        started = time.perf_counter() - detector.record_["seconds"]["total"]
    else:
        detector = Detector(config=run.config, weights=run.weights).fit(run.dataset, progress=progress)
    with tempfile.TemporaryDirectory(prefix="unflaw-benchmark-") as folder:
        file = Path(folder) / "detector.safetensors"
        detector.save(file)
        seconds, size = time.perf_counter() - started, file.stat().st_size
    memory = None if run.features else peak_memory()
    evaluation = evaluate(detector, run.dataset, shown=0, spool=True, progress=progress)
    fitted = detector.record_
    unreadable = {path for path, _ in evaluation.skipped}
    paths = [sample.path for sample in run.dataset.test if str(sample.path) not in unreadable]
    return {
        "evaluation": evaluation,
        "skipped": dict([*fitted["skipped"], *evaluation.skipped]),
        "seconds": {"training": seconds, "metrics": evaluation.metrics["timing"]["metric_seconds"]},
        "memory": memory,
        "file": size,
        "latency": {} if run.features else latencies(detector, paths),
        "shared": run.features is not None,
        **{name: fitted[name] for name in ("machine", "unflaw", "torch")},
    }


def _measure_peer(run: Run, progress: Progress) -> dict[str, Any]:
    from unflaw._version import __version__
    from unflaw.peers import run_peer

    assert run.peer is not None
    assert not isinstance(run.weights, Mapping)  # `plan` refuses several backbones
    method, options, python = run.peer
    done = run_peer(
        python,
        method,
        run.dataset,
        run.config.preparation,
        backbone=run.backbone,
        weights=run.weights,
        seed=run.seed,
        options=options,
        spool=True,
        progress=progress,
    )
    record = done.record
    return {
        "evaluation": done.evaluation,
        "skipped": dict(done.evaluation.skipped),
        "seconds": {"training": record["seconds_training"]},
        "memory": record["peak_bytes"],
        "latency": {"1": record["seconds_per_image"]},
        "machine": f"{platform.machine()}, {count(record['threads'], 'thread')}",
        "unflaw": f"{__version__}, anomalib {record['anomalib']}",
        "torch": record["torch"],
    }


def peak_memory() -> int | None:
    """Largest resident size of this process so far, in bytes; None where the system does not report it."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike `ru_maxrss` it never counts the process that this one was forked from
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line[:6] == "VmHWM:")
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def latencies(detector: Detector, paths: Sequence[Path], singles: int = 40, batches: int = 4) -> dict[str, Latency]:
    """ "1": one image after the other; "32": batches that are decoded ahead. The first images are not counted."""
    endless = cycle(paths)
    single = _seconds(lambda: detector.inspect(next(endless)), singles + 3)[3:]
    results = detector.inspect_many(islice(endless, BATCH * (batches + 1)), batch=BATCH)
    batch = _seconds(lambda: list(islice(results, BATCH)), batches + 1)[1:] / BATCH
    return {
        name: Latency(median=float(np.median(times)), p95=float(np.quantile(times, 0.95)))
        for name, times in (("1", single), (str(BATCH), batch))
    }


def _seconds(call: Callable[[], object], times: int) -> np.ndarray:
    """Wall seconds of each call, (times,)."""
    stamps = [time.perf_counter()]
    for _ in range(times):
        call()
        stamps.append(time.perf_counter())
    return np.diff(stamps)
