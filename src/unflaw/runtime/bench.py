"""How long an inspection takes, by stage: for detectors trained and exported, side by side."""

from __future__ import annotations

import io
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unflaw.imaging.reading import read
from unflaw.imaging.transforms import prepare
from unflaw.inference.base import BasePredictor

WARM = 3  # rounds that do not count
COMPUTED = ("backbone", "method", "map and layers")  # what `compute` is made of, where that can be told


@dataclass
class Stage:
    """Milliseconds per image, a value for each round: on the clock, and of all processor cores together."""

    clock: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def add(self, clock: float, processor: float) -> None:
        self.clock.append(clock)
        self.processor.append(processor)


@contextmanager
def pieces(detector: BasePredictor, category: str | None = None) -> Iterator[Mapping[str, list[float]]]:
    """Seconds (clock, processor) that pass in backbone and method of a trained detector, added up; else nothing."""
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    if not hasattr(detector, "network_of"):
        yield spent
        return
    network = detector.network_of(category)
    handles = []
    for name, module in (("backbone", network.features), ("method", network)):
        started: list[tuple[float, float]] = []

        def enter(*_: Any, started: list[tuple[float, float]] = started) -> None:
            started.append(_now())

        def leave(*_: Any, started: list[tuple[float, float]] = started, name: str = name) -> None:
            before = started.pop()
            spent[name] = [total + after - b for total, after, b in zip(spent[name], _now(), before, strict=True)]

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def measure(
    detector: BasePredictor, sources: Sequence[Path | bytes], *, batch: int, rounds: int, category: str | None = None
) -> dict[str, Stage]:
    """Stages of `batch` images computed together, over `rounds` rounds that take the sources in turn.

    "decode" and "prepare" are one image after the other; "compute" is the network or graph, and its pieces where the
    detector is a trained one; "inspect" is `BasePredictor.inspect`, all of that and the decisions.
    """
    name, preparation = detector.category(category), detector.config.preparation
    stages: dict[str, Stage] = defaultdict(Stage)
    endless = cycle(sources)
    for number in range(rounds + WARM):
        chosen = list(islice(endless, batch))
        found: dict[str, tuple[float, float]] = {}
        decoded, found["decode"] = _timed(list, map(read, chosen))
        images, found["prepare"] = _timed(list, (prepare(image, preparation) for image in decoded))
        with pieces(detector, name) as spent:
            _, found["compute"] = _timed(detector.compute, images, name)
        for piece, (clock, processor) in spent.items():
            found[piece] = clock, processor
        if spent:
            rest = (found["compute"][i] - sum(seconds[i] for seconds in spent.values()) for i in (0, 1))
            found[COMPUTED[-1]] = next(rest), next(rest)
        if batch == 1:
            _, found["inspect"] = _timed(partial(detector.inspect, chosen[0], category=category))
        if number >= WARM:
            for stage, (clock, processor) in found.items():
                stages[stage].add(clock / batch * 1e3, processor / batch * 1e3)
    return dict(stages)


def throughput(detector: BasePredictor, paths: Sequence[Path], images: int, category: str | None = None) -> float:
    """Images per second of `inspect_many`, which reads the next ones while it computes."""
    started = time.perf_counter()
    for _ in detector.inspect_many(list(islice(cycle(paths), images)), category=category):
        pass
    return images / (time.perf_counter() - started)


def made_up(count: int = 8, side: int = 1024) -> list[bytes]:
    """Images to measure with where none are given: JPEG files of smooth noise, side×side."""
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def rows(name: str, batch: int, stages: Mapping[str, Stage]) -> list[str]:
    """A line of a Markdown table for each stage."""
    return [
        f"| {name} | {batch} | {'– ' * (stage in COMPUTED)}{stage} | {np.percentile(of.clock, 50):.1f} | "
        f"{np.percentile(of.clock, 95):.1f} | {np.percentile(of.processor, 50):.1f} |"
        for stage, of in stages.items()
    ]


HEAD = "| detector | batch | stage | p50 ms | p95 ms | processor ms |\n|---|---|---|---|---|---|"


def use_threads(threads: int) -> None:
    """Of torch, where it is loaded; the exported detectors are told when they are opened."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def _timed(work: Callable[..., Any], *given: Any) -> tuple[Any, tuple[float, float]]:
    clock, processor = _now()
    result = work(*given)
    after = _now()
    return result, (after[0] - clock, after[1] - processor)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
