"""What becomes of the promised false-alarm rate on data as it comes: bursts, new sessions, contaminated training.

    python benchmarks/promise.py comes ../shared/data/mvtec_ad/bottle …        # the sets, with default settings
    python benchmarks/promise.py bursts ../shared/data/mvtec_ad/bottle …       # every image with five near-copies
    python benchmarks/promise.py sessions ../shared/data/mvtec_ad/screw …      # commissioning after a change
    python benchmarks/promise.py defects ../shared/data/mvtec_ad/screw …       # defects among the training images

Prints a Markdown table. "promised" is the rate of the threshold, "observed" are good test images above it. "chance" is
the probability of so many or more if the promise holds (`conformal.chance_of_alarms`); "kept" is no if it is below
0.5 %. "found" are defective images above the threshold, "passed" are those called good; the others are for review.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unflaw.calibration.conformal import chance_of_alarms
from unflaw.calibration.thresholds import CONTRADICTION, Calibration
from unflaw.datasets import load_dataset
from unflaw.detector import Detector
from unflaw.imaging.reading import read
from unflaw.imaging.transforms import prepare
from unflaw.methods.layers import gaussian_blur

COPIES, BASE = 5, 40  # near-copies of each image, and number of images in "bursts"
SHIFT, LIGHT = 0.02, 0.05  # of the near-copies: shares of the side and of the brightness
DRAWS = 3  # random choices of commissioning images
Array = np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--method", default=None, help="default: uranet for comes, else nearest_neighbor")
    parser.add_argument("--backbone", default=None, help="NAME=FILE; default: that of the configuration")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(2)
    measure, heading = KINDS[asked.kind]
    print("| set | " + " | ".join(heading) + " |\n|" + "---|" * (len(heading) + 1))
    for path in asked.data:
        for row in measure(path, asked):
            print(f"| {path.name} | " + " | ".join(map(str, row)) + " |", flush=True)


def made(asked: argparse.Namespace, method: str, **settings: Any) -> Detector:
    name, _, file = (asked.backbone or "").partition("=")
    own = {"features__backbone": name} if name else {}
    own |= {"training__seed": asked.seed, "training__display_steps": 0}
    return Detector(asked.method or method, weights=file or None, **own, **settings)


def scores(detector: Detector, images: Sequence[Any]) -> Array:
    return np.array([result.score for result in detector.inspect_many(images)])


def against(calibration: Calibration, good: Array, bad: Array) -> list[str]:
    """The cells promised, observed, chance, kept, found and passed."""
    alarms = int((good > calibration.threshold).sum())
    chance = chance_of_alarms(alarms, len(good), len(calibration.scores), calibration.rate)
    passed = sum(calibration.verdict(score) == "good" for score in bad)
    return [
        f"{calibration.rate:.1%}",
        f"{alarms} of {len(good)}",
        f"{chance:.2g}",
        "yes" if chance >= CONTRADICTION else "**no**",
        f"{int((bad > calibration.threshold).sum())} of {len(bad)}",
        str(passed),
    ]


def without_reserve(calibration: Calibration) -> Calibration:
    return calibration.model_copy(update={"threshold": calibration.threshold - calibration.reserve, "reserve": 0.0})


def parts(path: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Training images, good test images and defective ones."""
    data = load_dataset(path)
    by_label = [[sample.path for sample in data.test if sample.label == label] for label in (0, 1)]
    return [sample.path for sample in data.train], *by_label


def comes(path: Path, asked: argparse.Namespace) -> Iterator[list[str]]:
    train, good, bad = parts(path)
    detector = made(asked, "uranet").fit(train)
    found = detector.calibration_
    assert found is not None
    good_scores, bad_scores = scores(detector, good), scores(detector, bad)
    size = f"{len(train)} / {found.images or len(found.scores)} / {len(found.scores)}"
    yield [size, "yes", *against(found, good_scores, bad_scores)]
    yield [size, "no", *against(without_reserve(found), good_scores, bad_scores)]


