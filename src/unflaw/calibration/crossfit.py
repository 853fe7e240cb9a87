"""Out-of-sample scores of good images, used for calibration.

Held-out images give them (split conformal prediction), or, so that small sets need not give up images, all do
(`calibration.folds`): each is scored by a network that did not learn from it, and the detector learns from all.

* Held-out images, drawn at random, join the memory as well (`calibration.update_memory`), and are scored leave-one-out;
  likewise all images of a method that trains nothing (K = n folds, at no cost). A
  memory only lowers distances, so the whole one finds no more in a new image than any of those without one image:
  p-values are at least those of the jackknife+ (Barber et al. 2021), and P(p ≤ α) ≤ 2α for every n and every
  distribution; about α unless leaving one image out changes everything. This takes the choice of prototypes, and the
  few statistics of `Method.fit_normalization`, as given: one image hardly moves them.
* Images of a validation part may be alike among themselves, where new ones are not: leaving out one is not enough.
  They calibrate first and join the memory after that, which can only lower scores, so their rate is certified.
* Any other method is trained K times more, each time without one fold. If all K networks scored a new image, P(p ≤ α)
  would be at most 2α + (1 − K/n) / (K + 1) (Vovk 2015; Barber et al. 2021, CV+). But one network scores it, which
  learned from all: nothing is proved, and that the rate is about α rests on learning from more images making new good
  ones look no less normal.

Standardisation and principal components of features are those of all images in every fold; that one image, or one
fold, hardly moves them is taken as given too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
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
from unflaw.methods.base import top_fraction_mean
from unflaw.methods.feature_set import NEW_IMAGES, Context, FeatureSet
from unflaw.postprocessing.stitching import TileStitcher

NORMALIZED_ON = 64  # training images of a category that the normal range of maps and scores is fitted to


def feature_set(cache: Cache, network: Method, textures: Tensor | None = None) -> FeatureSet:
    """The features of a cache as methods take them."""
    numbers = {name: number for number, name in enumerate(cache.rows())}
    categories = torch.tensor([numbers[name] for name in cache.categories])
    return FeatureSet(cache.features, cache.image_numbers, cache.cells(network.features.grid), categories, textures)


def stitched_maps(
    network: Method,
    windows: Sequence[Window],
    features: Callable[[Tensor], Tensor],
    context: Context = NEW_IMAGES,
) -> Iterator[TileStitcher]:
    """Anomaly maps of images, one image after the other: "map" and, where there is one, "uncertainty".

    Args:
        network: Of their category.
        windows: Of all images, in order.
        features: Returns F of some of them, by rows.
        context: Rows of the images, where they are training or held-out ones.
    """
    size, stitcher = (network.config.preparation.size,) * 2, None
    for rows in torch.arange(len(windows)).split(8):
        shown = [windows[row] for row in rows.tolist()]
        inside = cells(shown, network.features.grid)
        inspection = network(features(rows), replace(context[rows], valid=inside))
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


def fit_normalization(network: Method, train: Cache, number: int, rows: Sequence[int]) -> None:
    """`Method.fit_normalization` for the category of a number, which a training cache has in some rows."""
    network.select_category(number)
    chosen = train.mixed(rows)[:NORMALIZED_ON]
    first = torch.tensor(chosen)
    network.fit_normalization(train.features[first], Context(train.cells(network.features.grid, chosen), first))


@torch.inference_mode()
def score_cached(
    network: Method, cache: Cache, found: CalibrationScores, context: Context = NEW_IMAGES
) -> CalibrationScores:
    """Adds the scores of cached images to `found`, and returns it.

    Args:
        network: Of their category.
        cache: The images.
        found: Scores so far.
        context: Rows of the images whose prototypes are excluded.
    """
    found.paths += [str(cache.paths[row]) for row in cache.heads()]
    for stitcher in stitched_maps(network, cache.windows, lambda rows: cache.features[rows].float(), context):
        score, maps = stitcher.result()
        found.add(score, maps["map"], stitcher.layout.box, maps.get("uncertainty"), stitcher.layout.counted)
    return found


@torch.inference_mode()
def memory_distances(network: Method, cache: Cache, rows: Sequence[int], *, exclude_own: bool) -> dict[str, float]:
    """Distance of each image to the memory of its category, by path.

    It is made of the largest distances as the image score is (`scoring.top_fractions`), at every second cell in both
    directions: a quarter of the time of all cells, and hardly less is found. No trained part of the network takes part,
    so images that were trained on and others have comparable scores.

    Args:
        network: Finished for the category, its memory not extended.
        cache: Holds the images.
        rows: Of the images, with all their windows.
        exclude_own: The cache is the one that `Method.fit_memory` saw: exclude the prototypes of each image for itself.

    Returns:
        Nothing where the method has no memory; images of which no such cell counts are left out.
    """
    memory = network.memory
    found: dict[str, float] = {}
    if memory is None:
        return found
    for part in torch.tensor(rows).split(8):
        chosen, context = part.tolist(), Context(training_rows=part if exclude_own else None)
        distance = memory(cache.features[part][..., ::2, ::2].float(), context)[1][:, 0]
        inside = cache.cells(network.features.grid, chosen)
        inside = None if inside is None else inside[..., ::2, ::2]
        scores = top_fraction_mean(distance, network.config.scoring.top_fractions, inside, network.window).mean(1)
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
    trained = memory_distances(network, train, rows, exclude_own=True)
    others = {} if held is None else memory_distances(network, held, range(len(held)), exclude_own=False)
    if not trained:
        return None
    found = outliers(trained | others) if random else outliers(trained) + outliers(others)
    return sorted(found, key=lambda entry: -entry["deviations"])[:MOST]


def score_held_out(
    network: Method, held: Cache, options: CalibrationOptions, rng: Generator, *, random: bool
) -> tuple[CalibrationScores, bool]:
    """Scores of held-out images, which join the memory with `update_memory`; see the module.

    Args:
        network: Of their category. Prototypes are added to its memory.
        held: The images.
        options: `update_memory` and `minimum_area`.
        rng: For the choice of prototypes.
        random: The images are a random part of the good ones: they join the memory and are scored leave-one-out. If
            not, they are scored first.

    Returns:
        The scores, and whether the images had joined the memory by then.
    """
    data = feature_set(held, network)
    joined = options.update_memory and random and network.add_prototypes(data, rng)
    context = Context(added_rows=torch.arange(len(held)) if joined else None)
    found = score_cached(network, held, CalibrationScores(options.minimum_area), context)
    if options.update_memory and not random:
        network.add_prototypes(data, rng)
    return found, joined


def leave_one_out(
    network: Method, train: Cache, rows: Sequence[int], options: CalibrationOptions, budget: float
) -> CalibrationScores:
    """Leave-one-out scores of the images of a category, by their rows, for a method that trains nothing."""
    own, context = train.take(rows, budget), Context(training_rows=torch.tensor(rows))
    return score_cached(network, own, CalibrationScores(options.minimum_area), context)


def cross_fit(
    learn: Callable[[Cache, int], Method],
    train: Cache,
    options: CalibrationOptions,
    spared: Collection[str],
    budget: float,
) -> dict[str, CalibrationScores]:
    """Out-of-fold scores of all categories but those spared, by networks that were trained without the fold.

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
                fit_normalization(network, part, number, own)
                score_cached(network, train.take(left[name], budget), found[name])
    return found


def _fold(cache: Cache, rows: Sequence[int], fold: int, folds: int) -> list[int]:
    """Every so many images of some rows, with all their windows."""
    first = torch.tensor([cache.windows[row].number == 0 for row in rows])
    return [row for row, number in zip(rows, (first.cumsum(0) - 1).tolist(), strict=True) if number % folds == fold]
