"""Throughput and cost of inspecting very many images on 1, 8 and 64 nodes, modelled from measured constants.

    python benchmarks/cost_model.py --data mvtec_ad/screw [--detector parts.safetensors] [--measured 1:9.1 2:17.8]

Measures bytes, operations and processor time of each stage for one image, on one thread of this machine, and prints
the tables of docs/scaling.md. Quantities that cannot be measured here are options with defaults, printed as
assumptions. Without --detector, one is trained on 16 images in one step, since its quality does not affect its speed.
`--measured WORKERS:RATE` compares measured images per second with the prediction.
"""

from __future__ import annotations

import argparse
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from unflaw.datasets import load_dataset
from unflaw.detector import Detector
from unflaw.features.cache import stack
from unflaw.imaging.reading import read
from unflaw.imaging.transforms import prepare
from unflaw.methods.graph import Graph
from unflaw.runtime.bench import measure

STAGES = ("decode", "prepare", "backbone", "method", "map and layers")
NODES = (1, 8, 64)
MEGA, GIGA = 1e6, 1e9


@dataclass(frozen=True)
class Costs:
    """Cost of one image.

    Attributes:
        seconds: Seconds of one processor core, by stage.
        operations: Multiplications and additions of backbone and head.
        file, pixels, cached: Bytes of the file, of the decoded image, and in the feature cache.
        weights: Bytes of the trained weights in float32, equal to those of their gradients.
    """

    seconds: dict[str, float]
    operations: dict[str, float]
    file: float
    pixels: float
    cached: float
    weights: int

    @property
    def host(self) -> float:
        """Core seconds of the stages that stay on the processor when a GPU computes."""
        return self.seconds["decode"] + self.seconds["prepare"]

    @property
    def core(self) -> float:
        """Core seconds of all stages."""
        return sum(self.seconds.values())


def measure_costs(detector: Detector, paths: list[Path], batch: int, rounds: int) -> Costs:
    """Measure the costs on one thread."""
    torch.set_num_threads(1)
    stages = measure(detector, paths, batch=batch, rounds=rounds)
    images = [read(path) for path in paths[:8]]
    shown = stack([prepare(image, detector.config.preparation) for image in images[:1]])
    network = detector.network
    with torch.no_grad(), FlopCounterMode(display=False) as backbone:
        features = network.embed(shown)
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        Graph(network, None)(shown, None)
    cached = features[0].numel() * 2 + 3 * 128 * 128
    if any(p.requires_grad for p in network.parameters()) and getattr(network, "memory", None) is not None:
        cached += features[0].numel() * 2 + features[0, 0].numel() * 4  # retrieved features and distances
    return Costs(
        {name: float(np.median(stages[name].processor)) / 1e3 for name in STAGES if name in stages},
        {
            "backbone": float(backbone.get_total_flops()),
            "head": float(whole.get_total_flops() - backbone.get_total_flops()),
        },
        float(np.mean([path.stat().st_size for path in paths])),
        float(np.mean([image.nbytes for image in images])),
        float(cached),
        sum(p.numel() * 4 for p in network.parameters() if p.requires_grad),
    )


def limits(image: Costs, nodes: int, options: argparse.Namespace, gpu: bool) -> dict[str, float]:
    """Images per second that each resource of the nodes allows."""
    rates = {
        "disk of the nodes": nodes * options.disk * MEGA / image.file,
        "network of the nodes": nodes * options.network * GIGA / 8 / image.file,
        "shared store": options.store * MEGA / image.file,
    }
    if gpu:
        operations = sum(image.operations.values())
        rates["decode and prepare"] = nodes * options.gpu_cores / image.host
        rates["GPU"] = nodes * options.gpu_tflops * 1e12 * options.gpu_share / operations
    else:
        rates["processor"] = nodes * options.cores / image.core
    return rates


def price(rate: float, nodes: int, hourly: float) -> float:
    """Price of a million images."""
    return nodes * hourly / 3600 / rate * 1e6


