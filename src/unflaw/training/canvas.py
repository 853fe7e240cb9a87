"""Choice of the canvas from the good images, where the user has chosen none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from unflaw.config import Config
from unflaw.imaging.inputs import Input
from unflaw.imaging.reading import image_size

LOOKED_AT = 16  # maximum number of images whose size is read, evenly spread
ELONGATED = 1.5  # least ratio of the sides for a canvas that is no square
ALIKE = 0.2, 0.9  # largest deviation from the median ratio, and the least share of images within it
LONGEST = 1024  # of the canvas, pixels
MULTIPLE = 32  # of which both sides are one: the strides of common backbones
REDUCED = 4  # reduction from which small defects may vanish


def fit_canvas(config: Config, images: Sequence[Input]) -> tuple[Config, str]:
    """Chooses a rectangular canvas for elongated images, if none of size, fit, tile and roi is given.

    A square would shrink elongated images along their longer side, and thin defects across it would vanish. The shorter
    side stays that of the default canvas, unless the longer one would exceed `LONGEST`. Cells of the feature grid keep
    their size in pixels, if the grid is not given, either. Images whose ratios differ keep the square.

    Args:
        config: Configuration of the detector.
        images: Good images, of some of which the size is read. Unreadable ones are left out.

    Returns:
        The configuration, and a sentence about the choice or about images that are much larger than the canvas; "" if
        there is nothing to say.
    """
    preparation = config.preparation
    if {"size", "fit", "tile", "roi"} & preparation.model_fields_set or not isinstance(preparation.size, int):
        return config, ""
    spread = np.unique(np.linspace(0, max(len(images) - 1, 0), LOOKED_AT).astype(int))
    sizes = np.array(list(_sizes([images[i] for i in spread if i < len(images)])), float).reshape(-1, 2)
    if not len(sizes):
        return config, ""
    width, height = np.median(sizes, axis=0)
    logarithms = np.log(sizes[:, 0] / sizes[:, 1])
    ratio = float(np.exp(np.median(logarithms)))
    alike = np.abs(logarithms - np.median(logarithms)) <= np.log(1 + ALIKE[0])
    described = f"the good images have about {width:.0f} × {height:.0f} pixels"
    side = preparation.size
    if max(ratio, 1 / ratio) < ELONGATED or alike.mean() < ALIKE[1]:
        if min(width, height) < REDUCED * side:
            return config, ""
        pixels = min(width, height) / side
        return config, (
            f"{described} and are reduced to {side} × {side}: defects of fewer than about {4 * pixels:.0f} pixels may "
            f"vanish; --size {2 * side} keeps more of them, and --set preparation.tile={2 * side} looks at tiles"
        )
    longer = min(LONGEST, _rounded(side * max(ratio, 1 / ratio)))
    shorter = min(side, _rounded(longer / max(ratio, 1 / ratio)))
    canvas = (longer, shorter) if ratio > 1 else (shorter, longer)
    features = config.features
    if "grid" not in features.model_fields_set:
        features = features.model_copy(update={"grid": max(4, features.grid * shorter // side)})
    changes = {"preparation": preparation.model_copy(update={"size": canvas}), "features": features}
    said = f"{described}: the canvas is {canvas[0]} × {canvas[1]} pixels; --size {side} would be the usual square"
    return config.model_copy(update=changes), said


def _rounded(side: float) -> int:
    return max(1, round(side / MULTIPLE)) * MULTIPLE


def _sizes(images: Sequence[Input]) -> Iterator[tuple[int, int]]:
    for image in images:
        try:
            yield image_size(image)
        except ValueError:  # reported when it is read
            continue
