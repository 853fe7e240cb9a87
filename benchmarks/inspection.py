"""CPU time of inspection, one thread, batch 1, by stage.

    python benchmarks/inspection.py detector.safetensors PICTURE…

Prints a Markdown table of milliseconds per picture (process time: what one core spends), median and 95th percentile.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from unflaw.cache import stack
from unflaw.detector import Detector
from unflaw.images import prepare, read


def main(model: str, pictures: list[str], rounds: int = 40) -> None:
    torch.set_num_threads(1)
    detector = Detector.load(model)
    network = detector.network
    spent: dict[str, list[float]] = defaultdict(list)
    for i in range(rounds + 5):
        path = pictures[i % len(pictures)]
        times = [time.process_time()]
        with torch.inference_mode():
            picture = prepare(read(path), detector.config.preparation)
            times.append(time.process_time())
            features = network.embed(stack([picture]))
            times.append(time.process_time())
            inspection = network(features)
            times.append(time.process_time())
            network.fuse(inspection)
            times.append(time.process_time())
        detector.inspect(path)
        times.append(time.process_time())
        if i >= 5:  # warm
            for stage, seconds in zip(
                ("read + prepare", "backbone", "method", "map + score"), np.diff(times), strict=False
            ):
                spent[stage].append(seconds * 1e3)
            spent["inspect, all in all"].append((times[-1] - times[-2]) * 1e3)
    print(f"{Path(model).name}, {rounds} pictures, one thread\n\n| stage | median ms | p95 ms |\n|---|---|---|")
    for stage, values in spent.items():
        print(f"| {stage} | {np.median(values):.1f} | {np.percentile(values, 95):.1f} |")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
