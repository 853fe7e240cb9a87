"""Detectors from 1 to 7 good images: nothing is trained, and nothing is called defective (ours).

Altered views of the images tell what one more good image may look like: slightly shifted, turned, scaled, brighter or
darker. They join the memory, and leave-one-out scores of the images themselves set the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from unflaw.calibration.crossfit import feature_set, fit_normalization, score_cached
from unflaw.calibration.scores import CalibrationScores
from unflaw.calibration.thresholds import Calibration
from unflaw.config import Config
from unflaw.features.cache import Cache, Part, Source, read_parts
from unflaw.features.extractor import Extractor
from unflaw.imaging.inputs import Input
from unflaw.imaging.tiling import Preparation
from unflaw.io.words import count
from unflaw.methods import Method
from unflaw.methods.feature_set import Context
from unflaw.methods.nearest import NearestNeighborOptions
from unflaw.training.loop import step_rng

VIEWS = 8  # altered views of each image
TURN, SHIFT, SCALE = math.radians(3), 0.04, 0.03  # largest, in both directions; shifts in shares of half a side
LIGHT, CONTRAST = 0.04, 0.05


def few_config(config: Config) -> Config:
    """The configuration for few images: the distance to a memory, with the features of the method asked for."""
    training = config.training.model_copy(update={"display_steps": 0})
    return config.model_copy(update={"network": NearestNeighborOptions(), "training": training})


def describe_few(n: int, method: str) -> str:
    """Says in one sentence what became of the method that was asked for."""
    instead = "" if method == NearestNeighborOptions().method else f" instead of {method}"
    few = f"{count(n, 'good image')} {'is' if n == 1 else 'are'}"
    them = "it" if n == 1 else "them"
    return f"{few} too few to train on: nearest_neighbor{instead} compares with {them} and mild views"


def altered(images: Tensor, rng: Generator) -> Tensor:
    """One altered view of an image, (W, 3, h, w) in [0, 1], all of its windows alike."""
    turn, dx, dy, scale, light, contrast = (2 * torch.rand(6, generator=rng) - 1).tolist()
    angle, size = TURN * turn, 1 + SCALE * scale
    h, w = images.shape[2:]
    rows = [
        [math.cos(angle) * size, -math.sin(angle) * size * h / w, SHIFT * dx],
        [math.sin(angle) * size * w / h, math.cos(angle) * size, SHIFT * dy],
    ]
    grid = F.affine_grid(torch.tensor([rows]).expand(len(images), -1, -1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    mean = moved.mean()
    return ((moved - mean) * (1 + CONTRAST * contrast) + mean + LIGHT * light).clamp(0, 1)


def read_views(extractor: Extractor, preparation: Preparation, seed: int) -> Source:
    """Source of the images and, after the windows of each, of those of its altered views."""

    def parts(paths: Sequence[Input], batch: int) -> Iterator[Part]:
        rng = step_rng(seed, 2**30)
        seen = _Images(extractor)
        for path in paths:
            for part in read_parts(seen, preparation)([path], 2**20):  # all windows of the image in one part
                yield part
                for _ in range(VIEWS if part.paths else 0):
                    yield replace(part, raw=extractor.aggregate(altered(seen.images, rng)), skipped=[])

    return parts


class _Images:
    """Extractor that keeps the last images that it was given."""

    def __init__(self, extractor: Extractor) -> None:
        self.extractor, self.images = extractor, torch.empty(0)

    def aggregate(self, images: Tensor) -> Tensor:
        self.images = images
        return self.extractor.aggregate(images)


def fit_few(network: Method, cache: Cache) -> Calibration:
    """Fits the memory to a cache of images and views, and calibrates.

    Views are excluded together with their image. Of a single image each view is scored without itself, and the highest
    score counts.

    Args:
        network: Untrained network of `few_config`, its extractor fitted.
        cache: From `read_views`, one category.

    Returns:
        The calibration, `review_only`.
    """
    paths = list(dict.fromkeys(map(str, cache.paths)))
    numbers = torch.tensor([paths.index(str(path)) for path in cache.paths])
    alone = len(paths) == 1
    images = cache.image_numbers if alone else numbers
    rng = step_rng(network.config.training.seed, 2**31)
    network.fit_memory(replace(feature_set(cache, network), images=images, groups=None), rng)
    rows = list(range(len(cache)))
    fit_normalization(network, cache, 0, rows)
    network.patch_weight.fill_(1)  # few images do not tell how they differ as wholes
    views = cache.image_numbers - torch.tensor([int(cache.image_numbers[numbers == n].min()) for n in numbers])
    scored = rows if alone else [row for row in rows if views[row] == 0]
    own, context = cache.take(scored, math.inf), Context(training_rows=torch.tensor(scored))
    options = network.config.calibration
    found = score_cached(network, own, CalibrationScores(options.minimum_area), context)
    if alone:  # all views are of one image, which counts once
        found.scores, found.peaks = [max(found.scores)], [max(found.peaks)]
    return found.calibrate(options, out_of_fold=True).model_copy(update={"review_only": True})
