"""Categories of products: whose image is which, and which ones calibrate. A detector of one has the category ""."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unflaw.calibration.drift import Reference
from unflaw.calibration.thresholds import Calibration
from unflaw.datasets import Dataset, load_dataset
from unflaw.datasets.samples import distinct
from unflaw.errors import TrainingError
from unflaw.features.cache import Cache
from unflaw.imaging.inputs import ImageLike, Input, inputs
from unflaw.io.brief import brief
from unflaw.io.words import count
from unflaw.methods import Method

Data = str | Path | Dataset | Iterable[ImageLike]  # what `load_dataset` recognises, or images as `inputs` takes them


@brief
class Category(NamedTuple):
    """What a detector knows of one category alone; all else is common to its categories."""

    calibration: Calibration
    network: Method  # `Method.with_category`: what is normal is its own, the weights are common
    reference: Reference | None = None


def resolve_data(data: Data | Mapping[str, Data]) -> tuple[list[Input], list[Input], dict[Input, str]]:
    """Images to train on and to calibrate with, and the category of each.

    Raises:
        TrainingError, DatasetError: Data that cannot work, of any category. TypeError: As `inputs`.
    """
    if isinstance(data, Mapping) and not (data and all(data)):
        raise TrainingError("there is no category, or one without a name; give {name: data, …}")
    train: list[Input] = []
    validation: list[Input] = []
    categories: dict[Input, str] = {}
    for name, given in (data if isinstance(data, Mapping) else {"": data}).items():
        found = load_dataset(given) if isinstance(given, str | Path) else given
        title, images, calibrating = name, list[Input](), list[Input]()
        if isinstance(found, Dataset):
            title = name or found.name
            images += [sample.path for sample in found.train]
            calibrating += [sample.path for sample in found.validation]
        else:
            images += inputs(found, f"{name} image".lstrip())
        if title and not images:
            raise TrainingError(f"{title}: there are no good images to train on")
        for path in [*images, *calibrating]:
            if categories.setdefault(path, name) != name:
                raise TrainingError(f"{path}: is in two categories, {categories[path]} and {name}; leave it in one")
        train += images
        validation += calibrating
    return train, validation, categories


def without_copies(
    train: Sequence[Input], validation: Sequence[Input], categories: Mapping[Input, str], contents: Mapping[Input, str]
) -> tuple[list[Input], list[Input], list[tuple[str, str]]]:
    """Training and validation images without those that another file of the category shows already.

    An image that is trained on and calibrates as well, or does so twice, would look more normal than new ones, and
    the rate that is certified would be wrong.

    Args:
        categories: Of each image.
        contents: Keys from `samples.content_keys`.

    Returns:
        What is left of both, and (path, reason) of what is not.
    """
    copies: dict[Input, Input] = {}
    for name in dict.fromkeys(categories.values()):
        own = [path for path in [*train, *validation] if categories[path] == name]
        copies |= distinct(own, contents)[1]
    learned = set(train)
    copies |= {path: path for path in validation if path in learned}
    reasons = [(str(path), f"{path}: is the same image as {first} and counts once") for path, first in copies.items()]
    fitting = [path for path in dict.fromkeys(train) if copies.get(path, path) == path]
    return fitting, [path for path in dict.fromkeys(validation) if path not in copies], reasons


def split_calibration(
    cache: Cache, validation: Cache | None, share: float, budget: float
) -> tuple[Cache, dict[str, Cache]]:
    """Images to train on, and by category those that calibrate: its validation part or, without one, the last ones.

    Args:
        cache: Of all good images but validation parts.
        validation: Those, where there are any.
        share: Of the images of a category that is held out, at least two images; 0: none, it is cross-fitted.
        budget: Of `Cache.take`.

    Raises:
        TrainingError: The share leaves too few to train on.
    """
    given = {} if validation is None else validation.rows()
    trained: list[int] = []
    calibrating: dict[str, Cache] = {}
    for name, rows in cache.rows().items():
        first = len(rows)
        if validation is not None and name in given:
            calibrating[name] = validation.take(given[name], budget)
        elif share:
            heads = cache.heads(rows)
            left = len(heads) - max(2, round(share * len(heads)))
            if left < 2:
                of = f"{name}: " if name else ""
                raise TrainingError(f"{of}calibration.holdout leaves {count(left, 'image')} to train on; lower it")
            first = rows.index(heads[left])  # the windows of one image stay together
            calibrating[name] = cache.take(rows[first:], budget)
        trained += rows[:first]
    return cache.take(sorted(trained), budget), calibrating


def build_drift_reference(train: Cache, rows: Sequence[int], held: Cache | None, seed: int) -> Reference:
    """What tells drift of a category: its good images, by rows, and those held out, in random order."""
    described = [train.described[train.heads(rows)].numpy()]
    if held is not None:
        described.append(held.described[held.heads()].numpy())
    return Reference(np.random.default_rng(seed).permutation(np.concatenate(described)))
