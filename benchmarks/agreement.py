"""Agreement of exported detectors with the trained one, on images of many sizes, modes and formats.

    python benchmarks/agreement.py detector.safetensors IMAGES exported.onnx [exported.xml …]

Makes 200 images from those in a folder (IMAGES): random crops with sides of 1 to 3000 pixels, up to 300 times as long
as wide, in seven modes and three formats. Inspects them with both detectors and prints the largest differences.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

import unflaw
from unflaw.imaging.reading import read
from unflaw.io.listing import list_images
from unflaw.runtime.verification import compare

MODES = ("L", "RGB", "RGBA", "P", "1", "grey16", "colour16")


def make(source: Path, folder: Path, count: int = 200) -> list[Path]:
    rng = np.random.default_rng(0)
    images, made = list_images(source), []
    for i in range(count):
        image = Image.fromarray(read(images[int(rng.integers(len(images)))]))
        width, height = (int(np.exp(rng.uniform(0 if i % 4 == 0 else np.log(32), np.log(3000)))) for _ in range(2))
        if i % 10 == 9:
            width, height = max(1, width // 100), max(width, 300)
        x0, y0 = (int(rng.integers(0, side // 2)) for side in image.size)
        image = image.crop((x0, y0, *image.size)).resize((width, height))
        mode = MODES[i % len(MODES)]
        if mode == "grey16":
            made.append(folder / f"{i:03d}.png")
            deep = np.asarray(image.convert("L"), np.uint16) * 257
            Image.fromarray(deep).save(made[-1])
        elif mode == "colour16":
            made.append(folder / f"{i:03d}.tif")
            tifffile.imwrite(made[-1], np.asarray(image, np.uint16) * 257, photometric="rgb")
        else:
            made.append(folder / f"{i:03d}.{'jpg' if mode in ('L', 'RGB') and i % 2 else 'png'}")
            image = image.convert(mode)
            if mode == "RGBA":
                image.putalpha(Image.linear_gradient("L").resize(image.size))
            image.save(made[-1])
    return made


def main(trained: str, source: str, exported: list[str]) -> None:
    detector = unflaw.load(trained)
    with tempfile.TemporaryDirectory() as folder:
        images = make(Path(source), Path(folder))
        print("| exported | images | scores | maps | at one place | verdicts | at the threshold |")
        print("|---" * 7 + "|")
        for path in exported:
            result = compare(detector, unflaw.load(path), images)
            print(
                f"| {Path(path).name} | {result.images} | {result.score:.1e} | {result.map:.1e} | {result.cell:.1e} | "
                f"{len(result.verdicts)} differ | {len(result.edge)} |",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