def bursts(path: Path, asked: argparse.Namespace) -> Iterator[list[str]]:
    train, good, bad = parts(path)
    rng = np.random.default_rng(asked.seed)
    chosen = train[:: max(1, len(train) // BASE)]
    with tempfile.TemporaryDirectory() as folder:
        for i, file in enumerate(chosen):
            for j, copy in enumerate(near_copies(Image.open(file).convert("RGB"), rng)):
                copy.save(Path(folder) / f"{i:03d}{j}.png")
        for groups in ("none", "auto", r"(\d{3})\d\.png"):
            detector = made(asked, "nearest_neighbor", calibration__groups=groups).fit(folder)
            found = detector.calibration_
            assert found is not None
            named = groups if groups in ("none", "auto") else "named"
            good_scores, bad_scores = scores(detector, good), scores(detector, bad)
            size = f"{len(chosen)} × {COPIES + 1}"
            for reserve, calibration in (("no", without_reserve(found)), ("yes", found)):
                cells = against(calibration, good_scores, bad_scores)
                yield [size, named, reserve, str(len(found.scores)), *cells]


def near_copies(image: Image.Image, rng: np.random.Generator) -> Iterator[Image.Image]:
    """The image, and copies of it that are slightly shifted and in slightly other light."""
    image.thumbnail((512, 512))
    yield image
    for _ in range(COPIES):
        dx, dy = rng.uniform(-SHIFT, SHIFT, 2) * image.size
        moved = image.transform(image.size, Image.Transform.AFFINE, (1, 0, dx, 0, 1, dy), Image.Resampling.BILINEAR)
        light = np.asarray(moved, float) * (1 + rng.uniform(-LIGHT, LIGHT))
        yield Image.fromarray(light.clip(0, 255).astype(np.uint8))


def darker(image: Array) -> Array:
    return image * 0.85


def blurred(image: Array) -> Array:
    planes = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[:, None]
    return gaussian_blur(planes.float(), 0.8)[:, 0].numpy().transpose(1, 2, 0)


def shifted(image: Array) -> Array:
    by = round(0.03 * len(image))
    return np.pad(image, ((by, 0), (by, 0), (0, 0)), mode="edge")[: image.shape[0], : image.shape[1]]


SESSIONS: dict[str, Callable[[Array], Array]] = {"darker": darker, "less sharp": blurred, "shifted": shifted}


def sessions(path: Path, asked: argparse.Namespace) -> Iterator[list[str]]:
    train, good, bad = parts(path)
    rng = np.random.default_rng(asked.seed)
    order = [train[i] for i in rng.permutation(len(train))]
    learned, pool = order[: len(order) * 3 // 5], order[len(order) * 3 // 5 :]
    detector = made(asked, "nearest_neighbor").fit(learned)
    before, fitted, record = detector.calibration_, detector.categories_[""], detector.record_
    assert before is not None
    yield ["as trained", "–", "–", *against(before, scores(detector, good), scores(detector, bad))]

    def seen(files: Sequence[Path], drift: Callable[[Array], Array]) -> list[Array]:
        prepared = (prepare(read(file), detector.config.preparation).pixels.transpose(1, 2, 0) for file in files)
        return [drift(image).clip(0, 1).astype(np.float32) for image in prepared]

    for name, drift in SESSIONS.items():
        new_pool, new_good, new_bad = (seen(files, drift) for files in (pool, good, bad))
        good_scores, bad_scores = scores(detector, new_good), scores(detector, new_bad)
        yield [name, "–", "–", *against(before, good_scores, bad_scores)]
        for n in (10, 30, 60):
            for share in (0.0, 0.05):
                cells = []
                for _ in range(DRAWS if n <= len(pool) else 0):
                    defects = round(share * n)
                    mixed = [new_pool[i] for i in rng.choice(len(pool), n - defects, replace=False)]
                    taken = rng.choice(len(bad), defects, replace=False)
                    detector.commission([*mixed, *(new_bad[i] for i in taken)], share=share)
                    after = detector.calibration_
                    assert after is not None
                    cells.append(against(after, good_scores, np.delete(bad_scores, taken)))
                    detector.categories_[""], detector.record_ = fitted, record
                if cells:
                    yield [name, str(n), f"{share:.0%}", *(", ".join(column) for column in zip(*cells, strict=True))]


def defects(path: Path, asked: argparse.Namespace) -> Iterator[list[str]]:
    train, _, bad = parts(path)
    rng = np.random.default_rng(asked.seed)
    for share in (0.05, 0.1):
        good = train[:250]
        planted = [bad[i] for i in rng.permutation(len(bad))[: round(share * len(good) / (1 - share))]]
        detector = made(asked, "nearest_neighbor").fit([*good, *planted])
        known, n = set(map(str, planted)), len(planted)
        first = sum(name in known for name in detector.record_["strangest_tenth"])
        named = [entry["path"] for entry in detector.record_["strangest"]]
        yield [
            f"{len(good)} + {n}",
            f"{first} of {n} ({first / n:.0%})",
            f"{len(named)}, {sum(name in known for name in named)} of them planted",
        ]


PROMISE = ["promised", "observed", "chance", "kept", "found", "passed"]
KINDS: dict[str, tuple[Callable[[Path, argparse.Namespace], Iterator[list[str]]], list[str]]] = {
    "comes": (comes, ["good / calibrating / groups", "reserve", *PROMISE]),
    "bursts": (bursts, ["images", "groups", "reserve", "calibrating", *PROMISE]),
    "sessions": (sessions, ["session", "images", "defects among them", *PROMISE]),
    "defects": (defects, ["good + planted", "planted among the strangest tenth", "named as outliers"]),
}

if __name__ == "__main__":
    main()
