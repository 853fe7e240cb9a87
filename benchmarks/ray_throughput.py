"""Throughput of `unflaw predict --engine ray` with one and two workers against plain `predict`, and a killed worker.

    python benchmarks/ray_throughput.py parts.onnx --data parts --images 2000

Plain `predict` and every worker compute with one thread and read ahead in two more. The start-up of Python, Ray and the
workers is reported separately: it is the total time less the time of all images at the measured speed. In the last run,
a worker is killed (SIGKILL) after every tenth partition, at most three times, and then every image is counted. If the
folder has too few images, links repeat them.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from unflaw import scale
from unflaw.io.listing import list_images
from unflaw.scale import partitions
from unflaw.scale.store import OWN, Store

PARTITION = 32
KILLS = 3


def linked(data: Path, count: int, folder: Path) -> Path:
    """Make a folder of `count` links to the images in `data`, taken in turn."""
    images = list_images(data)
    folder.mkdir()
    for i in range(count):
        source = images[i % len(images)].resolve()
        (folder / f"{i:07d}{source.suffix}").symlink_to(source)
    return folder


def plain(model: Path, folder: Path, out: Path) -> tuple[float, float]:
    """Return the images/s of plain `predict` after its first line, and the seconds to that line."""
    os.environ["OMP_NUM_THREADS"] = "1"
    code = (
        "import sys, unflaw\nfrom pathlib import Path\nfrom unflaw.inference.predict import predict\n"
        "from unflaw.io.listing import list_images\n"
        "if sys.argv[1].endswith('.safetensors'):\n import torch; torch.set_num_threads(1)\n"
        "detector = unflaw.load(sys.argv[1], threads=1)\n"
        "predict(detector, list_images(sys.argv[2]), Path(sys.argv[3]), "
        "progress=lambda stage, done, total, loss=None: print(done, flush=True))"
    )
    out.mkdir()
    begun = time.perf_counter()
    command = [sys.executable, "-c", code, str(model), str(folder), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        times = [time.perf_counter() for _ in process.stdout]
    if process.returncode:
        raise SystemExit(f"plain predict ended with {process.returncode}")
    return (len(times) - 1) / (times[-1] - times[0]), times[0] - begun


def on_ray(model: Path, folder: Path, out: Path, workers: int, kill: bool = False) -> tuple[float, float, int]:
    """Return the images/s between the first and the last finished partition, the start-up in s, and killed workers."""
    times: list[float] = []
    ended, killed = threading.Event(), list[int]()

    def progress(stage: str, done: int, total: int, loss: float | None = None) -> None:
        if stage == "partitions" and done:
            times.append(time.perf_counter())

    def killer() -> None:
        while not ended.wait(0.01):
            notes = sorted((out / OWN).glob("doing-*.json"))
            if not notes or len(killed) >= KILLS or len(times) < 1 + 10 * len(killed):
                continue
            try:
                worker = json.loads(notes[-1].read_text())["pid"]
                if worker not in killed:
                    os.kill(worker, signal.SIGKILL)
                    killed.append(worker)
            except (OSError, ValueError):  # the partition has just ended
                continue

    thread = threading.Thread(target=killer)
    if kill:
        thread.start()
    begun = time.perf_counter()
    try:
        totals = scale.predict(model, [str(folder)], str(out), workers=workers, partition=PARTITION, progress=progress)
    finally:
        ended.set()
        if kill:
            thread.join()
    assert not totals.errors, totals.errors
    done = sum(totals.counts.values())
    speed = (done - PARTITION * workers) / (times[-1] - times[workers - 1])  # without each worker's first
    return speed, times[-1] - begun - done / speed, len(killed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of images")
    parser.add_argument("--images", type=int, default=2000, help=f"number of images, at least {16 * PARTITION}")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    if arguments.images < 16 * PARTITION:
        parser.error(f"--images {arguments.images}: too few for a rate; give at least {16 * PARTITION}")
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folder = linked(arguments.data, arguments.images, root / "in")
        speed, start = plain(arguments.model, folder, root / "plain")
        print(f"{arguments.images} images, partitions of {PARTITION}, one thread each, {os.cpu_count()} processors\n")
        print("| | images/s | against plain | start-up, s |\n|---|---|---|---|")
        print(f"| plain `predict` | {speed:.1f} | 1.00 | {start:.1f} |", flush=True)
        for workers in arguments.workers:
            own, start, _ = on_ray(arguments.model, folder, root / f"out-{workers}", workers)
            print(f"| Ray, {workers} workers | {own:.1f} | {own / speed:.2f} | {start:.1f} |", flush=True)
        workers = max(arguments.workers)
        _, _, killed = on_ray(arguments.model, folder, root / "killed", workers, kill=True)
        lines = (root / "plain/results.jsonl").read_text().splitlines()
        known = {line["path"]: line.get("score") for line in map(json.loads, lines)}
        store = Store(str(root / "killed"))
        rows = [row for number in partitions.finished(store) for row in partitions.read(store, number)]
        counts = Counter(row["name"] for row in rows)
        apart = sum(
            (row["score"] is None) != (known[row["name"]] is None)
            or (row["score"] is not None and abs(row["score"] - known[row["name"]]) > 1e-5 * abs(known[row["name"]]))
            for row in rows
            if row["name"] in known
        )
        print(
            f"\n{workers} workers, of which {killed} killed: {len(known)} images, {len(rows)} rows, "
            f"{len(known.keys() - counts.keys())} missing, {sum(n - 1 for n in counts.values())} double, "
            f"{len(counts.keys() - known.keys())} unknown, {sum(row['status'] == 'failed' for row in rows)} failed, "
            f"{apart} with another score than plain `predict`"
        )


if __name__ == "__main__":
    main()
