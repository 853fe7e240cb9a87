"""Effect of several processes on training time and on the trained detector.

    python benchmarks/distributed.py --data mvtec_ad/screw --out detectors [--method uranet] [--processes 1 2]

Trains once with each number of processes, one thread each, in single precision, using torchrun for more than one.
Prints the seconds of each stage, and the largest differences from the first detector in image scores on test images,
in verdicts and in trained weights. A batch has as many parts as the largest number of processes; fewer processes
compute them in several passes, so that all detectors see the same batches. Run it on an idle machine with at least as
many cores as processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STAGES = ("features", "memory", "training", "rest")
TITLES = ("caching", "memory", "training", "display and calibration")


def work(options: argparse.Namespace) -> None:
    """Run one process of a training; the first one saves the detector and its times."""
    import torch

    from unflaw.config import make_config
    from unflaw.datasets import load_dataset
    from unflaw.detector import Detector
    from unflaw.parallel.process_group import SINGLE_PROCESS, ProcessGroup

    torch.set_num_threads(1)
    # the same parts of a batch, whether processes or passes compute them
    changes: dict[str, Any] = {"training.precision": "float32", "training.accumulate": options.parts // options.work}
    if options.steps is not None:
        changes |= {"training.steps": options.steps, "training.display_steps": min(150, options.steps)}
    config = make_config(options.method, "cpu", changes)
    group: ProcessGroup = SINGLE_PROCESS
    if options.work > 1:
        from unflaw.parallel.fabric import FabricGroup

        group = FabricGroup(config.training, devices=options.work, accelerator="cpu")
    ends: dict[str, float] = {}
    detector = Detector(config=config, weights=options.weights)
    data = load_dataset(options.data)
    group.barrier()
    started = time.perf_counter()
    detector.fit(data, progress=lambda stage, *_: ends.update({stage: time.perf_counter()}), group=group)
    ended = time.perf_counter()
    marks = [started, ends["features"], ends["memory"], ends.get("training", ends["memory"]), ended]
    if group.is_main:
        path = options.out / f"distributed-{options.work}.safetensors"
        detector.save(path)
        seconds = {name: after - before for name, before, after in zip(STAGES, marks, marks[1:], strict=False)}
        path.with_suffix(".json").write_text(json.dumps(seconds))


def start(options: argparse.Namespace, processes: int) -> dict[str, float]:
    """Run `work` in several processes and return the seconds of its stages."""
    own = [__file__, "--data", options.data, "--out", options.out, "--method", options.method, "--work", processes]
    own += ["--weights", options.weights] if options.weights else []
    own += ["--parts", max(options.processes)]
    own += ["--steps", options.steps] if options.steps is not None else []
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes > 1 else []
    command = [str(part) for part in (sys.executable, *several, *own)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads((options.out / f"distributed-{processes}.json").read_text())


def differences(first: Path, other: Path, options: argparse.Namespace) -> str:
    """Return table cells with the differences in scores, verdicts and weights of two detectors."""
    from unflaw.datasets import load_dataset
    from unflaw.detector import Detector

    detectors = [Detector.load(path) for path in (first, other)]
    images = [sample.path for sample in load_dataset(options.data).test][:: options.every]
    inspected = [list(detector.inspect_many(images)) for detector in detectors]
    pairs = list(zip(*inspected, strict=True))
    scores = max(abs(a.score - b.score) for a, b in pairs)
    spread = max(a.score for a, _ in pairs) - min(a.score for a, _ in pairs)
    flips = sum(a.verdict != b.verdict for a, b in pairs)
    trained = (
        float((a - b).detach().abs().max())
        for (_, a), (_, b) in zip(*(d.network.named_parameters() for d in detectors), strict=True)
        if a.requires_grad
    )
    return f"{scores:.1e} of {spread:.3g} | {flips} of {len(pairs)} | {max(trained, default=0.0):.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--method", default="uranet")
    parser.add_argument("--steps", type=int, help="number of training steps; by default the method's own")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--every", type=int, default=1, help="interval of the test images that are compared")
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--parts", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.work:
        work(options)
        return
    measured = {processes: start(options, processes) for processes in options.processes}
    base = measured[options.processes[0]]
    print(f"{options.method}, {options.data.name}, one thread per process, float32\n")
    print(f"| processes | {' s | '.join(TITLES)} s | all s | speed-up: caching | training | all |")
    print("|---" * (len(TITLES) + 5) + "|")
    for processes, seconds in measured.items():
        times = " | ".join(f"{seconds[stage]:.1f}" for stage in STAGES)
        gains = [base[stage] / max(seconds[stage], 1e-9) for stage in ("features", "training")]
        gains.append(sum(base.values()) / sum(seconds.values()))
        print(f"| {processes} | {times} | {sum(seconds.values()):.1f} | {' | '.join(f'{g:.2f}' for g in gains)} |")
    print(f"\n| {options.processes[0]} and | largest difference of scores, of their range | verdicts that differ | "
          "largest difference of weights |\n|---|---|---|---|")  # fmt: skip
    first = options.out / f"distributed-{options.processes[0]}.safetensors"
    for processes in options.processes[1:]:
        other = options.out / f"distributed-{processes}.safetensors"
        print(f"| {processes} | {differences(first, other, options)} |", flush=True)


if __name__ == "__main__":
    main()
