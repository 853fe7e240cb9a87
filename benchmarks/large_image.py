"""Memory and time of inspecting one large image in tiles: a synthetic one of 8000 × 6000 pixels with a bright speck.

    python benchmarks/large_image.py [detector.safetensors] [--width 8000] [--height 6000] [--tile 512]

The inspection runs in a process of its own, whose peak memory is measured with the detector loaded and again after
the inspection. Without a detector, `nearest_neighbor` is trained on smaller images of the same kind.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

SPECK = 24  # side of the speck, pixels
CUT = 1600  # side of the training images, pixels


def surface(width: int, height: int, seed: int) -> np.ndarray:
    """Return an image (height, width, 3) uint8, computed in strips to save memory."""
    rng, made = np.random.default_rng(seed), np.empty((height, width, 3), np.uint8)
    for top in range(0, height, 500):
        strip = made[top : top + 500]
        grain = ndimage.gaussian_filter(rng.normal(0, 40, strip.shape[:2]).astype(np.float32), 2)
        strip[:] = np.clip(120 + grain, 0, 255).astype(np.uint8)[..., None]
    return made


def inspect(model: Path, image: Path) -> dict[str, object]:
    import torch

    from unflaw import load

    torch.set_num_threads(1)
    detector = load(model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    (result,) = detector.inspect_many([image], batch=4)
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "peak before, MB": before // 1024,
        "peak, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "map": list(result.map.shape),
        "regions": [list(region.box) for region in result.regions[:3]],
        "verdict": result.verdict,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time of one large image.")
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--width", type=int, default=8000)
    parser.add_argument("--height", type=int, default=6000)
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--image", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.image is not None:
        print(json.dumps(inspect(options.model, options.image)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model
        if model is None:
            from unflaw import Detector

            (folder / "good").mkdir()
            side = max(CUT, options.tile)
            for i in range(12):
                Image.fromarray(surface(side, side, 1 + i)).save(folder / "good" / f"{i}.png")
            model = folder / "surface.safetensors"
            settings = {"preparation__tile": options.tile, "training__display_steps": 0}
            Detector(method="nearest_neighbor", **settings).fit(folder / "good").save(model)
        made = surface(options.width, options.height, 0)
        top, left = options.height // 3, options.width // 4
        made[top : top + SPECK, left : left + SPECK] = 235
        Image.fromarray(made).save(folder / "large.png", compress_level=1)
        del made
        command = [sys.executable, __file__, str(model), "--image", str(folder / "large.png")]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"{options.width} × {options.height}, tiles of {options.tile}; speck of {SPECK} pixels at ({left}, {top})")
    for what, value in found.items():
        print(f"{what:18} {value}")


if __name__ == "__main__":
    main()
