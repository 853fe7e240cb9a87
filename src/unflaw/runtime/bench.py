"""Inspection time by stage, for trained and exported detectors."""

from __future__ import annotations

import io
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from unflaw.imaging.reading import read
from unflaw.imaging.transforms import prepare
from unflaw.inference.base import BasePredictor

WARM_UP = 3  # rounds that are not recorded
COMPUTED = ("backbone", "method", "map and layers")  # parts of "compute" for a trained detector
HEAD = "| detector | batch | stage | p50 ms | p95 ms | processor ms |\n|---|---|---|---|---|---|"


class Stage(NamedTuple):
    """Milliseconds per image, a value for each round: wall time, and processor time of all cores together."""

    clock: list[float]
    processor: list[float]


@contextmanager
def module_times(detector: BasePredictor, category: str) -> Iterator[dict[str, np.ndarray]]:
    """Sum the seconds (wall, processor) spent in backbone and method; an empty dict for an exported detector."""
    spent: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))
    handles: list[Any] = []

    def watch(name: str, module: Any) -> None:
        starts: list[np.ndarray] = []

        def leave(*_: Any) -> None:
            spent[name] = spent[name] + _now() - starts.pop()

        handles.append(module.register_forward_pre_hook(lambda *_: starts.append(_now())))
        handles.append(module.register_forward_hook(leave))

    if hasattr(detector, "network_of"):
        network = detector.network_of(category)
        watch("backbone", network.features)
        watch("method", network)
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def measure(
    detector: BasePredictor, sources: Sequence[Path | bytes], *, batch: int, rounds: int, category: str | None = None
) -> dict[str, Stage]:
    """Time the stages of inspecting `batch` images together, in `rounds` rounds that take the sources in turn.

    "decode" and "prepare" process one image after the other. "compute" is the network or graph, followed by its parts
    for a trained detector. "inspect", for a batch of 1, is `BasePredictor.inspect`: all of that and the decisions.
    """
    name, preparation = detector.category(category), detector.config.preparation
    recorded: dict[str, list[np.ndarray]] = defaultdict(list)
    seconds: dict[str, np.ndarray] = {}

    def timed(stage: str, work: Callable[..., Any], *arguments: Any) -> Any:
        start = _now()
        result = work(*arguments)
        seconds[stage] = _now() - start
        return result

    endless = cycle(sources)
    for number in range(rounds + WARM_UP):
        chosen = list(islice(endless, batch))
        decoded = timed("decode", list, map(read, chosen))
        images = timed("prepare", list, (prepare(image, preparation) for image in decoded))
        with module_times(detector, name) as spent:
            timed("compute", detector.compute, images, name)
        if spent:
            seconds |= spent
            seconds[COMPUTED[-1]] = seconds["compute"] - sum(spent.values())
        if batch == 1:
            timed("inspect", partial(detector.inspect, chosen[0], category=category))
        if number >= WARM_UP:
            for stage, values in seconds.items():
                recorded[stage].append(values / batch * 1e3)
    return {stage: Stage(*np.transpose(values).tolist()) for stage, values in recorded.items()}


def throughput(detector: BasePredictor, paths: Sequence[Path], images: int, category: str | None = None) -> float:
    """Images per second of `inspect_many`, which reads ahead while it computes."""
    start = time.perf_counter()
    for _ in detector.inspect_many(list(islice(cycle(paths), images)), category=category):
        pass
    return images / (time.perf_counter() - start)


def synthetic_jpegs(count: int = 8, side: int = 1024) -> list[bytes]:
    """JPEG files of smooth noise, side × side pixels, to measure with if no images are given."""
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def rows(name: str, batch: int, stages: Mapping[str, Stage]) -> list[str]:
    """Rows of the Markdown table under `HEAD`, one for each stage."""
    return [
        f"| {name} | {batch} | {'– ' * (stage in COMPUTED)}{stage} | {np.percentile(times.clock, 50):.1f} | "
        f"{np.percentile(times.clock, 95):.1f} | {np.percentile(times.processor, 50):.1f} |"
        for stage, times in stages.items()
    ]


def use_threads(threads: int) -> None:
    """Set the number of torch's threads if torch is loaded; exported detectors get theirs when they are opened."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def _now() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])
