"""Benchmark: methods × data sets × backbones × sizes × seeds, and other tools beside them, into one table.

A run is what `unflaw train` and `unflaw evaluate` do, from files, in a process of its own: so its time and memory are
those that a user has, and one that fails ends no other. A finished run is a line of `runs.jsonl`, under a digest of all
that decides its figures, and a file in `pictures/` for confidence intervals; it is never done again.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unflaw.config import METHODS, Config, applies, make_config
from unflaw.datasets import Dataset
from unflaw.results import METRICS
from unflaw.runs import Finished, Log
from unflaw.variants import written

if TYPE_CHECKING:
    from unflaw.cache import Progress
    from unflaw.detector import Detector

ON_PIXELS = ("draem", "memae")  # have no backbone: they are run once, whatever the backbones
BATCH = 32
KEPT = (*METRICS, "n_images", "n_good", "false_alarms", "missed")


class Grid(BaseModel):
    """What is to be run: every method with every backbone, size and seed on every data set."""

    model_config = ConfigDict(extra="forbid")

    methods: list[str] = ["uranet"]
    data: list[Path] = Field(min_length=1)
    backbones: list[str] = Field([], description="NAME or NAME=WEIGHTS; none: the default one")
    sizes: list[int] = Field([], description="sides in pixels; none: the default one")
    seeds: int = Field(3, ge=1, description="the seeds 0 to seeds - 1")
    profile: str = "cpu"
    settings: dict[str, Any] = Field({}, description="dotted settings, of all methods that have them")
    peers: dict[str, dict[str, Any]] = Field({}, description="methods of anomalib and their options (`peers`)")
    peer_python: Path | None = Field(None, description="interpreter of the environment that has anomalib")


@dataclass(frozen=True)
class Run:
    """A place in the grid; equal digests give equal figures.

    Attributes:
        config: Of a peer, only backbone, preparation and seed count.
        peer: A method of anomalib instead of ours, its options and the interpreter that has anomalib.
    """

    dataset: Dataset
    config: Config
    weights: str | None
    settings: str
    digest: str
    peer: tuple[str, dict[str, Any], Path] | None = None

    @property
    def method(self) -> str:
        return f"anomalib {self.peer[0]}" if self.peer else self.config.method

    @property
    def backbone(self) -> str:
        return "" if self.method in ON_PIXELS else self.config.features.backbone

    @property
    def size(self) -> int:
        return self.config.preparation.size

    @property
    def seed(self) -> int:
        return self.config.training.seed

    @property
    def name(self) -> str:
        backbone = f", {self.backbone}" if self.backbone else ""
        return f"{self.dataset.name}, {self.method}{backbone}, {self.size} pixels, seed {self.seed}"

    @property
    def row(self) -> tuple[str, str, str, int]:
        """Runs that differ by their seeds alone are one row of the table."""
        return self.dataset.name, self.method, self.backbone, self.size


class Latency(BaseModel):
    """Wall seconds per picture, from file to result, warm."""

    median: float
    p95: float


class Record(Finished):
    """A finished run, a line of `runs.jsonl`.

    Attributes:
        digest: Of configuration, data, weights and version.
        data, method, backbone, size, seed: What was run; the backbone of a method on pixels is "".
        weights: Name of the backbone's weight file, or "default".
        settings: What was changed for the whole grid.
        metrics: KEPT; None where undefined.
        skipped: Pictures that could not be read, and why.
        seconds: "training", from files to saved detector (of a peer: from prepared pictures on), and "metrics".
        memory: Largest resident size of the training process, bytes, that of the libraries included; None where the
            system does not tell.
        file: Size of the detector file, bytes.
        latency: By batch, "1" and "32".
        machine: Processor architecture and threads.
        unflaw, torch: Versions.
    """

    data: str
    method: str
    backbone: str
    size: int
    seed: int
    weights: str
    settings: str
    metrics: dict[str, int | float | None]
    skipped: dict[str, str]
    seconds: dict[str, float]
    memory: int | None
    file: int | None
    latency: dict[str, Latency]
    machine: str
    unflaw: str
    torch: str


def read_grid(path: Path | None, changes: dict[str, Any]) -> Grid:
    """A grid from a YAML file, if any, and what was said on the command line, which goes before it.

    Paths in the file are relative to its folder.

    Raises:
        ValueError: Not readable, or a field that is unknown or has a wrong value.
    """
    import yaml

    try:
        found = {} if path is None else yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read as YAML ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must hold fields such as `methods: [uranet, mfrnet]`")
    if path is not None:
        for field in ("data", "backbones"):
            if isinstance(found.get(field), list):
                found[field] = [_beside(path.parent, str(value)) for value in found[field]]
    try:
        return Grid.model_validate(found | changes)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        hint = f"; there are {', '.join(Grid.model_fields)}" if first["type"] == "extra_forbidden" else ""
        missing = "; name data sets with --data" if first["loc"] == ("data",) else ""
        source = f"{path}: " if path and where not in changes else ""
        raise ValueError(f"{source}{where}: {first['msg']}{hint}{missing}") from error


def _beside(folder: Path, text: str) -> str:
    """`PATH` or `NAME=PATH` with the path as seen from here."""
    name, equals, path = text.rpartition("=")
    if "/" not in path and not (folder / path).exists():
        return text  # the name of a backbone
    return f"{name}{equals}{folder / path}"


def plan(grid: Grid, datasets: Sequence[Dataset]) -> list[Run]:
    """All runs of a grid in the order of the table, seeds last. That each can work is checked.

    Raises:
        ValueError, WeightsError, OSError: Settings, weights or data that cannot be used.
    """
    from unflaw.experiment import Laboratory

    for dataset in datasets:
        if not (dataset.train and dataset.test):
            lacking = "test" if dataset.train else "good training"
            raise ValueError(f"{dataset.name}: there are no {lacking} pictures; a benchmark needs both")
    if unknown := [method for method in grid.methods if method not in METHODS]:
        raise ValueError(f"unknown method {unknown[0]!r}; there are {', '.join(METHODS)}")
    if not (grid.methods or grid.peers):
        raise ValueError("methods: there is nothing to run; name a method or a peer")
    if grid.peers:
        _check_peers(grid)
    # a setting that only some of the methods have is theirs alone; one that none has is an error below
    some = {name for name in grid.settings if any(applies(name, method) for method in grid.methods)}
    settings = {m: {n: v for n, v in grid.settings.items() if n not in some or applies(n, m)} for m in grid.methods}
    runs: dict[tuple[Any, ...], Run] = {}
    laboratories: dict[str, Laboratory] = {}
    backbones = [backbone.partition("=")[::2] for backbone in grid.backbones] or [("", "")]
    for dataset, method in product(datasets, [*grid.methods, *grid.peers]):
        peer = None if method in METHODS else method
        for (name, weights), size in product([("", "")] if method in ON_PIXELS else backbones, grid.sizes or [0]):
            laboratory = laboratories.setdefault(weights, Laboratory(Path(), weights or None))
            for seed in range(grid.seeds):
                changes = {} if peer else dict(settings[method])
                changes |= {"training.seed": seed}
                changes |= {"features.backbone": name} if name else {}
                changes |= {"preparation.size": size} if size else {}
                config = make_config("lookup" if peer else method, "cpu" if peer else grid.profile, changes)
                digest, of, given = laboratory.digest(config, dataset), None, written(settings.get(method, {}))
                if peer:
                    assert grid.peer_python is not None
                    of, given = (peer, grid.peers[peer], grid.peer_python), written(grid.peers[peer])
                    digest = hashlib.sha256(json.dumps([digest, *of[:2]], sort_keys=True).encode()).hexdigest()
                run = Run(dataset, config, weights or None, given, digest, of)
                runs[run.row + (seed,)] = run  # noqa: RUF005 - unpacking in a subscript needs Python 3.11
    return list(runs.values())


def _check_peers(grid: Grid) -> None:
    from unflaw.peers import INSTALL, LEVELS

    if unknown := [peer for peer in grid.peers if peer not in LEVELS]:
        raise ValueError(f"unknown peer {unknown[0]!r}; there are {', '.join(LEVELS)}")
    if grid.peer_python is None:
        raise ValueError(f"peers need --peer-python, an interpreter that has anomalib; to make one: {INSTALL}")
    if not grid.peer_python.is_file():
        raise ValueError(f"{grid.peer_python}: there is no such interpreter; to make one: {INSTALL}")


def benchmark(runs: Sequence[Run], out: Path, progress: Progress) -> tuple[list[Record], dict[str, str]]:
    """Does the runs that are not in `out/runs.jsonl` yet; the tables in `out` are made anew after each.

    Args:
        runs: From `plan`.
        out: Folder for the results.
        progress: Called as `progress("runs", done, total, None)`, where the total is what was left to do, and with the
            stages of each run.

    Returns:
        The records of all finished runs, and why others failed, by the name of the run.

    Raises:
        ValueError: `out` cannot be used.
    """
    from unflaw.leaderboard import write_tables

    log = Log(out / "runs.jsonl", Record)
    failed: dict[str, str] = {}
    write_tables(out, runs, log.records)
    left = [run for run in runs if run.digest not in log.records]
    for done, run in enumerate(left):
        progress("runs", done, len(left), None)
        if run.digest in log.records:
            continue
        try:
            log.append(_in_own_process(run, out, progress))
        except RunError as error:
            failed[run.name] = str(error)
        write_tables(out, runs, log.records)
    progress("runs", len(left), len(left), None)
    return [log.records[run.digest] for run in runs if run.digest in log.records], failed


class RunError(RuntimeError):
    """A run that failed; the others go on."""


def _in_own_process(run: Run, out: Path, progress: Progress) -> Record:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(run, out, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            kind, content = ours.recv()
            if kind == "progress":
                progress(*content)
            elif kind == "failed":
                raise RunError(content)
            else:
                return Record.model_validate_json(content)
    except EOFError:
        process.join()
        hint = "; most likely out of memory" if process.exitcode == -signal.SIGKILL else ""
        raise RunError(f"its process ended with exit code {process.exitcode}{hint}") from None
    finally:
        ours.close()
        process.kill()  # what it had to say is said, or nobody waits for it any more
        process.join()


def _work(run: Run, out: Path, pipe: Connection) -> None:
    """In the process of a run: what it gives, or why it fails, goes into the pipe."""
    # an interruption is the parent's to handle; not SIG_IGN, which the process of a peer would inherit
    signal.signal(signal.SIGINT, lambda *_: None)
    last = 0.0

    def progress(*content: Any) -> None:
        nonlocal last
        if time.monotonic() - last > 0.1 or content[1] == content[2]:
            last = time.monotonic()
            pipe.send(("progress", content))

    try:
        pipe.send(("done", measure(run, out, progress).model_dump_json()))
    except Exception as error:  # whatever it is, it is reported, and the grid goes on
        pipe.send(("failed", f"{type(error).__name__}: {error}"))


def measure(run: Run, out: Path, progress: Progress) -> Record:
    """Trains, saves, evaluates and times a detector; writes `out/pictures/<digest>.npz`.

    Raises:
        TrainingError, WeightsError, ValueError, OSError: As `Detector.fit`, `evaluate` and `PerPicture.save`.
    """
    found = _measure_peer(run, progress) if run.peer else _measure_ours(run, progress)
    evaluation = found.pop("evaluation")
    evaluation.pictures.save(pictures_file(out, run.digest))
    return Record(
        digest=run.digest,
        data=run.dataset.name,
        method=run.method,
        backbone=run.backbone,
        size=run.size,
        seed=run.seed,
        weights=Path(run.weights).name if run.weights else "default",
        settings=run.settings,
        metrics={name: evaluation.metrics.get(name) for name in KEPT},
        **found,
    )


def _measure_ours(run: Run, progress: Progress) -> dict[str, Any]:
    from unflaw.detector import Detector
    from unflaw.evaluation import evaluate

    started = time.perf_counter()
    detector = Detector(config=run.config, weights=run.weights).fit(run.dataset, progress=progress)
    with tempfile.TemporaryDirectory(prefix="unflaw-benchmark-") as folder:
        file = Path(folder) / "detector.safetensors"
        detector.save(file)
        seconds, size = time.perf_counter() - started, file.stat().st_size
    memory = peak_memory()
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
        "latency": dict(latencies(detector, paths)),
        **{name: fitted[name] for name in ("machine", "unflaw", "torch")},
    }


def _measure_peer(run: Run, progress: Progress) -> dict[str, Any]:
    from unflaw import __version__
    from unflaw.peers import run_peer

    assert run.peer is not None
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
        "file": None,
        "latency": {"1": record["seconds_per_image"]},
        "machine": f"{platform.machine()}, {record['threads']} threads",
        "unflaw": f"{__version__}, anomalib {record['anomalib']}",
        "torch": record["torch"],
    }


def pictures_file(out: Path, digest: str) -> Path:
    """Where the scores and counts of every test picture of a run are kept."""
    return out / "pictures" / f"{digest[:16]}.npz"


def peak_memory() -> int | None:
    """Largest resident size of this process so far, bytes; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike `ru_maxrss` it never counts the process that this one was forked from
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line[:6] == "VmHWM:")
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def latencies(
    detector: Detector, paths: Sequence[Path], singles: int = 40, batches: int = 4
) -> Iterator[tuple[str, Latency]]:
    """("1", …), one picture after the other, and ("32", …), batches that are decoded ahead; the first do not count."""
    endless = cycle(paths)
    times = []
    for path in islice(endless, singles + 3):
        started = time.perf_counter()
        detector.inspect(path)
        times.append(time.perf_counter() - started)
    yield "1", _latency(times[3:])
    results = detector.inspect_many(islice(endless, BATCH * (batches + 1)), batch=BATCH)
    times = []
    for _ in range(batches + 1):
        started = time.perf_counter()
        for _ in range(BATCH):
            next(results)
        times.append((time.perf_counter() - started) / BATCH)
    yield str(BATCH), _latency(times[1:])


def _latency(times: Sequence[float]) -> Latency:
    return Latency(median=float(np.median(times)), p95=float(np.quantile(times, 0.95)))
