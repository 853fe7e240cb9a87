"""Rates of drift alarms by kind and strength of change, on images of several data sets.

The reference is a random four fifths of the good training images. Batches are drawn from the rest, unchanged or
changed, so "unchanged" measures the false-alarm rate. Good and defective test images are tested as well.

    python benchmarks/drift.py DATASET [DATASET ...] [--json FILE]
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from scipy import ndimage

from unflaw.calibration.drift import Reference
from unflaw.datasets import load_dataset
from unflaw.imaging.reading import read
from unflaw.imaging.tiling import Preparation
from unflaw.imaging.transforms import load_windows

Change = Callable[[np.ndarray], np.ndarray]
BATCHES = 100  # random batches of each size
SIZES = (5, 20)
OTHERS = 60  # images of each other product


def exposed(image: np.ndarray, gain: float) -> np.ndarray:
    return np.clip(np.round(image * gain), 0, 255).astype(np.uint8)


def blurred(image: np.ndarray, deviation: float) -> np.ndarray:
    """Blur by a Gaussian with a standard deviation in pixels of an image whose longer side is 256."""
    deviation *= max(image.shape) / 256
    return ndimage.gaussian_filter(image, (deviation, deviation, 0))


def shifted(image: np.ndarray, share: float) -> np.ndarray:
    """Shift to the right and down by a share of each side; the edge is repeated."""
    rows, columns = (round(side * share) for side in image.shape[:2])
    return np.pad(image, ((rows, 0), (columns, 0), (0, 0)), mode="edge")[: len(image), : image.shape[1]]


CHANGES: dict[str, Change] = {
    "unchanged": lambda image: image,
    **{f"exposure × {gain}": partial(exposed, gain=gain) for gain in (0.5, 0.8, 0.9, 1.1, 1.25, 2.0)},
    **{f"blur, σ = {s} px": partial(blurred, deviation=s) for s in (0.5, 1, 2)},
    **{f"shift by {share:.0%}": partial(shifted, share=share) for share in (0.02, 0.05, 0.1)},
}


def described(paths: list[Path], change: Change) -> np.ndarray:
    return np.stack([load_windows(change(read(path)), Preparation()).described for path in paths])


def rates(reference: Reference, images: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    """Share of single images with p ≤ 0.05, and of random batches that raise the alarm at 0.01."""
    found = {"single": float(np.mean([reference.p_value(image) <= 0.05 for image in images]))}
    for size in SIZES:
        batches = (rng.choice(len(images), size, replace=False) for _ in range(BATCHES))
        found[f"batch of {size}"] = float(np.mean([reference.test(images[batch]).alarm for batch in batches]))
    return found


def measure(
    name: str, path: Path, others: dict[str, np.ndarray], rng: np.random.Generator
) -> dict[str, dict[str, float]]:
    dataset = load_dataset(path)
    train = [dataset.train[i].path for i in rng.permutation(len(dataset.train))]
    reference = Reference(described(train[: -len(train) // 5], CHANGES["unchanged"]))
    held = train[-len(train) // 5 :]
    sets = {change: described(held, apply) for change, apply in CHANGES.items()}
    sets |= {f"product: {other}" if other != name else "": images for other, images in others.items()}
    sets.pop("", None)
    good = described([sample.path for sample in dataset.test if not sample.label], CHANGES["unchanged"])
    bad = described([sample.path for sample in dataset.test if sample.label], CHANGES["unchanged"])
    found = {title: rates(reference, images, rng) for title, images in sets.items()}
    tenth = [
        reference.test(np.vstack([pick(sets["unchanged"], 18, rng), pick(bad, 2, rng)])).alarm for _ in range(BATCHES)
    ]
    found["unchanged, a tenth of the batch defective"] = {"batch of 20": float(np.mean(tenth))}
    return found | {"test, good": rates(reference, good, rng), "test, all defective": rates(reference, bad, rng)}


def pick(images: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    return images[rng.choice(len(images), count, replace=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Rates of drift alarms.")
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    names = {path.name: path for path in options.data}
    others = {
        name: described([sample.path for sample in load_dataset(path).train[:OTHERS]], CHANGES["unchanged"])
        for name, path in names.items()
    }
    table = {name: measure(name, path, others, rng) for name, path in names.items()}
    columns = ["single", *(f"batch of {size}" for size in SIZES)]
    print(f"{'':44}", *(f"{name:^26}" for name in table))
    for title in dict.fromkeys(title for found in table.values() for title in found):
        cells = [[f"{found.get(title, {}).get(column, np.nan):8.2f}" for column in columns] for found in table.values()]
        print(f"{title:44}", *("".join(row) + "  " for row in cells))
    if options.json:
        options.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
