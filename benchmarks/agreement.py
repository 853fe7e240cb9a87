"""Does an exported detector say the same as the one it was made of, whatever pictures come?

    python benchmarks/agreement.py detector.safetensors PICTURES exported.onnx [exported.xml …]

Makes 200 pictures of the pictures in a folder (PICTURES): cut out at random, of 1 to 3000 pixels, up to 300 times as
long as wide, in seven modes and three formats; inspects them with both and prints the largest differences.
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
    pictures, made = list_images(source), []
    for i in range(count):
        picture = Image.fromarray(read(pictures[int(rng.integers(len(pictures)))]))
        width, height = (int(np.exp(rng.uniform(0 if i % 4 == 0 else np.log(32), np.log(3000)))) for _ in range(2))
        if i % 10 == 9:
            width, height = max(1, width // 100), max(width, 300)
        x0, y0 = (int(rng.integers(0, side // 2)) for side in picture.size)
        picture = picture.crop((x0, y0, *picture.size)).resize((width, height))
        mode = MODES[i % len(MODES)]
        if mode == "grey16":
            made.append(folder / f"{i:03d}.png")
            deep = np.asarray(picture.convert("L"), np.uint16) * 257
            Image.fromarray(deep).save(made[-1])
        elif mode == "colour16":
            made.append(folder / f"{i:03d}.tif")
            tifffile.imwrite(made[-1], np.asarray(picture, np.uint16) * 257, photometric="rgb")
        else:
            made.append(folder / f"{i:03d}.{'jpg' if mode in ('L', 'RGB') and i % 2 else 'png'}")
            picture = picture.convert(mode)
            if mode == "RGBA":
                picture.putalpha(Image.linear_gradient("L").resize(picture.size))
            picture.save(made[-1])
    return made


def main(trained: str, source: str, exported: list[str]) -> None:
    detector = unflaw.load(trained)
    with tempfile.TemporaryDirectory() as folder:
        pictures = make(Path(source), Path(folder))
        print("| exported | pictures | scores | maps | at one place | verdicts | at the threshold |")
        print("|---" * 7 + "|")
        for path in exported:
            found = compare(detector, unflaw.load(path), pictures)
            print(
                f"| {Path(path).name} | {found.pictures} | {found.score:.1e} | {found.map:.1e} | {found.cell:.1e} | "
                f"{len(found.verdicts)} differ | {len(found.edge)} |",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
