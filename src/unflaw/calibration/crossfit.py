"""Out-of-sample scores of good images, used for calibration.

Held-out images are scored (split conformal prediction), or with `calibration.folds` all images, each by a network that
did not learn from it. Then small sets lose no training images.

* Held-out images drawn at random are added to the memory (`calibration.update_memory`) and scored leave-one-out, and so
  are all images of a method that trains nothing (K = n folds, at no cost). More prototypes only lower distances, so
  p-values are at least those of the jackknife+ (Barber et al. 2021): P(p ≤ α) ≤ 2α for every n and distribution, and
  about α unless a single image changes much. This assumes that one image hardly changes the choice of prototypes and
  the statistics of `Method.fit_normalization`.
* Images of a validation part may resemble each other more than new ones, so leave-one-out is not enough. They are
  scored first and added to the memory afterwards. That can only lower scores, so their rate is certified.
* With few groups held out (`calibration.fewest`), all images calibrate, out of folds of memories
  (`cross_fit_memory`).
* Any other method is trained K more times, each time without one fold. If all K networks scored a new image, P(p ≤ α)
  would be at most 2α + (1 − K/n) / (K + 1) (Vovk 2015; Barber et al. 2021, CV+). But one network that learned from all
  images scores it. A rate of about α is not proved: it assumes that more training images do not raise the scores of new
  good images.

Standardisation and principal components of features come from all images in every fold, which assumes that one fold
hardly changes them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from unflaw.calibration.outliers import MOST, outliers
from unflaw.calibration.scores import CalibrationScores
from unflaw.config import CalibrationOptions
from unflaw.errors import TrainingError
from unflaw.features.cache import Cache, cells
from unflaw.imaging.tiling import Window
from unflaw.io.words import count
from unflaw.methods import Method
from unflaw.methods.feature_set import NEW_IMAGES, Context, FeatureSet, joined
from unflaw.methods.memory_bank import coarser
from unflaw.methods.statistics import top_fraction_mean
from unflaw.postprocessing.stitching import TileStitcher

MEMORY_FOLDS = 5
NORMALIZED_ON = 64  # maximum number of training images for `Method.fit_normalization`


def feature_set(cache: Cache, network: Method, textures: Tensor | None = None) -> FeatureSet:
    """The features of a cache in the form that methods take."""
    numbers = {name: number for number, name in enumerate(cache.rows())}
    categories = torch.tensor([numbers[name] for name in cache.categories])
    valid, groups = cache.cells(network.features.shape), torch.tensor(cache.groups)
    return FeatureSet(cache.features, cache.image_numbers, valid, categories, textures, groups)


def stitched_maps(
    network: Method,
    windows: Sequence[Window],
    features: Callable[[Tensor], Tensor],
    context: Context = NEW_IMAGES,
) -> Iterator[TileStitcher]:
    """Yields the anomaly maps of one image after another: "map" and, if the method has one, "uncertainty".

    Args:
        network: Network of their category.
        windows: Windows of all images, in order.
        features: Returns F of some windows, by rows.
        context: Rows of the images if they are training or held-out images.
    """
    size, stitcher = network.config.preparation.canvas[::-1], None
    for rows in torch.arange(len(windows)).split(8):
        shown = [windows[row] for row in rows.tolist()]
        inside = cells(shown, network.features.shape)
        inspection = network(features(rows), replace(context[rows], valid=inside))
        maps, scores = network.fuse(inspection, inside)
        found = {"map": maps.numpy()}
        if (uncertainty := inspection.layers.get("uncertainty")) is not None:
            found["uncertainty"] = F.interpolate(uncertainty, size, mode="bilinear")[:, 0].numpy()
        for i, (window, score) in enumerate(zip(shown, scores.tolist(), strict=True)):
            stitcher = stitcher or TileStitcher(window.layout)
            stitcher.add(score, {name: values[i] for name, values in found.items()})
            if stitcher.complete:
                yield stitcher
                stitcher = None


def fit_normalization(network: Method, train: Cache, number: int, rows: Sequence[int]) -> None:
    """Calls `Method.fit_normalization` for the category of a number, with its rows of a training cache."""
    network.select_category(number)
    chosen = train.mixed(rows)[:NORMALIZED_ON]
    first = torch.tensor(chosen)
    network.fit_normalization(train.features[first], Context(train.cells(network.features.shape, chosen), first))


@torch.inference_mode()
def score_cached(
    network: Method, cache: Cache, found: CalibrationScores, context: Context = NEW_IMAGES
) -> CalibrationScores:
    """Adds the scores of cached images to `found` and returns it.

    Args:
        network: Network of their category.
        context: Rows of the images whose prototypes are excluded.
    """
    found.paths += [str(cache.paths[row]) for row in cache.heads()]
    found.groups += [cache.groups[row] for row in cache.heads()]
    for stitcher in stitched_maps(network, cache.windows, lambda rows: cache.features[rows].float(), context):
        score, maps = stitcher.result()
        found.add(score, maps["map"], stitcher.layout.box, maps.get("uncertainty"), stitcher.layout.counted)
    return found


@torch.inference_mode()
def memory_distances(
    network: Method, cache: Cache, rows: Sequence[int], *, exclude_own: bool
) -> dict[str, tuple[float, ...]]:
    """Patch score and, with a regional memory, regional score of each image, of distances to memories alone, by path.

    They use no trained part of the network, so training images and others are comparable. Patches are compared at every
    second cell in both directions, which takes a quarter of the time.

    Args:
        network: Network of the category, its memory not extended.
        cache: Cache of the images.
        rows: Rows of the images, with all their windows.
        exclude_own: Exclude prototypes of the own group; the cache is then the one that `Method.fit_memory` saw.

    Returns:
        Scores of the images with any such cell that counts; empty if the method has no memory.
    """
    memory, regional, scoring = network.memory, network.regional_memory, network.config.scoring
    found: dict[str, tuple[float, ...]] = {}
    if memory is None:
        return found
    for part in torch.tensor(rows).split(8):
        chosen, context = part.tolist(), Context(training_rows=part if exclude_own else None)
        features, inside = cache.features[part].float(), cache.cells(network.features.shape, chosen)
        thin = None if inside is None else inside[..., ::2, ::2]
        distance = memory(features[..., ::2, ::2], context).scored[:, 0]
        columns = [top_fraction_mean(distance, scoring.top_fractions, thin, network.window).mean(1)]
        if regional is not None:
            coarse = None if inside is None else coarser(inside)
            distance = regional(features, replace(context, valid=inside))[:, 0]
            columns.append(top_fraction_mean(distance, (scoring.regional_top_fraction,), coarse, 1)[:, 0])
        for row, scores in zip(chosen, torch.stack(columns, 1).tolist(), strict=True):
            if all(map(math.isfinite, scores)):  # an image scores as its highest window does
                path = str(cache.paths[row])
                found[path] = tuple(map(max, scores, found.get(path, scores)))
    return found


def strangeness(distances: Mapping[str, tuple[float, ...]], patch_weight: float) -> dict[str, float]:
    """Weighs patch and regional scores as the image score does, each in robust deviations above the median."""
    if not distances:
        return {}
    values = np.array(list(distances.values()))
    values -= np.median(values, 0)
    spread = 1.4826 * np.median(np.abs(values), 0)
    values /= np.where(spread > 0, spread, values.std(0).clip(1e-12))
    weights = [patch_weight, 1 - patch_weight] if values.shape[1] > 1 else [1.0]
    return dict(zip(distances, (values @ weights).tolist(), strict=True))


def find_outliers(
    network: Method, train: Cache, rows: Sequence[int], held: Cache | None, *, random: bool
) -> tuple[list[dict[str, Any]], list[str]] | None:
    """Finds good images of the selected category that are strange to its memory; see `outliers.outliers`.

    Args:
        network: See `memory_distances`; after `fit_normalization`, which finds the weight of patches.
        train: Training images.
        rows: Rows of the category in `train`.
        held: Calibration images, if any.
        random: True: `held` is a random part of the good images. False: they are compared among themselves only.

    Returns:
        Outliers, the furthest first, and the paths of the strangest tenth of all images, whether they are outliers or
        not; None if the method has no memory.
    """
    trained = memory_distances(network, train, rows, exclude_own=True)
    others = {} if held is None else memory_distances(network, held, range(len(held)), exclude_own=False)
    if not trained:
        return None
    weight = float(network.patch_weight)
    together = [trained | others] if random else [trained, others]
    scored = [strangeness(part, weight) for part in together]
    found = [entry for part in scored for entry in outliers(part)]
    ranked = sorted(scored[0], key=lambda path: -scored[0][path])
    return sorted(found, key=lambda entry: -entry["deviations"])[:MOST], ranked[: math.ceil(len(ranked) / 10)]


def score_held_out(
    network: Method, held: Cache, options: CalibrationOptions, rng: Generator, *, random: bool
) -> tuple[CalibrationScores, bool]:
    """Scores held-out images and, with `update_memory`, adds them to the memory; see the module.

    Args:
        network: Network of their category.
        held: Held-out images.
        options: `update_memory` and `minimum_area`.
        rng: Random stream for the choice of prototypes.
        random: True: the images are a random part of the good ones. They are added first and scored leave-one-out.
            False: they are scored first.

    Returns:
        The scores, and True if the images were added before scoring.
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
    """Leave-one-out scores of the images in some rows, for a method that trains nothing."""
    own, context = train.take(rows, budget), Context(training_rows=torch.tensor(rows))
    return score_cached(network, own, CalibrationScores(options.minimum_area), context)


