"""Out-of-sample scores of good images, used for calibration.

Held-out images give them (split conformal prediction), or, so that small sets need not give up images, all do
(`calibration.folds`): each is judged without what was learned from it, and the detector learns from all.

* Held-out images, drawn at random, extend the memory as well (`calibration.update_memory`), and what each taught it
  is left out while it is judged; likewise all images of a method that trains nothing (K = n folds, at no cost). A
  memory only lowers distances, so the whole one finds no more in a new image than any of those without one image:
  p-values are at least those of the jackknife+ (Barber et al. 2021), and P(p ≤ α) ≤ 2α for every n and every
  distribution; about α unless leaving one image out changes everything. This takes the choice of prototypes, and the
  few statistics of `Method.finish`, as given: one image hardly moves them.
* Images of a validation part may be alike among themselves, where new ones are not: leaving out one is not enough.
  They calibrate first and extend the memory after that, which can only lower scores, so their rate is certified.
* Any other method is trained K times more, each time without one fold. If all K networks judged a new image, P(p ≤ α)
  would be at most 2α + (1 − K/n) / (K + 1) (Vovk 2015; Barber et al. 2021, CV+). But one network judges, that learned
  from all: nothing is proved, and that the rate is about α rests on learning from more images making new good ones
  look no less normal.

Standardisation and principal components of features are those of all images in every fold; that one image, or one
fold, hardly moves them is taken as given too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from unflaw.calibration.outliers import MOST, outliers
from unflaw.calibration.thresholds import CalibrationScores
from unflaw.config import CalibrationOptions
from unflaw.errors import TrainingError
from unflaw.features.cache import Cache, cells
from unflaw.imaging.tiling import Window
from unflaw.io.words import count
from unflaw.methods import Method
from unflaw.methods.base import highest
from unflaw.methods.memory_bank import MemoryBank
from unflaw.postprocessing.stitching import TileStitcher

FINISHED_ON = 64  # training images of a category that say how large evidence normally is


def arrange(network: Method, cache: Cache) -> None:
    """Tells the memories of a network which rows of a cache belong together, and what of them counts."""
    network.arrange(cache.images, cache.cells(network.features.grid))


def pieced(
    network: Method,
    windows: Sequence[Window],
    features: Callable[[Tensor], Tensor],
    **left_out: Tensor,
) -> Iterator[TileStitcher]:
    """Maps that a network finds in images, one image after the other: "map" and, where there is one, "uncertainty".

    Args:
        network: With what is normal for their category in use.
        windows: Of all images, in order.
        features: Gives F of some of them, by rows.
        **left_out: As for `gather_evidence`.
    """
    size, stitcher = (network.config.preparation.size,) * 2, None
    for rows in torch.arange(len(windows)).split(8):
        shown = [windows[row] for row in rows.tolist()]
        inside = cells(shown, network.features.grid)
        left = {name: numbers[rows] for name, numbers in left_out.items()}
        inspection = network(features(rows), valid=inside, **left)
        maps, scores = network.fuse(inspection, inside)
        found = {"map": maps.numpy()}
        if (doubt := inspection.layers.get("uncertainty")) is not None:
            found["uncertainty"] = F.interpolate(doubt, size, mode="bilinear")[:, 0].numpy()
        for i, (window, score) in enumerate(zip(shown, scores.tolist(), strict=True)):
            stitcher = stitcher or TileStitcher(window.layout)
            stitcher.add(score, {name: values[i] for name, values in found.items()})
            if stitcher.complete:
                yield stitcher
                stitcher = None


def finish(network: Method, train: Cache, number: int, rows: Sequence[int]) -> None:
    """`Method.finish` for a category, by its number, of a network trained on a cache that has it in some rows."""
    network.select_category(number)
    chosen = train.mixed(rows)[:FINISHED_ON]
    first = torch.tensor(chosen)
    network.finish(train.features[first], train.cells(network.features.grid, chosen), first)


@torch.inference_mode()
def gather_evidence(network: Method, cache: Cache, found: CalibrationScores, **left_out: Tensor) -> CalibrationScores:
    """Adds what a network finds in images to evidence, and returns it.

    Args:
        network: With what is normal for their category in use.
        cache: The images.
        found: What is added to.
        **left_out: `images` or `held_out`, (N,), as `Method.forward` takes them: what a memory keeps of each image is
            left out for it.
    """
    found.paths += [str(cache.paths[row]) for row in cache.heads()]
    for stitcher in pieced(network, cache.windows, lambda rows: cache.features[rows].float(), **left_out):
        score, maps = stitcher.result()
        found.add(score, maps["map"], stitcher.layout.box, maps.get("uncertainty"), stitcher.layout.counted)
    return found


@torch.inference_mode()
def memory_distances(network: Method, cache: Cache, rows: Sequence[int], *, leave: bool) -> dict[str, float]:
    """Distances of images to the memory of the category in use, a score for each path.

    It is made of the largest distances of an image as the image score is (`scoring.shares`), at every second cell in
    both directions: a quarter of the time of all cells, and hardly less is found. No trained part of the network takes
    part, so images that were trained on and others have comparable scores.

    Args:
        network: Finished for the category, its memory not extended.
        cache: Holds the images.
        rows: Of the images, with all their windows.
        leave: The cache is the one that `Method.setup` saw: what each image taught the memory is left out for it.

    Returns:
        Nothing where the method has no memory; images of which no such cell counts are left out.
    """
    memory = next((part for part in network.children() if isinstance(part, MemoryBank)), None)
    found: dict[str, float] = {}
    if memory is None:
        return found
    for part in torch.tensor(rows).split(8):
        chosen = part.tolist()
        distance = memory(cache.features[part][..., ::2, ::2].float(), part if leave else None)[1][:, 0]
        inside = cache.cells(network.features.grid, chosen)
        inside = None if inside is None else inside[..., ::2, ::2]
        scores = highest(distance, network.config.scoring.shares, inside, network.window).mean(1)
        for row, score in zip(chosen, scores.tolist(), strict=True):  # an image scores as its highest window does
            if math.isfinite(score):
                path = str(cache.paths[row])
                found[path] = max(score, found.get(path, score))
    return found


def find_outliers(
    network: Method, train: Cache, rows: Sequence[int], held: Cache | None, *, random: bool
) -> list[dict[str, Any]] | None:
    """Good images of the category in use that lie far from its memory, as `outliers.outliers` gives them.

    Args:
        network: As for `memory_distances`.
        train: What the memory has learned from.
        rows: Of the category in it.
        held: The images that calibrate, if any.
        random: They are a random part of the good images; else they are compared among themselves only.

    Returns:
        The furthest first; None where the method has no memory.
    """
    trained = memory_distances(network, train, rows, leave=True)
    others = {} if held is None else memory_distances(network, held, range(len(held)), leave=False)
    if not trained:
        return None
    found = outliers(trained | others) if random else outliers(trained) + outliers(others)
    return sorted(found, key=lambda entry: -entry["deviations"])[:MOST]


def judge_held_out(
    network: Method, held: Cache, options: CalibrationOptions, rng: Generator, *, random: bool
) -> tuple[CalibrationScores, bool]:
    """The evidence of held-out images of the category in use, which with `update_memory` teach its memory: see above.

    Args:
        network: Finished for the category. Its memory is extended.
        held: The images.
        options: `update_memory` and `minimum_area`.
        rng: What `Method.extend` draws.
        random: They are a random part of the good images, and teach before they calibrate; else they calibrate first.

    Returns:
        The evidence, and whether the images had taught something by then.
    """
    arrange(network, held)
    taught = options.update_memory and random and network.extend(held.features, rng)
    left_out = {"held_out": torch.arange(len(held))} if taught else {}
    found = gather_evidence(network, held, CalibrationScores(options.minimum_area), **left_out)
    if options.update_memory and not random:
        network.extend(held.features, rng)
    return found, taught


def leave_one_out(
    network: Method, train: Cache, rows: Sequence[int], options: CalibrationOptions, budget: float
) -> CalibrationScores:
    """The evidence of the category in use, by its rows, of a method that trains nothing: see above."""
    own = train.take(rows, budget)
    return gather_evidence(network, own, CalibrationScores(options.minimum_area), images=torch.tensor(rows))


def cross_fit(
    learn: Callable[[Cache, int], Method],
    train: Cache,
    options: CalibrationOptions,
    spared: Collection[str],
    budget: float,
) -> dict[str, CalibrationScores]:
    """The evidence of all categories but those spared, each image judged by a network trained without its fold.

    Args:
        learn: Trains a new network on some images; it gets the number of the fold, too.
        train: All images, in random order.
        options: `folds` and `minimum_area`.
        spared: Categories that calibrate otherwise.
        budget: Of `Cache.take`.

    Raises:
        TrainingError: There are more folds than images of a category, or too few are left to learn from.
    """
    rows = {name: own for name, own in train.rows().items() if name not in spared}
    for name, own in rows.items():
        if (heads := len(train.heads(own))) < max(options.folds, 4):
            of = f"{name}: " if name else ""
            few = count(heads, "image")
            raise TrainingError(f"{of}{few} cannot make {options.folds} folds; lower calibration.folds")
    found = {name: CalibrationScores(options.minimum_area) for name in rows}
    for fold in range(options.folds):
        left = {name: _fold(train, own, fold, options.folds) for name, own in rows.items()}
        out = {row for own in left.values() for row in own}
        part = train.take([row for row in range(len(train)) if row not in out], budget)
        network = learn(part, fold)
        for number, (name, own) in enumerate(part.rows().items()):
            if name in left:
                finish(network, part, number, own)
                gather_evidence(network, train.take(left[name], budget), found[name])
    return found


def _fold(cache: Cache, rows: Sequence[int], fold: int, folds: int) -> list[int]:
    """Every so many images of some rows, with all their windows."""
    first = torch.tensor([cache.windows[row].number == 0 for row in rows])
    return [row for row, number in zip(rows, (first.cumsum(0) - 1).tolist(), strict=True) if number % folds == fold]
