"""Demo data set, made offline: a photograph of brickwork with synthetic defects."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter, shift

from unflaw.io.files import write_png, write_text

N_TRAIN, N_VALIDATION, N_GOOD, N_PER_DEFECT = 80, 40, 20, 10
_UNFINISHED = ".unfinished"  # exists until the data set is complete
SIZE = 256  # side of the images, pixels
_PIECE_SIDE = 128  # side of the pieces cut from the photograph, pixels
# Disjoint parts of the photograph (rows, columns): pieces of one part overlap each other, so calibration on pieces of
# the training part would be too optimistic.
_PARTS = {
    "train": np.s_[:, :256],
    "validation": np.s_[:256, 256:],
    "test": np.s_[256:, 256:],
}

README = """Bricks: a small data set for visual anomaly detection in the layout of MVTec AD, made by unflaw.

The images are cut from a real photograph: those under train/ from its left half, those under validation/ and test/
from the upper and the lower part of its right half, so that no brick is in two of them. THE DEFECTS ARE SYNTHETIC;
ground_truth/ holds their masks. Results show that a method works, not how good it is.

Photographs, all from the package scikit-image and all CC0: `brick` (CC0Textures), which every image shows; `gravel`
(CC0Textures) and `coffee` (Rachel Michetti), of which the foreign matter is cut.
Seed: {seed}
"""

Flaw = Callable[[np.random.Generator, np.ndarray], tuple[np.ndarray, np.ndarray]]


def make_demo_data(out: str | Path, seed: int = 0) -> Path:
    """Write 80 good training images, 40 for calibration, and 20 good and 50 defective test images; about 13 MB.

    Args:
        out: Output folder; new, empty, or left by an interrupted run.
        seed: Random seed; it determines the pixels (with the same versions of the libraries).

    Returns:
        The folder, for `load_dataset`. Images are (256, 256) RGB, masks 0 or 255.

    Raises:
        FileExistsError: The folder is not empty.
    """
    out = Path(out)
    begun = out / _UNFINISHED
    if out.exists() and not begun.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out}: the folder is not empty; name a new one")
    write_text(begun, "An interrupted run has left this folder; the same command writes all of it again.\n")
    rng = np.random.default_rng(seed)
    brick = _photograph("brick")
    for part, count in (("train", N_TRAIN), ("validation", N_VALIDATION), ("test", N_GOOD)):
        for i in range(count):
            _write(out / f"{part}/good/{i:03d}.png", _piece(rng, brick[_PARTS[part]]), rng)
    for kind, flaw in FLAWS.items():
        for i in range(N_PER_DEFECT):
            image = _piece(rng, brick[_PARTS["test"]])
            changed, alpha = flaw(rng, image)
            mask = alpha > 0.15  # the visible part of a soft edge
            _write(out / f"test/{kind}/{i:03d}.png", image + alpha[..., None] * (changed - image), rng)
            _write(out / f"ground_truth/{kind}/{i:03d}_mask.png", mask)
    write_text(out / "README.txt", README.format(seed=seed))
    begun.unlink()
    return out


def is_whole(out: Path) -> bool:
    """Return True if the demo data in a folder are complete."""
    return (out / "train").is_dir() and not (out / _UNFINISHED).exists()


@cache
def _photograph(name: str) -> np.ndarray:
    """Load a photograph from the wheel of scikit-image, (H, W, 3) float64 in [0, 1]."""
    from skimage import data

    photograph = getattr(data, name)() / 255
    return photograph if photograph.ndim == 3 else np.repeat(photograph[..., None], 3, axis=2)


def _piece(rng: np.random.Generator, photograph: np.ndarray, side: int = _PIECE_SIDE) -> np.ndarray:
    """Crop a random square and resize it to SIZE, with random mirroring and brightness."""
    y, x = (int(rng.integers(0, length - side + 1)) for length in photograph.shape[:2])
    square = Image.fromarray((photograph[y : y + side, x : x + side] * 255).astype(np.uint8))
    piece = np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) / 255
    return piece[:, :: int(rng.choice([-1, 1]))] * rng.uniform(0.95, 1.05)


def _write(path: Path, image: np.ndarray, rng: np.random.Generator | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if rng is not None:  # the noise of a camera, on good and defective images alike
        image = image + rng.normal(0, 0.008, (SIZE, SIZE, 1))
    write_png(path, Image.fromarray((image * 255).round().clip(0, 255).astype(np.uint8)))


def _blob(rng: np.random.Generator, radius: float, softness: float) -> np.ndarray:
    """Draw an irregular patch inside the image, (SIZE, SIZE) in [0, 1], with an edge `softness` pixels wide."""
    cy, cx = rng.uniform(1.3 * radius, SIZE - 1.3 * radius, 2)
    y, x = np.mgrid[:SIZE, :SIZE]
    turn, stretch = rng.uniform(0, np.pi), rng.uniform(1, 1.5)
    u = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
    v = (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
    rough = gaussian_filter(rng.normal(size=(SIZE, SIZE)), radius / 4)
    distance = np.hypot(u / stretch, v * stretch) / radius + 0.15 * rough / rough.std()
    return np.clip((1 - distance) * radius / softness, 0, 1)


def scratch(rng: np.random.Generator, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw a thin curve, bright or dark."""
    start, bend, end = rng.uniform(0.1, 0.9, (3, 2)) * SIZE
    while np.linalg.norm(start - end) < 0.3 * SIZE:
        end = rng.uniform(0.1, 0.9, 2) * SIZE
    t = np.linspace(0, 1, 60)[:, None]
    curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
    large = Image.new("L", (4 * SIZE, 4 * SIZE))
    ImageDraw.Draw(large).line([tuple(4 * p) for p in curve], fill=255, width=int(rng.integers(7, 17)), joint="curve")
    alpha = np.asarray(large.resize((SIZE, SIZE), Image.Resampling.BOX)) / 255
    return image * 0.25 + rng.choice([0.05, 0.7]), alpha * rng.uniform(0.7, 1)


def stain(rng: np.random.Generator, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw a wet or oily patch: darker, with less contrast."""
    return image * rng.uniform(0.35, 0.6), _blob(rng, rng.uniform(15, 45), 8)


def missing(rng: np.random.Generator, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Break a piece out, so that the rough inside shows."""
    ground = gaussian_filter(image, (9, 9, 0)) * rng.uniform(0.7, 0.95)
    grain = gaussian_filter(rng.normal(size=(SIZE, SIZE, 1)), (1.2, 1.2, 0))
    return ground + 0.06 * grain / grain.std(), _blob(rng, rng.uniform(14, 36), 2)


def foreign(rng: np.random.Generator, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw an object from another photograph, with its shadow."""
    alpha = _blob(rng, rng.uniform(10, 30), 2)
    matter = _piece(rng, _photograph(str(rng.choice(["gravel", "coffee"]))))
    shadow = 0.6 * gaussian_filter(shift(alpha, (4, 3)), 2)
    return matter * alpha[..., None], np.maximum(alpha, shadow)  # the shadow is black


def colour(rng: np.random.Generator, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tint a spot like rust, like moss, or bluish."""
    tints = [(1.15, 0.98, 0.8), (0.92, 1.06, 0.82), (0.86, 0.97, 1.12)]
    return image * rng.choice(tints), _blob(rng, rng.uniform(18, 45), 6)


FLAWS: dict[str, Flaw] = {f.__name__: f for f in (scratch, stain, missing, foreign, colour)}
