"""Detection of defects of a few pixels in large images, with and without tiles.

The images are synthetic: boards with a printed grain and a grid of round pads, each slightly displaced. Defects are a
nick in a pad, a speck between pads, or a scratch. `nearest_neighbor` is trained on good boards.

    python benchmarks/small_defects.py [--side 1024] [--tile 512] [--weights FILE] [--json FILE]

Prints image AUROC, and pixel AUROC and AUPRO at the resolution of the images, to which maps are resized bilinearly, so
that both ways are measured on the same pixels.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from unflaw import Detector
from unflaw.evaluation.metrics import PixelAccumulator, auroc, image_ranking

PITCH, RADIUS = 64, 17  # distance and radius of the pads, pixels
MEMORY = {"network__prototypes": 1024, "network__regional_prototypes": 4096}  # enough for few images
DEFECTS = ("nick", "speck", "scratch")
GOOD, TEST_GOOD, TEST_BAD = 24, 20, 8  # number of training images, good test images, test images of each defect


def board(rng: np.random.Generator, side: int, defect: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Draw an image (side, side, 3) uint8 and its mask (side, side) bool."""
    y, x = np.mgrid[:side, :side].astype(np.float32)
    grain = ndimage.gaussian_filter(rng.normal(0, 1, (side, side)).astype(np.float32), 1.2)
    grain = grain / grain.std() * 5
    weave = 4 * np.sin(2 * np.pi * y / 9 + rng.uniform(0, 6)) * np.sin(2 * np.pi * x / 11 + rng.uniform(0, 6))
    grey = 92 + grain + weave + rng.normal(0, 1.5)
    count = side // PITCH
    dx, dy = rng.uniform(-6, 6, 2)
    shape = np.zeros((side, side), np.float32)
    centres = []
    for row in range(count):
        for column in range(count):
            cy, cx = ((i + 0.5) * PITCH + rng.normal(0, 0.8) for i in (row, column))
            centres.append((cy + dy, cx + dx))
            top, left = int(cy + dy) - 24, int(cx + dx) - 24
            here = np.s_[max(top, 0) : top + 49, max(left, 0) : left + 49]
            distance = np.hypot(y[here] - cy - dy, x[here] - cx - dx)
            shape[here] = np.maximum(shape[here], np.clip(RADIUS + 0.5 - distance, 0, 1))
    grey = grey + shape * (88 + rng.normal(0, 2) + 3 * ndimage.gaussian_filter(rng.normal(0, 2, shape.shape), 3))
    mask = np.zeros((side, side), bool)
    if defect is not None:
        cy, cx = centres[rng.integers(len(centres))]
        if defect == "speck":
            cy, cx = cy + PITCH / 2 - rng.uniform(-6, 6), cx + PITCH / 2 - rng.uniform(-6, 6)
            cy, cx = (min(max(c, 8), side - 8) for c in (cy, cx))
            mask = np.hypot(y - cy, x - cx) < rng.uniform(2.5, 4)
            grey = np.where(mask, 168, grey)
        elif defect == "nick":
            angle = rng.uniform(0, 2 * np.pi)
            mask = np.hypot(y - cy - RADIUS * np.sin(angle), x - cx - RADIUS * np.cos(angle)) < rng.uniform(4, 6)
            mask &= shape > 0.5
            grey = np.where(mask, 95 + grain, grey)
        else:
            angle, length = rng.uniform(0, np.pi), rng.uniform(14, 24)
            along = (y - cy) * np.sin(angle) + (x - cx) * np.cos(angle)
            across = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
            mask = (np.abs(along) < length / 2) & (np.abs(across) < 1.2)
            grey = np.where(mask, 60, grey)
    pixels = np.clip(grey, 0, 255).astype(np.uint8)
    return np.repeat(pixels[..., None], 3, axis=2), mask


def write_boards(folder: Path, side: int) -> None:
    """Write the data set in the layout of MVTec AD."""
    rng = np.random.default_rng(0)
    parts = [("train/good", None, GOOD), ("test/good", None, TEST_GOOD)]
    for name, defect, count in [*parts, *((f"test/{defect}", defect, TEST_BAD) for defect in DEFECTS)]:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels, mask = board(rng, side, defect)
            Image.fromarray(pixels).save(folder / name / f"{i:03d}.png")
            if defect is not None:
                (folder / "ground_truth" / defect).mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(folder / "ground_truth" / defect / f"{i:03d}_mask.png")


def measure(folder: Path, side: int, tile: int | None, weights: str | None) -> dict[str, Any]:
    started = time.perf_counter()
    settings: dict[str, Any] = {
        "preparation__tile": tile,
        "training__display_steps": 0,
        **MEMORY,
        "features__backbone": "resnet18",
    }
    if weights is None:
        del settings["features__backbone"]
    detector = Detector(method="nearest_neighbor", weights=weights, **settings).fit(folder / "train/good")
    trained = time.perf_counter()
    pixels, scores, labels = PixelAccumulator(), list[float](), list[int]()
    per_defect: dict[str, list[float]] = {}
    paths = sorted((folder / "test").rglob("*.png"))
    for path, result in zip(paths, detector.inspect_many(paths, batch=4), strict=True):
        kind = path.parent.name
        mask = np.zeros((side, side), bool)
        if kind != "good":
            mask = np.asarray(Image.open(folder / "ground_truth" / kind / f"{path.stem}_mask.png"), bool)
        full = np.asarray(Image.fromarray(result.map).resize((side, side), Image.Resampling.BILINEAR))
        pixels.update(full, mask)
        scores.append(result.score)
        labels.append(int(kind != "good"))
        per_defect.setdefault(kind, []).append(result.score)
    good = per_defect.pop("good")
    found = {"image_auroc": auroc(image_ranking(scores, labels)), **pixels.compute()}
    for kind, own in per_defect.items():
        found[f"image_auroc, {kind}"] = auroc(image_ranking([*good, *own], [0] * len(good) + [1] * len(own)))
    seconds = (time.perf_counter() - trained) / len(paths)
    return found | {"training seconds": trained - started, "seconds per image": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description="Small defects in large images, with and without tiles.")
    parser.add_argument("--side", type=int, default=1024, help="side of the images, pixels")
    parser.add_argument("--tile", type=int, default=512, help="side of a tile, pixels")
    parser.add_argument("--weights", help="weights of ResNet-18; without them, the default backbone is used")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_boards(Path(folder), options.side)
        ways = {"whole": None, f"tiles of {options.tile}": options.tile}
        found = {name: measure(Path(folder), options.side, tile, options.weights) for name, tile in ways.items()}
    print(f"{'':24}", *(f"{name:>16}" for name in found))
    for metric in next(iter(found.values())):
        print(f"{metric:24}", *(f"{values[metric]:16.3f}" for values in found.values()))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