@torch.no_grad()
def cross_fit_memory(
    network: Method, caches: Sequence[Cache], options: CalibrationOptions, budget: float, rng: Generator
) -> CalibrationScores:
    """Out-of-fold scores of all images of one category, with memories anew for each of `MEMORY_FOLDS` folds of groups.

    Leave-one-out in one memory would be cheaper, but a coreset keeps few prototypes that are not an image's own, so
    that scores are too high. What is trained stays as it is, and has seen these images.

    Args:
        network: Trained network of the category; not changed.
        caches: Its images, such as those of training and those held out; each group in one of them.
        options: `minimum_area`.
        budget: See `Cache.take`.
        rng: Random stream for the choice of prototypes.
    """
    found = CalibrationScores(options.minimum_area)
    folds = min(MEMORY_FOLDS, sum(len(set(cache.groups)) for cache in caches))
    rows = [range(len(cache)) for cache in caches]
    for fold in range(folds):
        left = [_fold(cache, own, fold, folds) for cache, own in zip(caches, rows, strict=True)]
        judge = copy.deepcopy(network)
        parts = [
            feature_set(cache.take([row for row in own if row not in set(out)], budget), judge)
            for cache, own, out in zip(caches, rows, left, strict=True)
            if len(out) < len(cache)
        ]
        judge.fit_memories(joined(parts), rng)
        for cache, out in zip(caches, left, strict=True):
            if out:
                score_cached(judge, cache.take(out, budget), found)
    return found


def cross_fit(
    learn: Callable[[Cache, int], Method],
    train: Cache,
    options: CalibrationOptions,
    excluded: Collection[str],
    budget: float,
) -> dict[str, CalibrationScores]:
    """Out-of-fold scores of categories, by networks that were trained without the fold.

    Args:
        learn: Trains a new network on some images, given also the number of the fold.
        train: All images, in random order.
        options: `folds` and `minimum_area`.
        excluded: Categories that are not scored.
        budget: See `Cache.take`.

    Raises:
        TrainingError: A category has fewer images than folds, or too few to learn from.
    """
    rows = {name: own for name, own in train.rows().items() if name not in excluded}
    for name, own in rows.items():
        if (groups := len({train.groups[row] for row in own})) < max(options.folds, 4):
            of = f"{name}: " if name else ""
            few = count(groups, "image" if groups == len(train.heads(own)) else "group of images")
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
    """Rows of one fold: every `folds`-th group of `rows`, with all its images and windows."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(cache.groups[row] for row in rows))}
    return [row for row in rows if numbers[cache.groups[row]] % folds == fold]
