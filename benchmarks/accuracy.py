"""The tables of docs/benchmarks.md: methods × backbones × data sets × seeds, from files to metrics, one process each.

    python benchmarks/accuracy.py --data ../shared/data/mvtec_ad/screw --data … --method uranet --method lookup \
        --backbone tf_efficientnet_lite0 --backbone resnet18=../shared/weights/resnet18_layer1-3.safetensors --seeds 3

Every run is `unflaw train` and `unflaw evaluate` as a user calls them; a row has the median over seeds, peak memory and
the time from files to saved detector.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

METRICS = ("image_auroc", "pixel_auroc", "aupro_30", "image_f1_max")


def run(data: Path, method: str, backbone: str, seed: int, settings: list[str]) -> dict[str, float | None]:
    name, _, weights = backbone.partition("=")
    with tempfile.TemporaryDirectory() as folder:
        model, figures = Path(folder) / "model.safetensors", Path(folder) / "figures.json"
        unflaw = [str(Path(sys.executable).with_name("unflaw"))]
        command = [*unflaw, "train", "--data", str(data), "--method", method, "--out", str(model), "--backbone", name]
        command += ["--seed", str(seed), *(["--weights", weights] if weights else [])]
        command += [part for setting in settings for part in ("--set", setting)]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)  # the usage of this process alone
        if status:
            raise SystemExit(f"failed: {' '.join(command)}")
        seconds, memory = time.perf_counter() - started, usage.ru_maxrss / 2**20
        evaluate = [*unflaw, "evaluate", str(model), "--data", str(data), "--json", str(figures)]
        subprocess.run(evaluate, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        metrics = json.loads(figures.read_text())
    return {name: metrics[name] for name in METRICS} | {"seconds": seconds, "GB": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--method", action="append", required=True)
    parser.add_argument("--backbone", action="append", required=True, help="NAME or NAME=WEIGHTS")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", dest="settings", action="append", default=[])
    args = parser.parse_args()
    columns = (*METRICS, "seconds", "GB")
    print(f"| data | method | backbone | {' | '.join(columns)} |\n|{'---|' * (3 + len(columns))}")
    for data, method, backbone in product(args.data, args.method, args.backbone):
        rows = [run(data, method, backbone, seed, args.settings) for seed in range(args.seeds)]
        cells = []
        for column in columns:
            values = [row[column] for row in rows]
            known = [value for value in values if value is not None]
            cells.append(f"{statistics.median(known):.3f}" if known else "–")
        print(f"| {data.name} | {method} | {backbone.partition('=')[0]} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
