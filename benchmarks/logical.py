"""Logical anomalies on a synthetic data set: intact parts that are missing, doubled, swapped, moved or of a wrong kind.

The images show a plate with seven parts of five kinds in a fixed arrangement on brushed metal. Good plates vary
slightly in light and position, and in the angle, shade and position of each part. Defects break only the arrangement:
every part would be normal at another place. With --free, the parts lie in any of nine places; good plates have the
same number of parts of each kind, and defects change that number.

    python benchmarks/logical.py OUT [--free] [--good N] [--method NAME ...] [--weights FILE] [--set NAME=VALUE ...]

writes the data set to OUT in the layout of MVTec AD, unless it exists, and measures image AUROC by kind of defect.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

SIDE, SCALE = 256, 2  # side of the images in pixels; factor by which they are drawn larger
PARTS = (  # kind, x, y as shares of the side
    ("bolt", 0.2, 0.22),
    ("bolt", 0.8, 0.22),
    ("chip", 0.5, 0.3),
    ("cap", 0.22, 0.62),
    ("lamp", 0.5, 0.62),
    ("ring", 0.78, 0.62),
    ("bolt", 0.5, 0.86),
)
SPARE = ((0.35, 0.45), (0.65, 0.45), (0.2, 0.86), (0.8, 0.86), (0.5, 0.46))  # free places
DEFECTS = ("missing", "doubled", "swapped", "moved", "wrong kind")
COUNTED = ("missing", "doubled", "wrong kind")  # defects that change the number of parts
PLACES = tuple((x, y) for y in (0.2, 0.5, 0.8) for x in (0.2, 0.5, 0.8))
Parts = list[tuple[str, float, float]]


def _bolt(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    inside = np.maximum(np.abs(x), np.abs(x) / 2 + np.abs(y) * 0.87) < 0.065
    return inside, np.where(np.hypot(x, y) < 0.03, 70, 175)


def _chip(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    legs = (np.abs(y) < 0.075) & (np.abs(x) < 0.08) & (np.mod(x + 0.08, 0.04) < 0.018)
    body = (np.abs(x) < 0.09) & (np.abs(y) < 0.055)
    return body | legs, np.where(body, np.where(np.hypot(x + 0.065, y + 0.03) < 0.012, 120, 38), 205)


def _cap(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    radius = np.hypot(x, y)
    return radius < 0.075, np.where(radius > 0.062, 60, np.where(x > 0.035, 225, 95))


def _lamp(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    radius = np.hypot(x, y)
    return radius < 0.06, 235 - 1400 * radius


def _ring(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    radius = np.hypot(x, y)
    return (radius < 0.075) & (radius > 0.035), np.full(x.shape, 215)


KINDS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "bolt": _bolt,
    "chip": _chip,
    "cap": _cap,
    "lamp": _lamp,
    "ring": _ring,
}


def arrangement(rng: np.random.Generator, defect: str | None, free: bool = False) -> Parts:
    """Parts of a plate with kind and place."""
    parts, spare = list(PARTS), SPARE[rng.integers(len(SPARE))]
    if free:
        order = rng.permutation(len(PLACES))
        parts = [(kind, *PLACES[place]) for (kind, _, _), place in zip(PARTS, order, strict=False)]
        spare = PLACES[order[-1]]
    i = int(rng.integers(len(parts)))
    kind, x, y = parts[i]
    if defect == "missing":
        del parts[i]
    elif defect == "doubled":
        parts.append((kind, *spare))
    elif defect == "moved":
        parts[i] = (kind, *spare)
    elif defect == "swapped":
        others = [j for j, part in enumerate(parts) if part[0] != kind]
        j = others[rng.integers(len(others))]
        parts[i], parts[j] = (parts[j][0], x, y), (kind, *parts[j][1:])
    elif defect == "wrong kind":
        others = [name for name in KINDS if name != kind]
        parts[i] = (others[rng.integers(len(others))], x, y)
    return parts


def plate(rng: np.random.Generator, parts: Parts) -> np.ndarray:
    """Draw a plate, (SIDE, SIDE, 3) uint8."""
    side = SIDE * SCALE
    brushed = ndimage.gaussian_filter1d(rng.normal(0, 26, (side, side)).astype(np.float32), 14, axis=1)
    grey = 140 + brushed + rng.normal(0, 3)
    y, x = np.mgrid[:side, :side].astype(np.float32) / side - 0.5
    turn = rng.normal(0, np.deg2rad(1.5))
    dx, dy = rng.normal(0, 0.008, 2)
    x, y = (x - dx) * np.cos(turn) + (y - dy) * np.sin(turn), (y - dy) * np.cos(turn) - (x - dx) * np.sin(turn)
    for kind, *place in parts:
        px, py = np.array(place) - 0.5 + rng.normal(0, 0.004, 2)
        angle = rng.uniform(0, 2 * np.pi) if kind in ("bolt", "cap") else rng.normal(0, np.deg2rad(3))
        u, v = (x - px) * np.cos(angle) + (y - py) * np.sin(angle), (y - py) * np.cos(angle) - (x - px) * np.sin(angle)
        inside, shade = KINDS[kind](u, v)
        under = ndimage.gaussian_filter(np.roll(inside, (9, 9), (0, 1)).astype(np.float32), 5)
        grey = np.where(inside, shade + rng.normal(0, 4) + 0.3 * brushed, grey * (1 - 0.45 * under))
    grey = grey * rng.normal(1, 0.02) + rng.normal(0, 2)
    small = grey.reshape(SIDE, SCALE, SIDE, SCALE).mean((1, 3)) + rng.normal(0, 2, (SIDE, SIDE))
    return np.repeat(np.clip(small, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def write_plates(folder: Path, good: int, free: bool = False) -> None:
    """Write the data set in the layout of MVTec AD, without masks: a missing part has no definite mask."""
    rng, kinds = np.random.default_rng(0), COUNTED if free else DEFECTS
    parts = [("train/good", None, good), ("test/good", None, good // 2)]
    for name, defect, count in [*parts, *((f"test/{defect}", defect, good // 6) for defect in kinds)]:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(plate(rng, arrangement(rng, defect, free))).save(folder / name / f"{i:03d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Logical anomalies on a synthetic data set.")
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--good",
        type=int,
        default=120,
        help="number of training images; half as many good test images, a sixth as many of each defect",
    )
    parser.add_argument("--free", action="store_true", help="parts in any place, with fixed numbers of each kind")
    parser.add_argument(
        "--method", action="append", help="method to train; may be repeated; nearest_neighbor by default"
    )
    parser.add_argument("--weights", help="weights of ResNet-18; without them, the default backbone is used")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    if not options.out.exists():
        write_plates(options.out, options.good, options.free)
    from unflaw.config import make_config
    from unflaw.datasets import load_dataset
    from unflaw.evaluation.evaluate import evaluate
    from unflaw.experiments.feature_store import ExperimentRunner

    dataset = load_dataset(options.out)
    runner = ExperimentRunner(options.out.with_name(f"{options.out.name}-features"), options.weights)
    for method in options.method or ["nearest_neighbor"]:
        changes = {} if options.weights is None else {"features.backbone": "resnet18"}
        changes |= {name: json.loads(value) for name, _, value in (text.partition("=") for text in options.set)}
        changes["training.display_steps"] = 0
        metrics = evaluate(runner.fit(make_config(method, changes=changes), dataset), dataset).metrics
        by_kind = {kind: round(row["image_auroc"], 3) for kind, row in metrics["per_defect"].items()}
        print(f"{method}: image AUROC {metrics['image_auroc']:.3f}; {by_kind}", flush=True)


if __name__ == "__main__":
    main()