def tables(image: Costs, options: argparse.Namespace) -> list[str]:
    total = image.core
    lines = ["| stage | core ms per image | share | 10⁹ operations |", "|---|---|---|---|"]
    operations = {"backbone": image.operations["backbone"], "method": image.operations["head"]}
    for name, seconds in image.seconds.items():
        counted = f"{operations[name] / GIGA:.2f}" if name in operations else ""
        lines.append(f"| {name} | {seconds * 1e3:.1f} | {seconds / total:.0%} | {counted} |")
    lines += [
        f"| all | {total * 1e3:.1f} | | {sum(image.operations.values()) / GIGA:.2f} |",
        "",
        "| bytes per image | |",
        "|---|---|",
        f"| file | {image.file / 1e3:,.0f} kB |",
        f"| decoded | {image.pixels / 1e3:,.0f} kB |",
        f"| feature cache, in training | {image.cached / 1e3:,.0f} kB |",
        "",
        f"Gradients that processes exchange at each step: {image.weights / 1e6:.1f} MB.",
    ]
    for gpu in (False, True):
        hourly = options.price_gpu if gpu else options.price
        kind = f"{options.gpu_cores} cores and one {options.gpu}" if gpu else f"{options.cores} cores"
        lines += ["", f"Nodes with {kind}, {hourly:g} an hour each:", ""]
        lines += [
            "| nodes | images/s | bound by | next bound, images/s | price per million |",
            "|---|---|---|---|---|",
        ]
        for nodes in NODES:
            (bound, rate), (after, limit) = sorted(limits(image, nodes, options, gpu).items(), key=lambda i: i[1])[:2]
            cost = price(rate, nodes, hourly)
            lines.append(f"| {nodes} | {rate:,.0f} | {bound} | {after}, {limit:,.0f} | {cost:,.2f} |")
    return lines


def check(image: Costs, measured: list[str]) -> list[str]:
    """Compare measured rates with predictions, for workers of one core each."""
    lines = ["| workers | predicted images/s | measured | measured / predicted |", "|---|---|---|---|"]
    for text in measured:
        workers, _, rate = text.partition(":")
        predicted = int(workers) / image.core
        lines.append(f"| {workers} | {predicted:.1f} | {float(rate):.1f} | {float(rate) / predicted:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--detector", type=Path)
    parser.add_argument("--method", default="uranet")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--measured", nargs="+", action="extend", default=[], metavar="WORKERS:RATE")
    assumed = parser.add_argument_group("assumptions")
    assumed.add_argument("--cores", type=int, default=16, help="processor cores of a node without GPU")
    assumed.add_argument("--gpu-cores", type=int, default=16, help="processor cores of a node with one GPU")
    assumed.add_argument("--gpu", default="NVIDIA L4", help="name of the GPU")
    assumed.add_argument(
        "--gpu-tflops",
        type=float,
        default=121,
        help="peak TFLOPS of the GPU (dense 16-bit matrix products, data sheet)",
    )
    assumed.add_argument(
        "--gpu-share", type=float, default=0.05, help="share of the peak that small convolutions reach"
    )
    assumed.add_argument("--price", type=float, default=0.80, help="price per hour of a node without GPU")
    assumed.add_argument("--price-gpu", type=float, default=1.50, help="price per hour of a node with one GPU")
    assumed.add_argument("--disk", type=float, default=500, help="disk throughput of a node, MB/s")
    assumed.add_argument("--network", type=float, default=10, help="network bandwidth of a node, Gbit/s")
    assumed.add_argument(
        "--store", type=float, default=5000, help="throughput of the shared store for all nodes together, MB/s"
    )
    options = parser.parse_args()
    data = load_dataset(options.data)
    paths = [sample.path for sample in (*data.test, *data.train)][:64]
    if options.detector:
        detector = Detector.load(options.detector)
    else:
        few = [sample.path for sample in data.train][:16]
        settings = {"training__steps": 1, "training__display_steps": 1}
        detector = Detector(options.method, weights=options.weights, **settings).fit(few)
    image = measure_costs(detector, paths, options.batch, options.rounds)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, one thread used"
    print(f"{detector.config.method}, {options.data.name}, batches of {options.batch}; {machine}\n")
    print("\n".join(tables(image, options)))
    names = ("gpu_tflops", "gpu_share", "disk", "network", "store", "price", "price_gpu")
    print("\nAssumed: " + ", ".join(f"{name.replace('_', '-')} {getattr(options, name):g}" for name in names) + ".")
    if options.measured:
        print("\nPredicted against measured:\n\n" + "\n".join(check(image, options.measured)))


if __name__ == "__main__":
    main()
